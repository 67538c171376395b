"Public names explain themselves: every parameter has a type and a comment, `help` and `repr` show them."
import copy
import importlib
import inspect
import pickle
import pkgutil
import pydoc
import warnings

import pytest
import sadt_nb
import sadt_nb.all
from conftest import as_loader, batches, cnn, learner, mlp, needed
from fastai.callback.core import Callback
from sadt_nb.core.arguments import ShowsArguments, explain, parameter_comments, without_parameters
from sadt_nb.methods.registry import METHODS, make_method
from sadt_nb.methods.sadt import weight_noise

FOLDERS = ('core', 'methods', 'measures')
# arguments for the classes that need some
GIVEN = {
    'Checkpoint': ('x.pt',), 'Distillation': (None,), 'PartialEpochs': (1.5,), 'TrajectoryLoss': (1., 1., 0),
    'RestartEveryEpoch': (.1,), 'weight_noise': (.1,), 'layer_noise': ('a', .1), 'gradient_ascent': (.1, .1),
    'normalized_ascent': (.1,), 'KeepReleased': (32,)}


def public():
    "Return all public functions and classes by their full name."
    found = {}
    for info in pkgutil.walk_packages(sadt_nb.__path__, 'sadt_nb.'):
        try: module = importlib.import_module(info.name)
        except ImportError as e:
            if 'pip install sadt_nb[' not in str(e): raise
            continue # a module for a package that is not installed
        for name in getattr(module, '__all__', ()):
            obj = getattr(module, name, None)
            if callable(obj) and getattr(obj, '__module__', None) == info.name:
                found[f'{info.name}.{name}'] = obj
    return found


PUBLIC = public()
CLASSES = {n.rpartition('.')[2]: c for n, c in PUBLIC.items()
           if inspect.isclass(c) and issubclass(c, ShowsArguments)}


def is_checked(name, obj):
    "Return whether a name belongs to core, methods or measures, or to those of `sadt_nb.all`."
    return name.split('.')[1] in FOLDERS or getattr(sadt_nb.all, obj.__name__, None) is obj


def functions(cls):
    "Return the public functions of a class that no base class has, and its `__init__` and `__call__`."
    found = {}
    for name, f in vars(cls).items():
        f = getattr(f, '__func__', f) # of a class method
        if not inspect.isfunction(f) or f.__qualname__ != f'{cls.__qualname__}.{name}': continue
        inherited = any(hasattr(base, name) for base in cls.__mro__[1:-1])
        if name == '__init__' or name == '__call__' and not inherited: found[name] = f
        elif not name.startswith('_') and not inherited: found[name] = f
    return found


def gaps(f):
    "Return the parameters of a function that have no type, or no comment."
    about = parameter_comments(f)
    found = []
    for name, p in inspect.signature(f).parameters.items():
        if name in ('self', 'cls'): continue
        if p.annotation is p.empty: found.append(f'{name}: no type')
        if not about[name]: found.append(f'{name}: no comment')
    return found


def generated(cls): return hasattr(cls, '_fields') or hasattr(cls, '__dataclass_fields__')


def test_every_parameter_has_a_type_and_a_comment():
    missing = {}
    for name, obj in PUBLIC.items():
        if not is_checked(name, obj): continue
        fs = {'': obj} if not inspect.isclass(obj) else functions(obj)
        for method, f in fs.items():
            if method == '__init__' and generated(obj): continue
            if found := gaps(f): missing[f'{name}.{method}'] = found
    assert not missing, missing
    assert len(PUBLIC) > 200


def test_gaps_are_found():
    def untyped(
        a, # What it is
        b:int,
    ): ...
    assert gaps(untyped) == ['a: no type', 'b: no comment']


