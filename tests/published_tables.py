"""The numbers of the published tables, typed from the papers and the authors' outputs, not from the presets.

Each table stands as it is printed: one line per row, one column per network, data set or round. Accuracies
are in percent unless the table says otherwise; `mean±deviation` over three runs. '-' marks what our copy of
a paper does not show, or what the authors do not report."""


def rows(text):
    "Return the lines of a table as lists of words."
    return [line.split() for line in text.strip().splitlines()]


def mean_and_spread(word):
    "Return mean and standard deviation of a printed accuracy, as shares of 1; `None` for what is missing."
    mean, _, spread = word.partition('±')
    if mean == '-': return None, None
    return round(float(mean) / 100, 6), round(float(spread) / 100, 6) if spread else None


# Fahim and Boutellier 2022, arXiv:2211.00310, Table 1; accuracies in [0, 1].
# Columns: Simple CNN, VGG and InceptionResNet, each with batches of 512 and of 2048 images
SADT_TABLE1 = {
    'cifar10': rows('''
        baseline 0.783 0.745 0.841 0.817 0.817 0.775
        gc       0.784 0.738 0.843 0.804 0.801 0.763
        agc      0.786 0.746 0.854 0.818 0.811 0.782
        sam      0.784 0.730 0.856 0.826 0.824 0.766
        sadt1    0.801 0.774 0.870 0.851 0.847 0.822
        sadt2    0.809 0.775 0.876 0.847 0.847 0.811
        sadt3    0.812 0.777 0.852 0.854 0.852 0.822'''),
    'cifar100': rows('''
        baseline 0.381 0.344 0.517 0.485 0.521 0.466
        gc       0.370 0.310 0.533 0.475 0.515 0.462
        agc      0.382 0.352 0.524 0.495 0.526 0.471
        sam      0.385 0.363 0.542 0.498 0.525 0.479
        sadt1    0.406 0.394 0.552 0.564 0.560 0.527
        sadt2    0.425 0.394 0.565 0.565 0.553 0.513
        sadt3    0.413 0.395 0.560 0.572 0.566 0.529'''),
}

# The notebook in github.com/DeepUVaasa/SADT: test accuracies that its last evaluation prints; the notebook
# evaluates setup 3, setup 2, setup 1 in this order
SADT_NOTEBOOK = {
    'baseline': .45706528425216675, 'gradient centralization': .45077869296073914,
    'adaptive gradient clipping': .4596371054649353, 'SAM': .48978424072265625,
    'SADT-3': .5660808682441711, 'SADT-2': .5686526894569397, 'SADT-1': .558079719543457,
}

# Du et al. 2022, arXiv:2205.14083, Table 1: ImageNet. ESAM, GSAM and LookSAM are cited there
SAF_TABLE1 = {
    'resnet50': rows('baseline 76.0\n sam 76.9\n esam 77.1\n gsam 77.2\n saf 77.8\n mesa 77.5'),
    'resnet101': rows('baseline 77.8\n sam 78.6\n esam 79.1\n gsam 78.9\n saf 79.3\n mesa 79.1'),
    'resnet152': rows('baseline 78.5\n sam 79.3\n saf -\n mesa -'),
    'vit_s32': rows('baseline 68.1\n sam 68.9\n looksam 68.8\n saf -\n mesa -'),
}

# Table 2 and section 4.3: megabytes of SAF and MESA with ResNet-50 on ImageNet, and of SAF on CIFAR
SAF_TABLE2 = {'saf · imagenet · resnet50': 14643, 'mesa · imagenet · resnet50': 98,
              'saf · cifar100 · resnet18': 57}

