"A grid on a Ray cluster: when processes or machines die, its runs continue and end with the same bits."
import json
import os
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from sadt_nb.experiments import grid
from sadt_nb.experiments.grid import run_grid
from sadt_nb.experiments.run_folder import RunDiverged, RunError, read_result
from sadt_nb.experiments.runner import run
from test_resume import of, outcome, quiet, same, wait_for

psutil = pytest.importorskip('psutil', reason='psutil is not installed')


@pytest.fixture(scope='module')
def cluster():
    "Start Ray in up to three attempts: a busy machine may exceed the thirty seconds of its own processes."
    ray = pytest.importorskip('ray', reason='the cluster needs pip install sadt_nb[ray]')
    os.environ.setdefault('RAY_USAGE_STATS_ENABLED', '0')
    for attempts_left in (2, 1, 0):
        try:
            ray.init(address='local', num_cpus=2, include_dashboard=False, log_to_driver=False,
                     logging_level='ERROR')
            break
        except Exception:
            ray.shutdown()
            if not attempts_left: raise
    yield ray
    ray.shutdown()


def command_of(process):
    try: return ' '.join(process.cmdline())
    except psutil.Error: return '' # it has just ended


def training():
    "Return the processes that train a run of the grid."
    return [p for p in psutil.Process().children(recursive=True) if '_remote_job' in command_of(p)]


def in_background(*args, **kwargs):
    "Start `run_grid` in a thread; return the thread and the list that gets the results."
    out = []
    def target(): out.extend(run_grid(*args, **kwargs, **quiet))
    t = threading.Thread(target=target, daemon=True)
    t.start()
    return t, out


def all_have_two_checkpoints(runs, root):
    return all((root / r.name / 'checkpoint.pt.previous').exists() for r in runs)


def assert_same_as_uninterrupted(runs, tmp_path):
    for r in runs:
        run(r, tmp_path / 'whole', **quiet)
        assert same(outcome(r, tmp_path / 'cut'), outcome(r, tmp_path / 'whole'))


@pytest.mark.slow
def test_a_process_dies_in_mid_run(cluster, one_thread, tmp_path):
    runs = [of('sadt1').but(epochs=20, n_train=120, seed=s) for s in range(2)]
    t, out = in_background(runs, tmp_path / 'cut', 2, ray='auto')
    wait_for(lambda: all_have_two_checkpoints(runs, tmp_path / 'cut'))
    victims = training()
    assert len(victims) == 2
    victims[0].kill()
    t.join(300)
    assert [r['status'] for r in out] == ['finished'] * 2
    resumed = sorted(r['resumed'] > 0 for r in out)
    assert resumed == [False, True], 'the killed run resumes, and the other is not interrupted'
    assert_same_as_uninterrupted(runs, tmp_path)
    assert cluster.is_initialized(), 'a connection that was open before stays open'


@pytest.mark.slow
def test_a_process_dies_every_time(cluster, tmp_path):
    cfg = of('sam').but(epochs=400)
    t, out = in_background([cfg], tmp_path, ray='auto', attempts=2)
    killed = set()
    while t.is_alive():
        for p in training():
            if p.pid not in killed and (tmp_path / cfg.name / 'history.json').exists():
                p.kill()
                killed.add(p.pid)
        time.sleep(.2)
    assert len(killed) == 2
    assert isinstance(out[0], RunError)
    assert 'was killed 2 times' in str(out[0])


@pytest.mark.slow
def test_failed_runs_missing_teachers_and_machines_with_other_code(cluster, monkeypatch, tmp_path):
    diverging = of('baseline').but(opt='sgd', lr=1e12, sched='constant')
    student = of('distillation')
    out = run_grid([diverging, student], tmp_path, 2, ray='auto', **quiet)
    assert type(out[0]) is RunDiverged
    assert 'the loss became NaN or infinite' in str(out[0])
    assert 'Traceback' not in str(out[0])
    assert out[1]['status'] == 'finished'
    assert read_result(student.teachers[0], tmp_path)['started'] <= out[1]['started']
    with monkeypatch.context() as m:
        m.setattr(grid, 'code_version', lambda: dict(source='0123456789ab'))
        error, = run_grid([of('sam')], tmp_path, ray='auto', **quiet)
        assert 'has other code of sadt_nb' in str(error)
        assert read_result(of('sam'), tmp_path) is None
    with monkeypatch.context() as m:
        m.setattr(grid, 'read_result', lambda cfg, root: None)
        error, = run_grid([of('sam')], tmp_path, ray='auto', **quiet)
        assert 'all machines must share that folder' in str(error)


