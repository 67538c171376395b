"Packed results of runs: they are unpacked unchanged, and no other file is unpacked."
import io
import json
import tarfile

import pytest

pack_runs = pytest.importorskip('benchmarks.pack_runs', reason='only a checkout has the benchmarks')


def write_run(root, name, status='finished', accuracy=.5):
    "Write the files of a run."
    (root / name).mkdir(parents=True)
    (root / name / 'config.json').write_text('{}')
    (root / name / 'result.json').write_text(json.dumps(dict(status=status, accuracy=accuracy)))
    (root / name / 'weights.pt').write_bytes(b'heavy')


def test_finished_runs_come_back_without_weights(tmp_path):
    write_run(tmp_path / 'a', 'one')
    write_run(tmp_path / 'a', 'two', status='diverged')
    assert pack_runs.pack(tmp_path / 'a', tmp_path / 'a.tar.gz') == 1
    assert pack_runs.unpack(tmp_path / 'a.tar.gz', tmp_path / 'b') == 1
    files = {f.relative_to(tmp_path / 'b').as_posix() for f in (tmp_path / 'b').rglob('*') if f.is_file()}
    assert files == {'one/config.json', 'one/result.json'}
    assert pack_runs.unpack(tmp_path / 'a.tar.gz', tmp_path / 'b') == 0


def test_a_finished_result_is_kept_and_an_unfinished_one_replaced(tmp_path):
    write_run(tmp_path / 'new', 'one', accuracy=.9)
    pack_runs.pack(tmp_path / 'new', tmp_path / 'new.tar.gz')
    write_run(tmp_path / 'done', 'one', accuracy=.1)
    write_run(tmp_path / 'begun', 'one', status='interrupted', accuracy=.1)
    for folder, kept in (('done', .1), ('begun', .9)):
        pack_runs.unpack(tmp_path / 'new.tar.gz', tmp_path / folder)
        assert json.loads((tmp_path / folder / 'one' / 'result.json').read_text())['accuracy'] == kept


def test_ensembles_come_back_and_those_of_the_folder_are_kept(tmp_path):
    write_run(tmp_path / 'a', 'one')
    stored = tmp_path / 'a' / 'ensembles'
    stored.mkdir()
    for name in ('0123456789ab.json', 'ffffffffffff.json', '.ffffffffffff.json.77', 'notes.json'):
        (stored / name).write_text('{"accuracy": 0.5}')
    assert pack_runs.pack(tmp_path / 'a', tmp_path / 'a.tar.gz') == 1, 'an ensemble is no run'
    there = tmp_path / 'b' / 'ensembles'
    there.mkdir(parents=True)
    (there / 'ffffffffffff.json').write_text('{"accuracy": 0.9}')
    assert pack_runs.unpack(tmp_path / 'a.tar.gz', tmp_path / 'b') == 1
    found = {f.name: json.loads(f.read_text())['accuracy'] for f in there.iterdir()}
    assert found == {'0123456789ab.json': .5, 'ffffffffffff.json': .9}


NOT_RESULTS = ['../result.json', '/etc/result.json', 'one/../../result.json', 'one/weights.pt', 'result.json',
               'ensembles/result.json', 'ensembles/notes.json', 'ensembles/0123456789ab/result.json',
               'one/0123456789ab.json']


@pytest.mark.parametrize('name', NOT_RESULTS)
def test_an_archive_with_an_outside_path_or_another_file_is_refused_as_a_whole(name, tmp_path):
    with tarfile.open(tmp_path / 'bad.tar.gz', 'w:gz') as tar:
        for member in ('good/result.json', name):
            info = tarfile.TarInfo(member)
            info.size = 2
            tar.addfile(info, io.BytesIO(b'{}'))
    with pytest.raises(ValueError, match='nothing was unpacked'):
        pack_runs.unpack(tmp_path / 'bad.tar.gz', tmp_path / 'root')
    assert not (tmp_path / 'root').exists()


def test_links_are_refused(tmp_path):
    with tarfile.open(tmp_path / 'bad.tar.gz', 'w:gz') as tar:
        info = tarfile.TarInfo('one/result.json')
        info.type, info.linkname = tarfile.SYMTYPE, '/etc/passwd'
        tar.addfile(info)
    with pytest.raises(ValueError, match='nothing was unpacked'):
        pack_runs.unpack(tmp_path / 'bad.tar.gz', tmp_path / 'root')
