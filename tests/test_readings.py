"The released notebook's reading of SADT, its choice of weights, noise tied to the rate, and the presets."
import math

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.learner import Learner
from sadt_nb.core.closures import MethodOptimizer
from sadt_nb.data.datasets import channel_statistics, get_dls
from sadt_nb.experiments.config import Run
from sadt_nb.experiments.learner import KeepReleased, make_learner
from sadt_nb.experiments.report import about_images, load_results
from sadt_nb.experiments.results import evaluate
from sadt_nb.experiments.runner import run
from sadt_nb.methods.sadt import SADT
from sadt_nb.models.inception_resnet import inception_resnet_slim
from sadt_nb.models.simple_cnn import simple_cnn
from sadt_nb.models.vgg import vgg16_slim
from sadt_nb.papers.grids import paper_grid
from sadt_nb.papers.pages import comparison
from torch import nn
from torch.nn import functional as F

quiet = dict(progress=False)


# Layers of Keras that hold arrays, with the number of arrays: BatchNorm has its two averages as well
ARRAYS = dict(conv=('weight', 'bias'), bn=('weight', 'bias', 'running_mean', 'running_var'))


def keras_order(inputs, output):
    "Return layers in the order of a functional model of Keras: by depth, then as first visited."
    depth, visited = {output: 0}, []
    def visit(layer):
        if layer not in visited: visited.append(layer)
        for before in inputs[layer]:
            if depth.get(before, -1) < depth[layer] + 1: depth[before] = depth[layer] + 1
            visit(before)
    visit(output)
    return sorted(visited, key=lambda layer: (-depth[layer], visited.index(layer)))


def inception_graph():
    "Return the graph of the released Inception-ResNet: for each layer, the layers that it takes."
    inputs, before = {'stem.conv': []}, 'stem.conv'
    def chain(start, *names):
        for name in names:
            inputs[name] = [start]
            start = name
        return start
    for i in (1, 2, 3):
        def named(*names, i=i): return [f'module{i}.{n}' for n in names]
        a = chain(before, *named('a.conv', 'a.bn', 'a.elu'))
        b = chain(before, *named('b.conv1', 'b.bn1', 'b.elu', 'b.conv2', 'b.bn2'))
        s = chain(before, *named('shortcut.conv', 'shortcut.bn', 'shortcut.elu2'))
        c = chain(before, *named('c.conv', 'c.bn', 'c.elu'))
        total, out, joined = named('add', 'elu', 'concatenate')
        inputs[total], inputs[out] = [s, b], [total]
        inputs[joined] = [a, out, c]
        before = chain(joined, *named('pool', 'dropout'))
    return inputs, chain(before, 'flatten')


def test_the_arrays_of_the_released_variant_2():
    "The notebook perturbs number 49 of `get_weights()` in Inception-ResNet, 53 in VGG and 7 in Simple CNN."
    names = []
    for layer in keras_order(*inception_graph()):
        kind = layer.split('.')[-1].rstrip('12')
        names += [f'{layer}.{array}' for array in ARRAYS.get(kind, ())]
    assert names[49] == inception_resnet_slim().code_array
    assert 'module2.b.bn2.bias' in dict(inception_resnet_slim().named_parameters())
    blocks = [(b, i) for b, n in ((1, 2), (2, 2), (3, 3), (4, 3), (5, 3)) for i in range(1, n + 1)]
    names = [f'block{b}_conv{i}.{k}.{array}' for b, i in blocks for k in ARRAYS for array in ARRAYS[k]]
    assert names[53] == vgg16_slim().code_array
    kinds = ['conv1', 'bn1', 'conv2', 'bn2']
    names = [f'{k}.{array}' for k in kinds for array in ARRAYS[k[:-1]]]
    assert names[7] == simple_cnn().code_array


SMALL = Run(n_train=96, bs=32, valid=0., split=0, opt='keras_adam', sched='restart', epochs=8, lr=1e-3,
            select='release', model_args=dict(dropout=0.))