# Table 3: columns CIFAR-10 and CIFAR-100
SAF_TABLE3 = {
    'resnet18': rows('''
        baseline 95.61±0.02 78.32±0.02
        sam      96.50±0.08 80.18±0.08
        saf      96.37±0.02 80.06±0.05
        mesa     96.24±0.02 79.79±0.09'''),
    'resnet101': rows('''
        baseline 96.52±0.04 80.68±0.16
        sam      97.01±0.32 82.99±0.04
        saf      96.93±0.05 82.84±0.19
        mesa     96.90±0.23 82.51±0.27'''),
    'wide_resnet_28_10': rows('''
        baseline 96.50±0.05 81.67±0.18
        sam      97.07±0.11 83.51±0.04
        saf      97.08±0.15 83.81±0.04
        mesa     97.16±0.23 83.59±0.24'''),
    'pyramidnet_110': rows('''
        baseline 96.66±0.09 81.94±0.06
        sam      97.25±0.15 84.61±0.06
        saf      97.34±0.06 84.71±0.01
        mesa     97.46±0.09 84.73±0.14'''),
}

# Pham et al. 2022, arXiv:2206.08491, Table 1, the authors' own rows: network, data, AutoAugment and Cutout?,
# teacher, student. The second row of ViT-S is printed as CIFAR-10, but belongs to CIFAR-100
DISTILL_TABLE1 = rows('''
    resnet18 cifar10  no  95.56 95.84
    resnet18 cifar10  yes 97.16 97.40
    vgg16    cifar10  no  94.39 94.50
    vgg16    cifar10  yes 96.19 96.49
    resnet18 cifar100 no  76.30 77.73
    resnet18 cifar100 yes 78.22 80.71
    vit_s32  cifar10  yes 98.40 98.46
    vit_s32  cifar100 yes 90.39 90.41
    vit_b32  cifar10  yes 98.96 98.98
    vit_b32  cifar100 yes 92.96 93.02''')

# Table 2: network, AutoAugment and Cutout?, alpha, teacher, rounds 1 to 3, SAM
DISTILL_TABLE2 = rows('''
    resnet18 no  0.2 95.57±0.15 95.80±0.05 95.58±0.13 95.62±0.09 96.25±0.06
    resnet18 no  0.5 95.57±0.15 95.84±0.10 95.60±0.17 95.59±0.01 96.25±0.06
    resnet18 no  0.8 95.57±0.15 95.74±0.09 95.55±0.10 95.62±0.09 96.25±0.06
    resnet18 yes 0.2 97.15±0.07 97.24±0.05 97.39±0.01 97.44±0.04 97.42±0.04
    resnet18 yes 0.5 97.15±0.07 97.40±0.04 97.36±0.05 97.38±0.04 97.42±0.04
    resnet18 yes 0.8 97.15±0.07 97.28±0.07 97.38±0.11 97.43±0.05 97.42±0.04
    vgg16    no  0.2 94.39±0.11 94.45±0.12 94.25±0.09 94.25±0.04 95.02±0.17
    vgg16    no  0.5 94.39±0.11 94.50±0.12 94.26±0.14 94.16±0.17 95.02±0.17
    vgg16    no  0.8 94.39±0.11 94.38±0.07 94.35±0.06 94.30±0.11 95.02±0.17
    vgg16    yes 0.2 96.19±0.05 96.36±0.15 96.33±0.05 96.29±0.05 96.61±0.12
    vgg16    yes 0.5 96.19±0.05 96.49±0.08 96.36±0.08 96.39±0.04 96.61±0.12
    vgg16    yes 0.8 96.19±0.05 96.36±0.03 96.42±0.06 96.37±0.05 96.61±0.12
    vit_s32  yes 0.2 98.40±0.00 98.46±0.04 98.46±0.04 98.43±0.02 98.52±0.03
    vit_s32  yes 0.5 98.40±0.00 98.46±0.01 98.49±0.02 98.45±0.02 98.52±0.03
    vit_s32  yes 0.8 98.40±0.00 98.48±0.02 98.46±0.04 98.48±0.02 98.52±0.03
    vit_b32  yes 0.2 98.96±0.01 98.98±0.03 98.98±0.01 98.99±0.01 99.02±0.01
    vit_b32  yes 0.5 98.96±0.01 99.00±0.02 98.98±0.01 98.99±0.04 99.02±0.01
    vit_b32  yes 0.8 98.96±0.01 99.01±0.01 98.99±0.01 99.01±0.01 99.02±0.01''')

