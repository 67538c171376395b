"""The presets at full size have the settings of the papers and of the authors' released code.

The settings are typed a second time, from the text of the papers and from the released files that the
comments name. Each test compares the whole set of values that a field has in the rows of a preset."""
import pytest
from conftest import cells_of

# no other part of the recipe; a preset that has one of these says so below
PLAIN = dict(cutmix=[0.], crop=[0], flip=[False], rotate=[0.], autoaugment=[''], cutout=[0],
             resized_crop=[0.], clip=[0.], normalize=[''], label_smoothing=[0.], drop_last=[False],
             lookahead=[0], warmup=[0.], warmup_lr=[0.], n_train=[None], compile=[''], tf32=[False])
ADAM = dict(opt=['keras_adam'], opt_args=[()], lr=[1e-4], cutmix=[.25], epochs=[200, 370], bs=[512, 2048])
CIFAR = dict(crop=[4], flip=[True], valid=[0.], select=['test'])


def sgd(momentum, decay, **more):
    "Return options of SGD as a run stores them."
    return tuple(sorted(dict(more, momentum=momentum, weight_decay=decay).items()))


# run.py, izar_scripts and local_scripts of CharlieLeee/Sharpness-Aware-Generalization
IMAGENET_STEM = (('outputs', 1000), ('stem', 'imagenet'))
STUDY_CODE = dict(model=['resnet18'], data=['cifar10'], opt=['sgd'], lr=[.01], valid=[0.], select=['test'])
STUDY_AB = dict(STUDY_CODE, sched=['constant'], epochs=[100], opt_args=[(('weight_decay', 5e-4),)],
                normalize=[(.5, .5)], model_args=[IMAGENET_STEM], seed=[20, 30, 40])
# sections III-A to III-C of the report
STUDY_TEXT = dict(model=['resnet18'], data=['cifar10'], opt=['sgd'], lr=[.01], valid=[.01], select=['test'])
# run.sh, SAF_train.py and timm/optim of AngusDujw/SAF; what the page says is left out is not in this table
SAF_CODE = dict(label_smoothing=[.1], warmup=[3], warmup_lr=[1e-4], sched=['cosine'], select=['test'])
TIMM = ((.485, .456, .406), (.229, .224, .225))
SAF_CIFAR = dict(CIFAR, opt=['sgd'], lr=[.05], bs=[128], epochs=[200], sched=['cosine'], seed=[0, 1, 2],
                 opt_args=[sgd(.9, 5e-4), sgd(.9, 1e-3)], amp=[''])
# appendix A and sections 4 to 7 of Revisiting Self-Distillation
DISTILL = dict(CIFAR, opt=['sgd'], lr=[.025], opt_args=[sgd(.9, 3e-4)], bs=[96], clip=[5.], epochs=[600],
               sched=['cosine'])
# legacy/airbench94.py and legacy/airbench96.py of KellerJordan/cifar10-airbench
AIRBENCH = dict(opt=['decoupled_sgd'], bs=[1024], flip=['alternate'], normalize=['data'], drop_last=[True],
                label_smoothing=[.2], lookahead=[5], views=[2], valid=[0.], select=['last'],
                pad_mode=['reflect'])

SETTINGS = {
    # section 4.1 of SADT; the first rate and CutMix's alpha also in the released notebook
    'sadt/table1': dict(ADAM, sched=['cosine'], valid=[.01], select=['last'], amp=['']),
    # B_SADTeachers_HITY_NIPS.ipynb of DeepUVaasa/SADT
    'sadt/table1_code': dict(ADAM, sched=['restart'], valid=[0.], select=['release'], amp=['']),
    'sadt/notebook20': dict(ADAM, sched=['restart'], valid=[.01], select=['last'], bs=[2048],
                            epochs=[20, 40], lr=[1e-4, 2e-4]),
    'sam_study/a_code': dict(STUDY_AB, bs=[128], method_args=[()]),
    'sam_study/b_code': dict(STUDY_AB, bs=[16, 64, 128], method_args=[()]),
    'sam_study/c_code': dict(STUDY_CODE, sched=['cosine'], epochs=[200], bs=[128], seed=[1, 2, 3],
                             opt_args=[sgd(.9, 5e-4)],
                             method_args=[(), (('adaptive', True), ('rho', .5))],
                             model_args=[IMAGENET_STEM, (('norm', False), *IMAGENET_STEM)]),
    'sam_study/a': dict(STUDY_TEXT, sched=['constant'], epochs=[50, 100], bs=[128], opt_args=[()]),
    'sam_study/c': dict(STUDY_TEXT, sched=['cosine'], epochs=[200], bs=[128], opt_args=[sgd(.9, 5e-4)]),
    'saf/table3': SAF_CIFAR,
    'saf/table3_code': SAF_CIFAR | SAF_CODE,
    'saf/table1_code': dict(SAF_CODE, opt=['sgd'], lr=[.4], bs=[4 * 256], epochs=[90], resized_crop=[.08],
                            flip=[True], normalize=[TIMM], opt_args=[sgd(.9, 1e-4, nesterov=True)],
                            valid=[0.]),
    # Table 5 of the paper: SGD and SAM of ResNet-50 have a smaller weight decay than SAF and MESA
    'saf/table1': dict(opt=['sgd', 'adamw'], lr=[1.4, 3e-3], bs=[4096], epochs=[90, 300], sched=['cosine'],
                       resized_crop=[.08], flip=[True], valid=[0.], select=['test'],
                       opt_args=[sgd(.9, 3e-5), sgd(.9, 1e-4), (('weight_decay', .3),)]),
    'distill/table2': dict(DISTILL, autoaugment=['', 'cifar10'], cutout=[0, 16]),
    'distill/table3': dict(DISTILL, autoaugment=['', 'cifar10'], cutout=[0, 16]),
    'distill/table4': dict(DISTILL, flip=[False], data=['svhn']),
    'distill/table5': dict(DISTILL, flip=[False], crop=[8], rotate=[15.], data=['tiny_imagenet']),
    # section 7: every 30 epochs the rate decays; images are only resized and cropped to the centre
    'distill/robust_teacher': dict(lr=[.1], bs=[1024], opt_args=[sgd(.9, 1e-4)], sched=['step'],
                                   epochs=[0, 90], valid=[0.], select=['last']),
    'fast/94': dict(AIRBENCH, lr=[11.5], opt_args=[sgd(.85, .0153)], crop=[2], sched=['triangle'],
                    model_args=[()], epochs=[9.9, 13.2, 19.8, 29.7]),
    'fast/96': dict(AIRBENCH, lr=[9.], opt_args=[sgd(.85, .012)], crop=[4], cutout=[12], cutout_inside=[True],
                    sched=['triangle_to_zero'], epochs=[37, 49.33, 74, 111],
                    model_args=[(('bn_momentum', .1), ('depth', 3), ('widths', (128, 384, 512)))]),
}


@pytest.mark.parametrize('preset', SETTINGS)
def test_a_preset_has_the_settings_of_its_source(preset):
    rows = cells_of(preset)
    for field, values in (PLAIN | SETTINGS[preset]).items():
        found = {getattr(c.run, field) for c in rows}
        assert found == set(values), field
