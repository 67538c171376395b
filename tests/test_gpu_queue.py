"The queue of GPU jobs, with a stub in place of Python: order, what is done, limits and failures."
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / 'benchmarks' / 'gpu.sh'
NEEDED = ('bash', 'timeout', 'awk', 'realpath')
pytestmark = [
    pytest.mark.skipif(not SCRIPT.is_file(), reason='only a checkout has the benchmarks'),
    pytest.mark.skipif(any(not shutil.which(name) for name in NEEDED), reason=f'needs {", ".join(NEEDED)}')]

# Writes its arguments to a log and fails, or sleeps, if they have the words that FAIL and SLEEP name.
# A pack is a file of one word: it shows whose results are kept.
STUB = '''#!/bin/sh
case "$*" in *cuda.is_available*) exit ${NO_GPU:-0};; *load_data*) exit 0;; esac
if [ "$1" = -c ]; then shift 2; echo "grid $*" >> "$LOG"; else echo "$*" >> "$LOG"; fi
case "$*" in
    *pack_runs\\ pack*) echo packed > "$5";;
    *) [ -z "$SLEEP" ] || case " $* " in *" $SLEEP "*) exec sleep 20;; esac
       [ -z "$FAIL" ] || case " $* " in *" $FAIL "*) exit 3;; esac;;
esac
exit 0
'''


@pytest.fixture
def queue(tmp_path):
    "Return a function that calls the script and returns its exit status, output and the calls of Python."
    (tmp_path / 'bin').mkdir()
    stub = tmp_path / 'bin' / 'python'
    stub.write_text(STUB)
    stub.chmod(0o755)
    (tmp_path / 'images').mkdir()
    log = tmp_path / 'log'

    def call(*jobs, out='out', **env):
        log.write_text('')
        own = dict(PATH=f'{tmp_path / "bin"}:{os.environ["PATH"]}', LOG=str(log),
                   SADT_DATA=str(tmp_path / 'images'))
        done = subprocess.run(['bash', str(SCRIPT), str(tmp_path / out), *jobs], env={**CLEAN, **own, **env},
                              capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout + done.stderr, log.read_text().splitlines()
    return call


CLEAN = {k: v for k, v in os.environ.items() if k not in ('MINUTES', 'RUNS', 'BEFORE', 'AMP', 'SADT_DATA')}
ORDER = re.search(r"^queue='(.*)'$", SCRIPT.read_text(), re.M)[1].split() if SCRIPT.is_file() else []


def done_in(tmp_path, out='out'):
    "Return the jobs that the script has noted as done."
    return (tmp_path / out / 'done.txt').read_text().split()


def started(output): return re.findall(r'^== (\w+), after', output, re.M)
def trained(calls): return [line.split()[1] for line in calls if line.startswith('grid ')]


def test_all_jobs_run_in_the_order_of_the_table(queue, tmp_path):
    "The first comment lists the jobs in this order; the SAM study and SAF begin with the authors' settings."
    status, output, calls = queue()
    assert status == 0, output
    header = re.findall(r'^#   (\w+) +[\d.]+ [EM] ', SCRIPT.read_text(), re.M)
    assert started(output) == done_in(tmp_path) == header == ORDER
    assert trained(calls) == [
        'fast/94', 'fast/94_noise40', 'fast/small', 'sadt/table1', 'sadt/table1', 'fast/96',
        'sam_study/a_code', 'sam_study/c_code', 'sam_study/a', 'sam_study/c', 'saf/table3_code', 'saf/table3']
    parts = [c.split()[3] for c in calls if 'benchmarks.fast ' in c]
    assert parts == ['overhead', 'loader', 'methods', 'seconds']


def test_what_is_done_is_not_done_again_unless_it_is_named(queue, tmp_path):
    (tmp_path / 'out').mkdir()
    others = [j for j in ORDER if j not in ('small', 'full')]
    (tmp_path / 'out' / 'done.txt').write_text('\n'.join(others) + '\n')
    status, output, calls = queue()
    assert status == 0
    assert started(output) == ['small', 'full']
    assert started(queue()[1]) == []
    assert started(queue('fast')[1]) == ['fast']
    assert sorted(done_in(tmp_path)) == sorted(ORDER), 'each job is noted once'


def test_an_unknown_job_is_refused_before_anything_runs(queue, tmp_path):
    status, output, calls = queue('fast', 'fats')
    assert status == 2
    assert 'unknown job fats; the jobs are: tests fast' in output
    assert calls == []


@pytest.mark.parametrize('minutes', ['0', '-1', 'soon'])
def test_minutes_must_be_positive(minutes, queue):
    status, output, calls = queue('fast', MINUTES=minutes)
    assert status == 2
    assert f'MINUTES must be a positive number, got {minutes}' in output
    assert calls == []


def test_without_a_gpu_nothing_runs(queue):
    status, output, calls = queue('fast', NO_GPU='1')
    assert (status, calls) == (2, [])
    assert 'no GPU' in output


def test_the_end_of_the_minutes_interrupts_and_a_later_call_goes_on(queue, tmp_path):
    "The second grid hangs until the time is over: its results are packed, and the third does not begin."
    names = [j for j in ORDER if j not in ('fast', 'noise40', 'small')]
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'done.txt').write_text('\n'.join(names) + '\n')
    status, output, calls = queue(MINUTES='.034', SLEEP='fast/94_noise40')
    assert status == 0
    assert started(output) == ['fast', 'noise40']
    assert 'noise40 was interrupted' in output
    assert 'small and what follows it are left for the next call' in output
    assert done_in(tmp_path) == [*names, 'fast']
    assert (tmp_path / 'out' / 'fast_94_noise40.tar.gz').is_file()
    status, output, calls = queue()
    assert started(output) == ['noise40', 'small']
    assert 'unpack' in calls[0] and 'fast_94_noise40.tar.gz' in calls[0], 'what was packed is read first'
    assert sorted(done_in(tmp_path)) == sorted(ORDER)


def test_a_failing_job_leaves_the_results_of_the_others(queue, tmp_path):
    status, output, calls = queue('fast', 'noise40', 'small', FAIL='fast/94_noise40')
    assert status == 1
    assert 'failed: noise40' in output
    assert done_in(tmp_path) == ['fast', 'small']
    for folder in ('fast_94', 'fast_94_noise40', 'fast_small'):
        assert (tmp_path / 'out' / f'{folder}.tar.gz').is_file()


def test_an_earlier_folder_is_read(queue, tmp_path):
    queue('fast', out='earlier')
    (tmp_path / 'earlier' / 'fast.json').write_text('{\n "overhead": 1\n}')
    (tmp_path / 'earlier' / 'fast_small.tar.gz').write_text('packed')
    earlier = str(tmp_path / 'earlier')
    status, output, calls = queue(out='next', BEFORE=earlier)
    assert status == 0
    assert started(output) == [j for j in ORDER if j != 'fast']
    assert any(c.startswith(f'-m benchmarks.pack_runs unpack {earlier}/fast_small.tar.gz') for c in calls)
    parts = [c.split()[3] for c in calls if 'benchmarks.fast ' in c]
    assert parts == ['loader', 'methods', 'seconds']
    assert done_in(tmp_path, 'earlier') == ['fast'], 'the earlier folder is left as it is'