def losses_and_weights(cfg):
    "Train, and return the Learner and, per epoch, the deciding loss, the weights and the other images."
    rows = []
    class Watch(KeepReleased):
        def after_epoch(self):
            net = self.learn.model.eval()
            x, y = self.learn.dls[2].dataset.x, self.learn.dls[2].dataset.y
            order = torch.randperm(360, generator=torch.Generator().manual_seed(0))
            last = order[:108][3 * 32:] # 108 is three tenths of 360; batches of 32, 32, 32 and 12
            with torch.no_grad():
                loss = F.cross_entropy(net(x[last].permute(0, 3, 1, 2) / 255), y[last])
            rows.append((loss.item(), {k: v.clone() for k, v in net.state_dict().items()}, order[109:]))
        def after_fit(self): pass
    learn = make_learner(cfg, 'cpu', [Watch(32)])
    learn.remove_cb(next(cb for cb in learn.cbs if type(cb) is KeepReleased))
    learn.fit(cfg.epochs)
    return learn, rows


def test_the_choice_of_the_release_by_hand(tmp_path):
    learn, rows = losses_and_weights(SMALL)
    losses = [loss for loss, *_ in rows]
    kept = max(i for i in range(3, 8) if losses[i] < min(losses[:i]))
    assert kept < 7, 'the last epoch must not be the best one'
    found = run(SMALL, tmp_path, **quiet)
    assert found['epoch_kept'] == kept + 1
    learn.model.load_state_dict(rows[kept][1])
    x, y, others = learn.dls[2].dataset.x, learn.dls[2].dataset.y, rows[0][2]
    with torch.no_grad(): right = learn.model(x[others].permute(0, 3, 1, 2) / 255).argmax(1) == y[others]
    assert len(others) == 360 - 108 - 1
    assert found['accuracy_others'] == pytest.approx(right.float().mean().item())
    assert found['accuracy'] == pytest.approx(evaluate(learn.model, learn.dls[2])['accuracy'])


def test_no_choice_before_the_fourth_epoch(tmp_path):
    assert run(SMALL.but(epochs=3), tmp_path, **quiet)['epoch_kept'] == 3
    last = run(SMALL.but(epochs=3, select='last'), tmp_path, **quiet)
    assert run(SMALL.but(epochs=3), tmp_path, **quiet)['accuracy'] == last['accuracy']


def test_the_code_reading_of_table_1():
    paper = {c.label: c for c in paper_grid('sadt/table1')}
    for c in paper_grid('sadt/table1_code'):
        r, p = c.run, paper[c.label].run
        assert (r.sched, r.valid, r.select, c.result) == ('restart', 0, 'release', 'accuracy_others')
        assert dict(r.model_args) == dict(init='keras', bottleneck=True)
        assert dict(r.method_args).get('spec') == ('code' if 'sadt' in r.method else None)
        assert (r.data, r.model, r.method, r.bs, r.epochs, r.lr, r.cutmix, r.opt) == (
            p.data, p.model, p.method, p.bs, p.epochs, p.lr, p.cutmix, p.opt)
        assert c.published == paper[c.label].published


class OneBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(400, 300)
    def forward(self, x): return self.dense(x)


def noise_at(lr, **options):
    "Return the standard deviation of the noise of variant 1 in a loop with this rate."
    torch.manual_seed(0)
    net = OneBatch()
    method = SADT(1, **options)
    opt = torch.optim.SGD(net.parameters(), lr=lr)
    steps = MethodOptimizer(method, opt, net)
    fns, _ = method.teachers()
    assert steps is not None
    delta = fns[0](dict(net.named_parameters()), {}, torch.Generator().manual_seed(0))
    return delta['dense.weight'].std().item()


@pytest.mark.parametrize('lr', [1e-4, 1e-2])
def test_sigma_is_the_rate_at_the_start(lr):
    assert noise_at(lr) == pytest.approx(1e-4, rel=.01)
    assert noise_at(lr, sigma='rate') == pytest.approx(lr, rel=.01)
    assert noise_at(lr, sigma='rate', noise_scale=3.) == pytest.approx(3 * lr, rel=.01)


