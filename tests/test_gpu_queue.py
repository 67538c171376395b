"""The queue `benchmarks/gpu.sh` with a `python` that trains nothing.

This `python` is the real one, but it finds stubs of torch, pytest, the library and the benchmarks. The stubs
write down how they were called. The packing of results is the real one."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import sadt_nb
from sadt_nb.papers.grids import paper_ensembles, paper_grid

ROOT = Path(sadt_nb.__file__).parents[1]
SCRIPT = ROOT / 'benchmarks' / 'gpu.sh'
pytestmark = [
    pytest.mark.skipif(not SCRIPT.is_file(), reason='only a checkout has the benchmarks'),
    pytest.mark.skipif(not all(map(shutil.which, ('bash', 'timeout'))), reason='needs bash and timeout')]

SETTINGS = ('MINUTES', 'RUNS', 'BEFORE', 'AMP', 'FAIL', 'SLOW', 'NO_GPU', 'SECONDS')

# The environment names one call that fails (FAIL), or one that takes a minute (SLOW)
STUB = '''
import os, sys, time

def called(*words):
    call = ' '.join(map(str, words))
    with open(os.environ['CALLS'], 'a') as f: f.write(call + '\\n')
    return call

def end(call):
    if call == os.environ.get('SLOW'): time.sleep(60)
    if call == os.environ.get('FAIL'): sys.exit(3)
'''
STUBS = {
    'stub': STUB,
    'torch': 'import os\nclass cuda:\n    def is_available(): return "NO_GPU" not in os.environ\n',
    'pytest': 'import stub\nif __name__ == "__main__": stub.end(stub.called("tests"))\n',
    'sadt_nb.data.datasets': 'import stub\ndef load_data(name): stub.called("decode", name)\n',
    'sadt_nb.commands.cli': '''
import argparse, json, os, pathlib, stub

def sadt_grid():
    p = argparse.ArgumentParser()
    p.add_argument('name')
    for option in ('root', 'workers', 'minutes', 'only', 'amp'): p.add_argument('--' + option)
    a = p.parse_args()
    call = ' '.join(filter(None, ['grid', a.name, a.only, a.amp]))
    with open(os.environ['CALLS'] + '.grids', 'a') as f:
        f.write(json.dumps([a.name, a.only or '', a.amp or '', int(a.workers)]) + '\\n')
    finished = pathlib.Path(a.root, 'run', 'result.json')
    stub.called(call, '' if not finished.exists() else '(one run is finished)')
    if not finished.exists():
        finished.parent.mkdir(parents=True)
        (finished.parent / 'config.json').write_text('{}')
        finished.write_text('{"status": "finished", "table": "%s"}' % a.name)
    ensemble = pathlib.Path(a.root, 'ensembles', '0123456789ab.json')
    if a.name.endswith('_rounds') and not ensemble.exists():
        ensemble.parent.mkdir()
        ensemble.write_text('{"accuracy": 0.5}')
    stub.end(call)
''',
    'benchmarks.fast': '''
import json, pathlib, stub, sys

part, file = (sys.argv[sys.argv.index(o) + 1] for o in ('--part', '--out'))
call = stub.called('fastbench', part)
old = json.loads(pathlib.Path(file).read_text()) if pathlib.Path(file).exists() else {}
stub.end(call)
pathlib.Path(file).write_text(json.dumps({**old, part: {}}, indent=1))
''',
    'benchmarks.throughput': 'import stub\nstub.end(stub.called("overhead"))\n',
    'benchmarks.table1': 'import stub\nstub.end(stub.called("table1"))\n',
}


@pytest.fixture
def queue(tmp_path):
    """Return a function that runs the queue.

    It returns status, calls in their order, preset, words, precision and workers of each grid, and what was
    printed."""
    modules, programs = tmp_path / 'modules', tmp_path / 'programs'
    for name, text in STUBS.items():
        file = modules.joinpath(*name.split('.')).with_suffix('.py')
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    shutil.copy(SCRIPT.with_name('pack_runs.py'), modules / 'benchmarks')
    programs.mkdir()
    # -S, -P: neither the installed packages nor the checkout
    start = f'#!/bin/sh\nPYTHONPATH="{modules}" exec "{sys.executable}" -S -P "$@"\n'
    for name, text in (('python', start), ('nvidia-cuda-mps-control', '#!/bin/sh\nexit 1\n')):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    (tmp_path / 'images').mkdir()

    def run_queue(*args, out='out', done=None, **settings):
        "Run the queue with `args` behind OUT; `done` is written to its done.txt first."
        calls = tmp_path / 'calls.txt'
        calls.write_text('')
        grids = tmp_path / 'calls.txt.grids'
        grids.write_text('')
        plain = {k: v for k, v in os.environ.items() if k not in SETTINGS}
        own = dict(PATH=f'{programs}:{os.environ["PATH"]}', SADT_DATA=str(tmp_path / 'images'),
                   CALLS=str(calls), PYTHONDONTWRITEBYTECODE='1')
        env = plain | own | settings
        if out is not None: args = (str(tmp_path / out), *args)
        if done is not None:
            (tmp_path / out).mkdir(exist_ok=True)
            (tmp_path / out / 'done.txt').write_text(''.join(f'{job}\n' for job in done))
        ended = subprocess.run(['bash', str(SCRIPT), *args], env=env, capture_output=True, text=True,
                               timeout=300)
        found = [line.strip() for line in calls.read_text().splitlines()]
        trained = [json.loads(line) for line in grids.read_text().splitlines()]
        return SimpleNamespace(status=ended.returncode, calls=found, grids=trained,
                               said=ended.stdout + ended.stderr)
    run_queue.folder = tmp_path
    return run_queue


def done_in(out): return (out / 'done.txt').read_text().split()


def tables_in(pack, into):
    "Return the tables whose finished runs a packed file holds."
    subprocess.run([sys.executable, str(SCRIPT.with_name('pack_runs.py')), 'unpack', str(pack), str(into)],
                   check=True, capture_output=True)
    return [json.loads(f.read_text())['table'] for f in into.glob('*/result.json')]


JOBS = {
    'tests': ['tests'],
    'fast': ['grid fast/94'],
    'noise': ['grid fast/94_noise40'],
    'small': ['grid fast/small'],
    'quarter': ['grid fast/quarter_noise40'],
    'rounds': ['grid fast/94_rounds'],
    'fastbench': [f'fastbench {part}' for part in ('overhead', 'loader', 'methods', 'seconds')],
    'full': ['grid sadt/table1 cifar10 simple_cnn 2048 bf16'],
    'overhead': ['overhead'],
    'controls': ['grid sadt/table1_controls cifar10 bf16 (one run is finished)'], # in the folder of `full`
    'seeds': ['grid sadt/table1_seeds bf16 (one run is finished)'],
    'table1_rest': ['grid sadt/table1 cifar10 bf16 (one run is finished)'],
    'fast96': ['grid fast/96'],
    'table1': ['table1'],
    'sam_study': ['grid sam_study/a_code fp16', 'grid sam_study/c_code fp16'],
    'saf_table3': ['grid saf/table3_code cifar10 resnet18 fp16'],
    'saf_paper': ['grid saf/table3 cifar10 resnet18 fp16'],
    'distill': ['grid distill/table2 resnet18 0.5 fp16'],
}
PACKS = {'fast_94': 'fast/94', 'fast_94_noise40': 'fast/94_noise40', 'fast_small': 'fast/small',
         'fast_quarter_noise40': 'fast/quarter_noise40',
         'fast_94_rounds': 'fast/94_rounds', 'saf_table3_paper': 'saf/table3',
         'distill_table2': 'distill/table2',
         'table1_bf16': 'sadt/table1', 'fast_96': 'fast/96', 'sam_study_a_code': 'sam_study/a_code',
         'sam_study_c_code': 'sam_study/c_code', 'saf_table3_code': 'saf/table3_code'}


def all_but(*jobs): return [job for job in JOBS if job not in jobs]


def test_all_jobs_run_once_and_in_order(queue):
    first = queue(AMP='fp16', RUNS=str(queue.folder / 'runs'))
    assert first.status == 0, first.said
    assert first.calls == ['decode cifar10', *(call for calls in JOBS.values() for call in calls)]
    out = queue.folder / 'out'
    assert done_in(out) == [*JOBS]
    packs = sorted(f.name.removesuffix('.tar.gz') for f in out.glob('*.tar.gz'))
    assert packs == sorted(PACKS) == sorted(f.name for f in (queue.folder / 'runs').iterdir())
    assert tables_in(out / 'fast_94_noise40.tar.gz', queue.folder / 'one') == ['fast/94_noise40']
    tables_in(out / 'fast_94_rounds.tar.gz', queue.folder / 'chains')
    assert (queue.folder / 'chains' / 'ensembles' / '0123456789ab.json').is_file(), 'the pack has ensembles'
    assert queue(AMP='fp16').calls == ['decode cifar10'] # everything is done
    assert queue('overhead').calls[1:] == ['overhead'] # a job that is named is done again
    assert done_in(out) == [*JOBS], 'a job is written down once'


def test_every_grid_of_the_queue_has_rows(queue):
    "`paper_grid` refuses an unknown preset, and words that no row has."
    grids = queue(AMP='bf16').grids
    assert len(grids) == sum(call.startswith('grid') for calls in JOBS.values() for call in calls)
    for name, only, amp, workers in grids:
        rows = paper_grid(name, amp=amp, only=only)
        assert 1 < workers <= len({c.run for c in rows}), (name, only)


def test_done_jobs_are_left_out(queue):
    ended = queue(done=all_but('small', 'table1'))
    assert ended.calls[1:] == ['grid fast/small', 'table1']
    assert set(done_in(queue.folder / 'out')) == {*JOBS}


def test_the_time_limit_stops_the_queue_and_a_later_call_goes_on(queue):
    runs = str(queue.folder / 'runs')
    done = all_but('fast', 'small', 'overhead')
    stopped = queue(done=done, MINUTES='.05', SLOW='grid fast/94', RUNS=runs)
    assert stopped.calls[1:] == ['grid fast/94']
    assert stopped.status == 0, stopped.said
    assert 'fast was interrupted' in stopped.said
    assert 'KeyboardInterrupt' in stopped.said, 'the run can store a checkpoint'
    assert 'the time is over; small' in stopped.said
    out = queue.folder / 'out'
    assert done_in(out) == done
    assert tables_in(out / 'fast_94.tar.gz', queue.folder / 'one') == ['fast/94'], 'what was finished by then'

    shutil.rmtree(runs) # as on another machine: only OUT is left
    later = queue(MINUTES='9', RUNS=runs)
    assert later.calls[1:] == ['grid fast/94 (one run is finished)', 'grid fast/small', 'overhead']
    assert done_in(out) == [*done, 'fast', 'small', 'overhead']


def test_what_an_earlier_folder_has_is_not_done_again(queue):
    before = queue.folder / 'before'
    first = queue(out='before', done=all_but('fast', 'fastbench'), FAIL='fastbench methods')
    assert first.status == 1
    assert first.calls[1:] == ['grid fast/94', 'fastbench overhead', 'fastbench loader', 'fastbench methods']
    (before / 'done.txt').write_text('\n'.join(all_but('fast', 'fastbench')) + '\n')
    kept = (before / 'done.txt').read_bytes()
    later = queue(out='new', BEFORE=str(before))
    assert later.calls[1:] == ['grid fast/94 (one run is finished)', 'fastbench methods', 'fastbench seconds']
    assert set(done_in(queue.folder / 'new')) == {*JOBS}
    assert tables_in(queue.folder / 'new' / 'fast_94.tar.gz', queue.folder / 'one') == ['fast/94']
    assert (before / 'done.txt').read_bytes() == kept, 'the earlier folder is only read'


@pytest.mark.parametrize('fails, job', [('grid fast/94', 'fast'), ('overhead', 'overhead'),
                                        ('grid sam_study/a_code', 'sam_study'), ('tests', 'tests')])
def test_a_job_that_fails_keeps_no_other_from_its_results(fails, job, queue):
    others = ('fast', 'overhead', 'sam_study', 'tests', 'small')
    ended = queue(done=all_but(*others), FAIL=fails)
    assert ended.status == 1
    assert f'failed: {job}\n' in ended.said
    assert ended.calls[1:] == ['tests', 'grid fast/94', 'grid fast/small', 'overhead',
                               'grid sam_study/a_code', 'grid sam_study/c_code']
    out = queue.folder / 'out'
    assert set(done_in(out)) == {*JOBS} - {job}
    packs = {f.name.removesuffix('.tar.gz') for f in out.glob('*.tar.gz')}
    assert packs == {'fast_94', 'fast_small', 'sam_study_a_code', 'sam_study_c_code'}
    again = queue()
    assert again.status == 0
    assert set(call.removesuffix(' (one run is finished)') for call in again.calls[1:]) >= {fails}
    assert done_in(out)[-1] == job


REFUSED = { # the message: arguments and settings
    'unknown job fats; the jobs are: tests fast noise small': (['fast', 'fats'], {}),
    'MINUTES must be a positive number, got 0': ([], dict(MINUTES='0')),
    'MINUTES must be a positive number, got -1': ([], dict(MINUTES='-1')),
    'MINUTES must be a positive number, got soon': ([], dict(MINUTES='soon')),
    'BEFORE must be a folder, got /nowhere': ([], dict(BEFORE='/nowhere')),
    'SADT_DATA: set it to cifar10.tgz or a folder': ([], dict(SADT_DATA='')),
    'no GPU that torch can use': ([], dict(NO_GPU='1')),
}


@pytest.mark.parametrize('message', REFUSED)
def test_what_cannot_run_is_refused_before_the_first_job(message, queue):
    args, settings = REFUSED[message]
    ended = queue(*args, **settings)
    assert ended.status in (1, 2)
    assert message in ended.said
    assert ended.calls == []


def table_rows(text):
    "Return the rows of the table of jobs: name, minutes, claims, claims a minute, and what the job is."
    return re.findall(r'^ {2}(\w+) +([\d.]+) [EM] +([\d-]+) +([\d.-]+) {2,}(.*)$', text, flags=re.M)


def test_without_arguments_the_queue_prints_its_table(queue):
    "The jobs stand in the order of the queue, most claims a minute first, with the numbers of their presets."
    ended = queue(out=None)
    assert ended.status == 2
    assert ended.calls == []
    rows = table_rows(ended.said)
    assert [name for name, *_ in rows] == [*JOBS]
    rates = []
    for name, minutes, claims, rate, what in rows[1:]:
        exact = int(claims) / float(minutes)
        assert float(rate) == pytest.approx(exact, abs=.05 if exact > .05 else .005), name
        rates.append(exact)
    assert rates == sorted(rates, reverse=True)
    about = {name: (int(claims), what) for name, _, claims, _, what in rows[1:]}
    grids = dict(fast='fast/94', noise='fast/94_noise40', small='fast/small', quarter='fast/quarter_noise40',
                 fast96='fast/96')
    for name, table in grids.items():
        cells = paper_grid(table)
        claims, what = about[name]
        assert f'grid {table}, {len(cells)} runs' in what
        labels = {c.label.rpartition(' · seed')[0] for c in cells}
        assert claims == len(labels - {'baseline'})
    a, c = (len(paper_grid(f'sam_study/{part}_code')) for part in 'ac')
    assert f'{a} and {c} runs' in about['sam_study'][1]
    selected = dict(rounds='fast/94_rounds', controls='sadt/table1_controls', seeds='sadt/table1_seeds',
                    saf_table3='saf/table3_code', saf_paper='saf/table3', distill='distill/table2')
    words = dict(controls='cifar10', saf_table3='cifar10 resnet18', saf_paper='cifar10 resnet18',
                 distill='resnet18 0.5')
    for name, table in selected.items():
        cells = paper_grid(table, only=words.get(name, ''))
        claims, what = about[name]
        runs = {c.run for c in cells} | {t for c in cells for t in c.run.teachers}
        assert f'{len(runs)} runs' in what, name
        kinds = {c.label.partition(' · seed')[0] for c in cells}
        ensembles = {e.label.partition(' · seed')[0] for e in paper_ensembles(table)}
        compared = kinds | {e for e in ensembles if 'rounds' in e}
        plain = [kind for kind in compared if kind.startswith(('baseline', 'teacher'))]
        assert claims == len(compared) - len(plain), name
