"""The benchmark of SAF with the records of a whole data set, on small numbers."""
import json
import sys

import pytest
import torch
from sadt_nb.methods.saf import SAF

throughput = pytest.importorskip('benchmarks.throughput')
step_cost = pytest.importorskip('benchmarks.step_cost')

CPU = torch.device('cpu')
TINY = dict(cifar10=(60, 10), imagenet=(300, 7))


@pytest.fixture(autouse=True)
def small(monkeypatch): monkeypatch.setattr(throughput, 'RECORDS', TINY)


def test_each_step_writes_the_records_of_other_samples():
    step, learn = step_cost.stepper(*step_cost.CASES['saf'], 'resnet20', 4, CPU, 10, samples=10)
    saf = next(cb for cb in learn.cbs if isinstance(cb, SAF))
    written = []
    for _ in range(3):
        step()
        written.append((saf.records.written[0] == 0).sum().item())
    assert written == [4, 8, 8] # two whole batches; then the first one again
    assert saf.records.logits.shape == (3, 10, 10)


def test_without_samples_there_is_one_batch():
    step, learn = step_cost.stepper(*step_cost.CASES['saf'], 'resnet20', 4, CPU)
    for _ in range(2): step()
    assert learn.sample_ids.ids.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize('data', TINY)
def test_the_command_prints_and_stores_images_per_second(data, tmp_path, monkeypatch, capsys):
    out = tmp_path / 'speeds.json'
    args = ['--part', 'records', '--records', data, '--model', 'resnet20', '--bs', '2', '--repeats', '1']
    monkeypatch.setattr(sys, 'argv', ['throughput', *args, '--device', 'cpu', '--out', str(out)])
    monkeypatch.setattr(throughput, 'keep_pages', lambda: None)
    throughput.main()
    samples, classes = TINY[data]
    line = capsys.readouterr().out
    assert f'records of {samples} x {classes}' in line
    stored = json.loads(out.read_text())['records']
    assert stored['record_bytes'] == 3 * samples * (2 * classes + 2)
    for method, speed in stored['images_per_second'].items(): assert f'{method} {speed:,.0f} (' in line
    assert set(stored['images_per_second']) == {'baseline', 'sam', 'saf'}