def test_sigma_does_not_follow_the_schedule():
    "In a Learner with a cosine schedule the noise keeps the size of the first rate, also after a resumption."
    seen = []
    class Watched(SADT):
        def teachers(self):
            seen.append(self.noise_factor())
            return super().teachers()
    dls = get_dls('digits', bs=64, n_train=128, device='cpu')
    method = Watched(sigma='rate')
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), loss_func=nn.CrossEntropyLoss(),
                    lr=5e-3, cbs=method)
    with learn.no_bar(), learn.no_logging(): learn.fit_flat_cos(2, 5e-3)
    assert seen == pytest.approx([50] * len(seen))
    again = SADT(sigma='rate')
    again.load_state_dict(method.state_dict())
    assert again.rate == 5e-3


@pytest.mark.parametrize('trained_before', [False, True])
def test_sigma_is_the_rate_of_the_training_that_follows_a_search(trained_before, tmp_path):
    method = SADT(sigma='rate')
    dls = get_dls('digits', bs=64, n_train=128, device='cpu')
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), loss_func=nn.CrossEntropyLoss(),
                    lr=5e-3, cbs=method, path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        if trained_before: learn.fit(1)
        learn.lr_find(num_it=6, show_plot=False)
        learn.fit(1, 1e-2)
    assert method.rate == 1e-2


def test_sigma_of_a_resumed_training_survives_a_search(tmp_path):
    method = SADT(sigma='rate')
    method.load_state_dict(dict(rate=3e-3)) # from a training that began with this rate
    dls = get_dls('digits', bs=64, n_train=128, device='cpu')
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), loss_func=nn.CrossEntropyLoss(),
                    lr=5e-3, cbs=method, path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        learn.lr_find(num_it=6, show_plot=False)
        learn.fit(1, 1e-2)
    assert method.rate == 3e-3


def test_sigma_goes_with_the_paper_only():
    for wrong in (dict(spec='code'), dict(rho=.1), dict(perturb=[lambda *a: {}])):
        with pytest.raises(ValueError, match="sigma='rate'"): SADT(sigma='rate', **wrong)
    with pytest.raises(ValueError, match='`sigma` must be'): SADT(sigma='lr')


def test_cutout_hides_with_black_or_with_the_mean():
    plain = get_dls('digits', bs=64, device='cpu')
    mean = np.round(255 * np.array(channel_statistics(plain.train.dataset)[0]))
    for fill, colour in (('', [0, 0, 0]), ('mean', mean)):
        dls = get_dls('digits', bs=64, device='cpu', cutout=32, cutout_inside=True, cutout_fill=fill)
        assert np.allclose(255 * dls.train.one_batch()[0][:, :, 0, 0].numpy(), colour, atol=1e-3)
    with pytest.raises(ValueError, match='cutout_fill'): Run(cutout_fill='mean')
    with pytest.raises(ValueError, match='cutout_fill'): Run(cutout=8, cutout_fill='grey')
    assert Run(cutout=8).key != Run(cutout=8, cutout_fill='mean').key


def test_rounds_share_the_default_temperature():
    "Temperature 4 is the default, so its rounds are those of `distill/digits`."
    digits = {c.run for c in paper_grid('distill/digits')}
    by_t = {}
    for c in paper_grid('distill/digits_temperature'):
        temperature = dict(c.run.method_args).get('temperature', 4.)
        if 'round' in c.label: by_t.setdefault(temperature, set()).add(c.run)
    assert sorted(by_t) == [1, 2, 4, 8, 16]
    assert all(len(runs) == 2 * 5 * 3 for runs in by_t.values())
    assert by_t[4.] < digits
    assert not any(by_t[t] & digits for t in (1, 2, 8, 16))
    for runs in by_t.values():
        for r in runs:
            chain = [r, *r.teachers]
            temperatures = {dict(t.method_args).get('temperature', 4.) for t in chain if t.teachers}
            assert len(temperatures) == 1, 'all rounds of a chain have one temperature'