@pytest.mark.parametrize('name', CLASSES)
def test_help_explains_every_parameter(name):
    text = pydoc.plain(pydoc.render_doc(CLASSES[name])).replace(' |  ', '')
    init = CLASSES[name]._own_init()
    comments = {} if init is None else parameter_comments(CLASSES[name])
    comments.pop('self', None)
    if name in ('SAM', 'GSAM', 'SADT', 'AGC', 'MESA'): assert len(comments) > 2
    for parameter, comment in comments.items():
        assert f'\n    {parameter}: ' in text, f'{parameter} and its type'
        assert f'\n        {comment}\n' in text


@pytest.mark.parametrize('name', ['sam_step', 'esam_step', 'sadt_step', 'hessian_trace', 'MethodOptimizer'])
def test_help_of_functions_explains_every_parameter(name):
    text = pydoc.plain(pydoc.render_doc(getattr(sadt_nb.all, name)))
    comments = parameter_comments(getattr(sadt_nb.all, name))
    assert comments
    for name, comment in comments.items():
        if name != 'self': assert comment and comment in text


def test_every_callback_shows_its_arguments():
    shown = {n: c for n, c in PUBLIC.items() if inspect.isclass(c) and issubclass(c, Callback)}
    without = [n for n, c in shown.items() if not issubclass(c, ShowsArguments)]
    # no arguments; and fastai's mixed precision for one device
    assert {n.rpartition('.')[2] for n in without} <= {'SampleIds', 'StepGrads', 'DeviceMixedPrecision'}


@pytest.mark.parametrize('name', CLASSES)
def test_every_argument_is_in_repr(name):
    "An argument is kept under its own name, and a value other than the default is printed."
    cls = CLASSES[name]
    if cls._own_init() is None: return
    obj = cls(*GIVEN.get(name, ()))
    for parameter in inspect.signature(cls).parameters:
        assert parameter in vars(obj), parameter
        setattr(obj, parameter, 123456)
        assert f'{parameter}=123456' in repr(obj)


def test_repr_of_methods():
    make = sadt_nb.all
    assert repr(make.SAM()) == 'SAM()'
    assert repr(make.SAM(rho=.1)) == 'SAM(rho=0.1)'
    assert repr(make.SAM(.1, bn='keep')) == "SAM(rho=0.1, bn='keep')"
    assert repr(make.GSAM(lr_min=0)) == 'GSAM()', 'as a number, 0 is 0.'
    assert repr(make.GradientCentralization()) == 'GradientCentralization()'
    noisy = make.SADT(2, perturb=[weight_noise(.1)])
    assert repr(noisy) == 'SADT(variant=2, perturb=[weight_noise(std=0.1)])'
    assert repr(make.Distillation(mlp())) == 'Distillation(teacher=Sequential)'
    sam = make.SAM()
    sam.rho = .2
    assert repr(sam) == 'SAM(rho=0.2)', 'the present value'


@pytest.mark.parametrize('name', METHODS)
def test_repr_survives_copies_and_stands_in_fastais_lists(name, capsys):
    cbs = make_method(name, **needed(name))
    if not cbs: return
    cb = cbs[0]
    text = repr(cb)
    assert text.startswith(f'{type(cb).__name__}(')
    if name != 'distillation': # whose teacher is left out
        assert repr(pickle.loads(pickle.dumps(cb))) == text
        assert repr(copy.deepcopy(cb)) == text
        eval(text, {**vars(sadt_nb.all)})
    learn = learner(cnn(bn=False), cbs, as_loader(batches(conv=True)))
    learn.show_training_loop()
    assert text in capsys.readouterr().out
    with warnings.catch_warnings():
        warnings.simplefilter('ignore') # one epoch is too short for some methods
        learn.fit(1)
    assert repr(cb) == text


def test_explain_adds_to_a_docstring_once():
    def f(
        x:int|None=None, # A whole number
    ):
        """Return nothing.

        More text."""
    explain(f)
    explain(f)
    own = 'Return nothing.\n\nMore text.'
    assert f.__doc__ == own + '\n\nParameters\n    x: int | None = None\n        A whole number'
    assert without_parameters(f.__doc__) == own
    assert explain(len) is len, 'a function without source stays as it is'