@pytest.mark.slow
def test_control_c_reaches_the_cluster(cluster, monkeypatch, tmp_path):
    cfg = of('sam').but(epochs=60)
    folder = tmp_path / cfg.name
    real = grid.wait
    def wait(*args, **kwargs):
        if (folder / 'checkpoint.pt').exists(): raise KeyboardInterrupt()
        time.sleep(.1)
        return real(*args, **kwargs)
    with monkeypatch.context() as m:
        m.setattr(grid, 'wait', wait)
        with pytest.raises(KeyboardInterrupt): run_grid([cfg], tmp_path, ray='auto', **quiet)
    wait_for(lambda: not training())
    result = folder / 'result.json'
    if result.exists(): assert json.loads(result.read_text())['status'] == 'interrupted'
    assert run(cfg, tmp_path, **quiet)['resumed'] > 0, 'the same command continues the run'


def test_shares_of_machines():
    share = grid._shares
    assert share([dict(CPU=16.)], 4) == (4, 0)
    assert share([dict(CPU=16.), dict(CPU=8.)], 1) == (16, 0), 'a job uses one machine only'
    assert share([dict(CPU=2.)], 5) == (1, 0), 'with more jobs than cores, some jobs wait'
    assert share([dict(CPU=16., GPU=1.)], 4) == (4, .25)
    assert share([dict(CPU=16., GPU=4.)], 4) == (4, 1)
    assert share([dict(CPU=16., GPU=8.)], 2) == (8, 1)
    assert share([dict(CPU=16., GPU=2.), dict(CPU=16., GPU=1.)], 4) == (8, .5), 'a job uses one GPU only'


def test_no_ray_no_cluster(monkeypatch, tmp_path, capsys):
    with monkeypatch.context() as m:
        m.setitem(sys.modules, 'ray', None)
        with pytest.raises(ImportError, match=r'pip install sadt_nb\[ray\]'):
            run_grid([of('sam')], tmp_path, ray='auto', **quiet)
    ray = pytest.importorskip('ray', reason='the cluster needs pip install sadt_nb[ray]')
    monkeypatch.setattr(ray, 'is_initialized', lambda: False) # the cluster of the other tests may be running
    with pytest.raises(RunError, match='no Ray cluster at .127.0.0.1:1.'):
        run_grid([of('sam')], tmp_path, ray='127.0.0.1:1', **quiet)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_machine_dies(tmp_path, one_thread):
    ray = pytest.importorskip('ray', reason='the cluster needs pip install sadt_nb[ray]')
    from ray.cluster_utils import Cluster
    if ray.is_initialized(): ray.shutdown()
    machines = Cluster(initialize_head=True, head_node_args=dict(num_cpus=0))
    try:
        nodes = [machines.add_node(num_cpus=1) for _ in range(2)]
        ray.init(address=machines.address, log_to_driver=False, logging_level='ERROR')
        runs = [of('sadt1').but(epochs=30, n_train=120, seed=s) for s in range(2)]
        t, out = in_background(runs, tmp_path / 'cut', 2, ray='auto')
        wait_for(lambda: all_have_two_checkpoints(runs, tmp_path / 'cut'))
        machines.remove_node(nodes[0], allow_graceful=False)
        t.join(400)
        assert [r['status'] for r in out] == ['finished'] * 2
        assert sum(r['resumed'] > 0 for r in out) == 1
        assert_same_as_uninterrupted(runs, tmp_path)
    finally:
        ray.shutdown()
        machines.shutdown()


@pytest.mark.parametrize('before', [False, True])
def test_only_a_connection_of_our_own_is_closed(before, monkeypatch):
    calls = []
    ray = SimpleNamespace(is_initialized=lambda: before, init=lambda *a, **k: calls.append('init'),
                          shutdown=lambda: calls.append('shutdown'))
    monkeypatch.setitem(sys.modules, 'ray', ray)
    with grid._cluster('auto') as found: assert found is ray
    assert calls == ([] if before else ['init', 'shutdown'])