def test_a_table_shows_published_curvature_beside_ours():
    cells = paper_grid('distill/table4')
    rows = []
    for i, c in enumerate(cells[:2]):
        measures = dict(trace=dict(value=100. + i), eigenvalue=dict(value=5.)) if i else {}
        rows.append(dict(run=c.run, status='finished', accuracy=.9, accuracy_bn=.9, history=[],
                         measures=measures))
    shown = comparison('distill/table4', pd.DataFrame(rows)).set_index('row')
    assert list(shown['published trace']) == ['197.53', '205.79', '98.62', '271.71']
    assert list(shown['our trace']) == ['-', '101', '-', '-']
    assert list(shown['published eigenvalue']) == ['9.24', '11.2', '8.3', '12.873']
    assert list(shown['our eigenvalue']) == ['-', '5', '-', '-']


def test_published_values_of_self_distillation_that_were_wrong():
    one = {c.label: c for c in paper_grid('distill/table1')}
    two = {c.label: c for c in paper_grid('distill/table2')}
    for model, place in (('vit_s32', ''), ('vit_b32', '')):
        c = one[f'student · {model} · cifar10 · AutoAugment, Cutout']
        alpha = dict(c.run.method_args)['alpha']
        match = two[f'alpha {alpha}, round 1 · {model} · AutoAugment, Cutout · seed 0']
        assert (match.run, match.published) == (c.run, c.published), 'Table 1 repeats a value of Table 2'
    spread = two['alpha 0.5, round 1 · vit_b32 · AutoAugment, Cutout · seed 0'].spread
    assert math.isclose(spread, .0002)


def test_figure_4_has_both_halves():
    halves = {c.label.split(' · ')[2] for c in paper_grid('distill/figure4')}
    assert halves == {'crop and mirror', 'AutoAugment, Cutout'}
    assert all(c.measures == ('trace', 'eigenvalue') for c in paper_grid('distill/figure4'))


@pytest.mark.parametrize('table', ['compare/digits_sadt', 'compare/cifar_small_sadt'])
def test_the_readings_of_sadt_side_by_side(table):
    cells = paper_grid(table)
    seen = {}
    for c in cells: seen.setdefault(c.label.split(' · ')[0], []).append(c.run)
    for variant in (1, 2, 3):
        of_variant = [runs[0] for label, runs in seen.items() if label.startswith(f'sadt{variant}')]
        options = [dict(r.method_args) for r in of_variant]
        assert options == [{}, dict(grad_at='up'), dict(sigma='rate'), dict(spec='code')]
    assert len({len(runs) for runs in seen.values()}) == 1
    assert len({c.run.key for c in cells}) == len(cells)


def test_results_of_the_release_are_read_again(tmp_path):
    run(SMALL.but(epochs=4), tmp_path, **quiet)
    row = load_results(tmp_path).iloc[0]
    assert 0 <= row['accuracy_others'] <= 1


def test_the_text_on_images_is_that_of_the_stored_checksums():
    "All published runs on CIFAR-10 have one copy, or are older than checksums."
    stored = load_results('published')
    on_cifar = stored[[r.data == 'cifar10' for r in stored['run']]]
    found = {(f or {}).get('test_crc32') if isinstance(f, dict) else None for f in on_cifar['data_facts']}
    assert found == {'e9248f55', None}
    assert about_images(stored).count('checksum') == 1
    digits = stored[['digits' in r.data for r in stored['run']]]
    assert about_images(digits) == ''
    other = pd.DataFrame([dict(run=Run(data='cifar10'), data_facts=dict(test_crc32='00000000'))])
    assert 'nothing else is known' in about_images(other)
    assert 'JPEG' not in about_images(other)
    both = about_images(pd.concat([on_cifar.head(3), other]))
    assert 'The images of 3 runs are a copy of CIFAR-10 whose' in both
    assert 'The images of 1 run are' in both
