"The house: imports run one way, the package says what it is."
import ast
import re
from importlib.metadata import version
from pathlib import Path

import pytest
import sadt_nb

LIB = Path(sadt_nb.__file__).parent
# what a folder may import, besides itself where `SIBLINGS` allows it
ALLOWED = {'core': set(), 'methods': {'core'}, 'measures': {'core'}, 'models': set(), 'data': set(),
           'experiments': {'core', 'methods', 'measures', 'models', 'data'}}
SIBLINGS = {'core', 'data', 'models', 'experiments'} # methods never import one another; a registry imports its folder


def edges(path):
    "Folders and modules of ours that a file imports."
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names = [node.module or '']
            if node.level: # nbdev writes relative imports: one dot is this folder, two dots the library
                names = ['.'.join(['sadt_nb', *([path.parent.name] if node.level == 1 else []), *names])]
        elif isinstance(node, ast.Import): names = [a.name for a in node.names]
        else: continue
        for n in names:
            parts = n.split('.')
            if parts[0] == 'sadt_nb' and len(parts) > 1: yield parts[1], parts[-1]


def offences(path, folder):
    for target, module in edges(path):
        if target == folder:
            if folder not in SIBLINGS and path.stem != 'registry': yield f'{folder}/{path.stem} imports its sibling {module}'
        elif target not in ALLOWED[folder]: yield f'{folder}/{path.stem} imports {target}'


@pytest.mark.parametrize('folder', sorted(ALLOWED))
def test_imports_run_one_way(folder):
    found = [o for p in (LIB / folder).glob('*.py') for o in offences(p, folder)]
    assert not found, found


def test_the_import_check_can_fail(tmp_path):
    for folder, text in (('core', 'from sadt_nb.methods.sam import SAM'), ('core', 'from ..methods.sam import SAM'), ('methods', 'from .sam import SAM'),
                         ('methods', 'from sadt_nb.methods.sam import SAM'), ('models', 'import sadt_nb.data.loader')):
        (f := tmp_path / folder / 'x.py').parent.mkdir(exist_ok=True)
        f.write_text(text)
        assert list(offences(f, folder)), text


def test_star_import_needs_no_extras_and_exports_the_public_names():
    names = {}
    exec('from sadt_nb.all import *', names)
    for n in ('SAM', 'SADT', 'GradientCentralization', 'AGC', 'RepeatStep', 'METHODS', 'MODELS', 'DATASETS', 'TensorDL', 'CutMix', 'get_dls', 'Run', 'run', 'run_grid',
              'load_results', 'results_table', 'plot_runs', 'paper_grid', 'perturbed', 'replay', 'ExtraPass', 'ORDERS', 'kl_div', 'kd_loss', 'trainable_params',
              'global_norm', 'weight_noise', 'layer_noise', 'gradient_ascent', 'simple_cnn', 'vgg16_slim', 'inception_resnet_slim', 'sam_step', 'ASAM', 'asam_step',
              'ESAM', 'LookSAM', 'GSAM', 'gsam_step', 'SAF', 'MESA', 'resnet20', 'resnet18',
              'Distillation', 'born_again', 'Ensemble', 'logit_mse', 'Cutout', 'AutoAugment', 'CropFlip', 'resnet101', 'vgg16', 'wide_resnet_28_10', 'pyramidnet_110', 'vit',
              'hessian_trace', 'top_eigenvalues', 'spectral_density', 'sam_sharpness', 'average_sharpness', 'loss_line', 'loss_surface', 'FlatnessRecorder',
              'corrupted_accuracy', 'shifted_accuracy', 'effective_robustness', 'calibration_error', 'measure_run', 'Method', 'method_card', 'methods_table'):
        assert n in names, n


def test_version_and_typing_marker():
    assert re.fullmatch(r'\d+\.\d+\.\d+', sadt_nb.__version__) and sadt_nb.__version__ == version('sadt_nb')
    assert (LIB / 'py.typed').exists()
