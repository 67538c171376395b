"""Every published number in a preset is the one that the paper or the authors' output has.

The numbers are typed a second time, in published_tables.py. Each test compares whole tables: a published
number that is not in a typed table is also an error."""
import pytest
from conftest import cells_of
from published_tables import DISTILL_TABLE1, DISTILL_TABLE2, DISTILL_TABLE3, DISTILL_TABLE4, DISTILL_TABLE5
from published_tables import SADT_NOTEBOOK, SADT_TABLE1, SAF_TABLE1, SAF_TABLE2, SAF_TABLE3
from published_tables import SAM_STUDY_LOGS, SAM_STUDY_TABLE1, SAM_STUDY_TABLE2, mean_and_spread
from sadt_nb.papers.grids import PAPER_GRIDS

STRENGTH = dict(no='crop and mirror', yes='AutoAugment, Cutout')
CHECKED = ['sadt/notebook20', 'sadt/notebook20_factors', 'sadt/table1', 'sadt/table1_code',
           'sadt/table1_seeds', 'saf/table1', 'saf/table1_code', 'saf/table2', 'saf/table3',
           'saf/table3_code', 'distill/table1', 'distill/table2', 'distill/table3', 'distill/table4',
           'distill/table5', 'sam_study/a', 'sam_study/b', 'sam_study/c', 'sam_study/a_code',
           'sam_study/b_code', 'sam_study/c_code']
PAPERS = ('sadt/', 'saf/', 'distill/', 'sam_study/') # the other presets are ours


def in_preset(table):
    "Return mean and deviation of every row with a published accuracy, by the row's label."
    return {c.label: (c.published, c.spread) for c in cells_of(table) if c.published is not None}


def shown(expected): return {label: pair for label, pair in expected.items() if pair[0] is not None}


def test_the_notebook_of_sadt():
    "The preset has three digits."
    expected = {f'{name} · seed {s}': (round(accuracy, 3), None)
                for name, accuracy in SADT_NOTEBOOK.items() for s in range(3)}
    assert in_preset('sadt/notebook20') == expected


def test_the_factors_of_the_notebook_have_the_notebooks_numbers():
    for label, pair in in_preset('sadt/notebook20_factors').items():
        assert pair == (round(SADT_NOTEBOOK[label.split(' · ')[0]], 3), None), label


def test_table_1_of_sadt():
    columns = [f'{net} · {bs}' for net in ('simple_cnn', 'vgg16_slim', 'inception_resnet_slim')
               for bs in (512, 2048)]
    expected = {}
    for data, table in SADT_TABLE1.items():
        for method, *accuracies in table:
            for column, accuracy in zip(columns, accuracies, strict=True):
                expected[f'{method} · {data} · {column}'] = (float(accuracy), None)
    assert len(expected) == 84
    assert in_preset('sadt/table1_code') == expected
    assert in_preset('sadt/table1') == expected
    for c in cells_of('sadt/table1'):
        method, data, net, bs = c.label.split(' · ')
        assert (c.run.method, c.run.data, c.run.model, c.run.bs) == (method, data, net, int(bs))
        assert (c.run.epochs, c.run.lr, c.run.cutmix) == ({512: 200, 2048: 370}[c.run.bs], 1e-4, .25), c.label


def test_the_seeds_of_table_1_of_sadt():
    "Methods have the published accuracies of Simple CNN on CIFAR-10, whatever the seed; controls have none."
    expected = {}
    runs = {c.label: c.run for name in ('sadt/table1', 'sadt/table1_controls') for c in cells_of(name)}
    for method, small, large, *_ in SADT_TABLE1['cifar10']:
        for bs, accuracy in ((512, small), (2048, large)):
            for seed in range(3):
                label = f'{method} · cifar10 · simple_cnn · {bs} · seed {seed}'
                expected[label] = (float(accuracy), None)
    assert len(expected) == 42
    assert in_preset('sadt/table1_seeds') == expected
    kinds = set()
    for c in cells_of('sadt/table1_seeds'):
        row, _, seed = c.label.rpartition(' · seed ')
        assert c.run.seed == int(seed)
        assert c.run.but(seed=0) == runs[row], 'seed 0 is a run of the other preset'
        kinds.add(row.split(' · ')[0])
    controls = {'two steps per batch', 'twice the rate', 'twice the epochs'}
    assert kinds == controls | {method for method, *_ in SADT_TABLE1['cifar10']}


def test_tables_1_and_2_of_saf():
    expected = shown({f'{method} · imagenet · {net}': mean_and_spread(accuracy)
                      for net, table in SAF_TABLE1.items() for method, accuracy in table})
    assert in_preset('saf/table1') == expected
    own_resnets = {label: pair for label, pair in expected.items()
                   if 'resnet' in label and label.split(' · ')[0] in ('baseline', 'sam', 'saf', 'mesa')}
    assert in_preset('saf/table1_code') == own_resnets
    assert {c.label: c.memory / 2**20 for c in cells_of('saf/table2')} == SAF_TABLE2


@pytest.mark.parametrize('preset', ['saf/table3', 'saf/table3_code'])
def test_table_3_of_saf(preset):
    expected = {}
    for net, table in SAF_TABLE3.items():
        for method, *accuracies in table:
            for data, accuracy in zip(('cifar10', 'cifar100'), accuracies, strict=True):
                for seed in range(3):
                    expected[f'{method} · {data} · {net} · seed {seed}'] = mean_and_spread(accuracy)
    assert in_preset(preset) == expected