def test_a_users_subclass_is_explained():
    class Steep(sadt_nb.all.SAM):
        "SAM with a default of its own."
        def __init__(self,
            rho:float=.5, # Radius
        ): super().__init__(rho)
    assert repr(Steep()) == 'Steep()' and repr(Steep(.1)) == 'Steep(rho=0.1)'
    assert 'Radius' in Steep.__doc__
    class Plain(Callback): run_valid = False
    assert repr(Plain()) == 'Plain'


# The values that a paper gives for its method, each with its source
PUBLISHED_DEFAULTS = {
    'SAM': dict(rho=.05), # Foret et al. 2021, appendix C.1
    'ASAM': dict(rho=.5, eta=.01), # Kwon et al. 2021, section 5.1
    'ESAM': dict(beta=.6, gamma=.5), # Du et al. 2022, table 5
    'LookSAM': dict(k=5, alpha=.7), # Liu et al. 2022, section 5
    'GSAM': dict(alpha=.4), # Zhuang et al. 2022, appendix, ViT-B/32
    'FriendlySAM': dict(sigma=1., decay=.9), # Li et al. 2024, section 5.1
    'WSAM': dict(gamma=.9), # Yue et al. 2023, section 5
    'SAF': dict(lam=.3, tau=5., lag=3, start_epoch=5), # Du et al. 2022, section 4.1
    'MESA': dict(lam=.8, tau=5., beta=.9995, start_epoch=5), # the same, and table 4
    'AGC': dict(clip=.01, eps=1e-3), # Brock et al. 2021, section 4.1
    'Distillation': dict(alpha=.5, temperature=4.), # the middle alpha of Pham et al. 2022; Zhang et al. 2019
    'SADT': dict(variant=1, kl_weight=1., noise_scale=1.), # Fahim and Boutellier 2022, section 3.1
    'CutMix': dict(alpha=.25), # the SADT code
    'ResizedCrop': dict(smallest=.08), # Szegedy et al. 2015, section 6
    'Cutout': dict(size=16), # DeVries and Taylor 2017, CIFAR-10
    'CropFlip': dict(pad=4), # He et al. 2016, section 4.2
    'KerasAdam': dict(lr=1e-3, betas=(.9, .999), eps=1e-7), # Keras
    'Lookahead': dict(every=5, decay=.95), # Jordan 2024
    'calibration_error': dict(bins=15), # Guo et al. 2017, section 5
}


def defaults(f):
    "Return the values of arguments that are left out; some have the value of the reading `paper`."
    found = {n: p.default for n, p in inspect.signature(f).parameters.items() if p.default is not p.empty}
    return found | getattr(f, 'readings', {}).get('paper', {})


@pytest.mark.parametrize('name', PUBLISHED_DEFAULTS)
def test_published_values_are_the_defaults(name):
    f, = [obj for full, obj in PUBLIC.items() if full.rpartition('.')[2] == name]
    assert defaults(f).items() >= PUBLISHED_DEFAULTS[name].items()


def test_functions_of_a_step_have_the_defaults_of_the_callback():
    "Options of other names: GSAM has two radii, and `sadt_step` reads the paper without a `spec`."
    classes = {name.lower(): obj for name, obj in CLASSES.items()}
    compared = 0
    for full, f in PUBLIC.items():
        name = full.rpartition('.')[2]
        if not name.endswith('_step') or name.removesuffix('_step') not in classes: continue
        of_callback = defaults(classes[name.removesuffix('_step')])
        if name == 'gsam_step': of_callback['rho'] = of_callback['rho_max']
        for option, value in defaults(f).items():
            if option not in of_callback or name == 'sadt_step': continue
            assert value == of_callback[option], f'{name}: {option}'
            compared += 1
    assert compared > 15