# Table 3: ResNet-20 with shortcuts?, AutoAugment and Cutout?, alpha, teacher, rounds 1 to 3, SAM
DISTILL_TABLE3 = rows('''
    no  yes 0.2 93.28±0.12 93.50±0.04 93.42±0.11 93.61±0.03 93.52±0.04
    no  no  0.2 92.94±0.10 93.38±0.03 93.52±0.14 93.48±0.03 93.50±0.04
    yes yes 0.2 93.25±0.20 93.99±0.15 93.75±0.10 93.17±0.58 94.01±0.07
    yes no  0.2 92.69±0.06 93.46±0.12 93.48±0.04 93.60±0.18 93.51±0.10''')

# Tables 4 and 5: accuracy, trace of the Hessian, largest eigenvalue; rounds with alpha .5 and .2
DISTILL_TABLE4 = rows('''
    teacher 95.23 197.53 9.24
    1       95.94 205.79 11.200
    2       95.67 98.62 8.30
    3       95.17 271.71 12.873''')
DISTILL_TABLE5 = rows('''
    teacher 62.49 415.64 13.52
    1       65.45 352.12 12.10
    2       66.26 361.34 14.23
    3       65.99 332.67 13.45
    SAM     63.26 310.87 8.04''')

# Coldenhoff, Li and Zhu 2022, Tables I and II as printed: seed, method, accuracy (II: and training loss).
# Table I exchanges the rows of seeds 20 and 30: their logs say so
SAM_STUDY_TABLE1 = rows('''
    20 SAM 71.22
    20 SGD 65.15
    30 SAM 70.77
    30 SGD 64.03
    40 SAM 70.98
    40 SGD 64.17''')
SAM_STUDY_TABLE2 = rows('''
    1 SAM  70.06 8.72e-5
    1 ASAM 68.65 27.5e-5
    2 SAM  65.44 7.19e-5
    2 ASAM 65.77 25.0e-5
    3 SAM  65.49 9.50e-5
    3 ASAM 66.23 24.7e-5''')

# The logs in github.com/CharlieLeee/Sharpness-Aware-Generalization, folder Notebooks: method, batch size,
# seed; test accuracy at its best, at the end, after 50 epochs; training loss of the last epoch. ASAM is the
# study's adaptive SAM; batch '-' marks experiment C
SAM_STUDY_LOGS = rows('''
    SGD  16  20 0.7555 0.7480 0.7374 0.05663038
    SGD  16  30 0.7590 0.7452 0.7515 0.04993917
    SGD  16  40 0.7550 0.7492 0.7468 0.05446966
    SGD  64  20 0.7045 0.6413 0.6734 0.06295875
    SGD  64  30 0.7059 0.7023 0.6882 0.00051418
    SGD  64  40 0.7052 0.7032 0.6891 0.00062253
    SGD  128 20 0.6403 0.6375 0.6403 0.00041736
    SGD  128 30 0.6515 0.6487 0.6480 0.00045859
    SGD  128 40 0.6417 0.6403 0.6364 0.00046972
    SAM  16  20 0.7993 0.7977 0.7866 0.00796711
    SAM  16  30 0.8041 0.8025 0.7968 0.00817251
    SAM  16  40 0.8014 0.7964 0.7970 0.00904655
    SAM  64  20 0.7539 0.7539 0.7349 0.00354144
    SAM  64  30 0.7497 0.7497 0.7329 0.00368011
    SAM  64  40 0.7481 0.7408 0.7350 0.00377377
    SAM  128 20 0.7078 0.7078 0.6914 0.00216876
    SAM  128 30 0.7122 0.7076 0.6972 0.00236548
    SAM  128 40 0.7098 0.7096 0.6991 0.00203933
    SAM  -   1  0.7025 0.7006 0.6844 0.00008717
    SAM  -   2  0.6630 0.6544 0.6488 0.00007190
    SAM  -   3  0.6628 0.6549 0.6457 0.00009502
    ASAM -   1  0.6895 0.6865 0.6702 0.00027504
    ASAM -   2  0.6615 0.6577 0.6425 0.00024979
    ASAM -   3  0.6668 0.6623 0.6412 0.00024708''')