def with_rounds(where, alpha, accuracies):
    "Return the published pairs of one line of Table 2 or 3, by label, for three seeds."
    teacher, *rounds, sam = map(mean_and_spread, accuracies)
    found = {}
    for seed in (0, 10, 20):
        end = f'{where} · seed {seed}'
        found |= {f'teacher · {end}': teacher, f'SAM · {end}': sam}
        found |= {f'alpha {alpha}, round {r} · {end}': pair for r, pair in enumerate(rounds, start=1)}
    return found


def test_tables_2_and_3_of_self_distillation():
    expected = {}
    for net, strong, alpha, *accuracies in DISTILL_TABLE2:
        expected |= with_rounds(f'{net} · {STRENGTH[strong]}', alpha, accuracies)
    assert in_preset('distill/table2') == expected
    expected = {}
    for shortcuts, strong, alpha, *accuracies in DISTILL_TABLE3:
        net = 'resnet20' if shortcuts == 'yes' else 'resnet20 without shortcuts'
        expected |= with_rounds(f'{net} · {STRENGTH[strong]}', alpha, accuracies)
    assert in_preset('distill/table3') == expected


def test_table_1_of_self_distillation():
    "Its rows of SAM take the means of Table 2."
    sam = {(net, strong): mean_and_spread(last)[0] for net, strong, *_, last in DISTILL_TABLE2}
    expected = {}
    for net, data, strong, teacher, student in DISTILL_TABLE1:
        where = f'{net} · {data} · {STRENGTH[strong]}'
        expected[f'teacher · {where}'] = mean_and_spread(teacher)
        expected[f'student · {where}'] = mean_and_spread(student)
        if data == 'cifar10': expected[f'SAM · {where}'] = (sam[net, strong], None)
    assert in_preset('distill/table1') == expected


@pytest.mark.parametrize('preset, table, alpha, where', [
    ('distill/table4', DISTILL_TABLE4, .5, 'resnet18 · svhn · seed 0'),
    ('distill/table5', DISTILL_TABLE5, .2, 'resnet18 · tiny_imagenet · seed 0')])
def test_tables_4_and_5_of_self_distillation(preset, table, alpha, where):
    expected, curvatures = {}, {}
    for row, accuracy, trace, eigenvalue in table:
        label = f'alpha {alpha}, round {row}' if row.isdigit() else row
        expected[f'{label} · {where}'] = mean_and_spread(accuracy)
        curvatures[f'{label} · {where}'] = [float(trace), float(eigenvalue)]
    assert in_preset(preset) == expected
    for c in cells_of(preset):
        measured = dict(c.measured)
        assert [measured['trace'], measured['eigenvalue']] == curvatures[c.label], c.label


LOGS = {(name, batch, int(seed)): list(map(float, numbers)) for name, batch, seed, *numbers in SAM_STUDY_LOGS}


def test_the_logs_of_the_sam_study():
    "Accuracies have four digits, losses seven after the point."
    found = {}
    for study in 'abc':
        for c in cells_of(f'sam_study/{study}_code'):
            if not c.log: continue
            batch = '-' if study == 'c' else str(c.run.bs)
            found.setdefault((c.label.split(' · ')[0].split(',')[0], batch, c.run.seed), c.log)
            assert found[c.label.split(' · ')[0].split(',')[0], batch, c.run.seed] == c.log
    assert found.keys() == LOGS.keys()
    for key, log in found.items(): assert list(log) == pytest.approx(LOGS[key], abs=5.1e-8), key


def published_in_study(study):
    return {(c.label.split(' · ')[0].split(',')[0], c.run.bs, c.run.seed): c.published
            for c in cells_of(f'sam_study/{study}') if c.published is not None}


@pytest.mark.parametrize('suffix', ['', '_code'])
def test_the_tables_of_the_sam_study(suffix):
    exchanged = {20: 30, 30: 20, 40: 40} # the authors' logs show that two printed rows are exchanged
    of_seed = {(name, 128, exchanged[int(seed)]): mean_and_spread(accuracy)[0]
               for seed, name, accuracy in SAM_STUDY_TABLE1}
    assert published_in_study(f'a{suffix}') == of_seed
    for (name, batch, seed), accuracy in of_seed.items():
        assert accuracy == pytest.approx(LOGS[name, str(batch), seed][0], abs=1.1e-4)
    best = {(name, int(batch), seed): log[0] for (name, batch, seed), log in LOGS.items() if batch != '-'}
    assert published_in_study(f'b{suffix}') == best
    last = {(name, 128, int(seed)): mean_and_spread(accuracy)[0]
            for seed, name, accuracy, _ in SAM_STUDY_TABLE2}
    assert published_in_study(f'c{suffix}') == last
    for seed, name, accuracy, loss in SAM_STUDY_TABLE2:
        of_log = LOGS[name, '-', int(seed)]
        assert (of_log[1], of_log[3]) == pytest.approx((float(accuracy) / 100, float(loss)), abs=5e-7)


def test_no_other_preset_of_a_paper_has_published_numbers():
    "Figures show rows of the tables above."
    numbers = {(c.run, c.published, c.spread) for name in CHECKED for c in cells_of(name)}
    for name in PAPER_GRIDS:
        if name in CHECKED or not name.startswith(PAPERS): continue
        for c in cells_of(name):
            if c.published is None: assert c.spread is None
            else: assert (c.run.but(track=0), c.published, c.spread) in numbers, f'{name}: {c.label}'
