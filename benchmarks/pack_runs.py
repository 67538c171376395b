"""Packs the finished runs of a results folder into one small file, to move them to another machine.

    python -m benchmarks.pack_runs pack ROOT FILE
    python -m benchmarks.pack_runs unpack FILE ROOT

`pack` takes configuration, result, history and measures of finished runs, without weights, and the results of
ensembles; FILE is a .tar.gz. `unpack` puts them back; it keeps files of runs that are finished in ROOT, and
the ensembles that ROOT has. If FILE holds anything but such files, or a path that leads out of ROOT, `unpack`
writes nothing and ends with an error."""
import argparse
import gzip
import io
import json
import os
import re
import sys
import tarfile
from pathlib import Path

NAMES = ('config.json', 'history.json', 'measures.json', 'result.json') # only a finished run has the last one
ENSEMBLES = 'ensembles' # the folder in which `run_ensemble` stores results, one file per ensemble
LARGEST = 64 * 2**20 # bytes, of one file


def is_finished(folder):
    try:
        return json.loads((folder / 'result.json').read_text()).get('status') == 'finished'
    except (OSError, ValueError, AttributeError):
        return False


def is_result(folder, name):
    "Return whether this is the name of a packed file: one of a run, or the result of an ensemble."
    if folder == ENSEMBLES:
        return re.fullmatch(r'[0-9a-f]{12}\.json', name) is not None
    return name in NAMES


def write_whole(file, data):
    "Write a file completely or not at all."
    partial = file.with_name(f'.{file.name}.{os.getpid()}')
    partial.write_bytes(data)
    os.replace(partial, file)


def pack(root, file):
    "Write FILE and return the number of its runs. The same runs and ensembles give the same bytes."
    root = Path(root)
    folders = sorted(root.iterdir()) if root.is_dir() else []
    runs = [f for f in folders if f.is_dir() and is_finished(f)]
    files = [run / name for run in runs for name in NAMES]
    files += [f for f in sorted(root.glob(f'{ENSEMBLES}/*.json')) if is_result(ENSEMBLES, f.name)]
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode='wb', mtime=0) as z, tarfile.open(fileobj=z, mode='w') as tar:
        for f in files:
            if not f.is_file():
                continue
            member = tarfile.TarInfo(f'{f.parent.name}/{f.name}')
            data = f.read_bytes()
            member.size = len(data)
            member.mtime = int(f.stat().st_mtime) # the time when the run ended
            tar.addfile(member, io.BytesIO(data))
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    write_whole(Path(file), buffer.getvalue())
    return len(runs)


def checked(member, root):
    "Return folder and name of a member. Raises `ValueError` if it is no packed file right below `root`."
    folder, slash, name = member.name.partition('/')
    outside = not slash or folder in ('', '.', '..') or '\\' in folder or '\0' in folder
    if outside or not is_result(folder, name) or not member.isreg():
        raise ValueError(f'{member.name!r} is no file of a run or an ensemble; nothing was unpacked')
    if member.size > LARGEST:
        size = f'{member.size:,} bytes, allowed are {LARGEST:,}'
        raise ValueError(f'{member.name!r} has {size}; nothing was unpacked')
    if any(f.is_symlink() for f in (root / folder, root / folder / name)):
        raise ValueError(f'{root / folder} leads elsewhere by a link; nothing was unpacked')
    return folder, name


def unpack(file, root):
    "Return the number of runs that are new in `root`. Raises `ValueError` before it writes anything."
    root = Path(root)
    found = {}
    with tarfile.open(file) as tar:
        for member in tar.getmembers():
            folder, name = checked(member, root)
            found.setdefault(folder, {})[name] = tar.extractfile(member).read(), member.mtime
    new = 0
    for folder, files in found.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        known = folder == ENSEMBLES or is_finished(root / folder)
        new += not known
        for name, (data, mtime) in sorted(files.items()): # the result last: only a finished run has one
            to = root / folder / name
            if known and to.exists():
                continue
            write_whole(to, data)
            os.utime(to, (mtime, mtime))
    return new


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('what', choices=['pack', 'unpack'])
    p.add_argument('source', type=Path)
    p.add_argument('target', type=Path)
    a = p.parse_args()
    try:
        if a.what == 'pack':
            n = pack(a.source, a.target)
            print(f'{a.target}: {n} finished runs, {a.target.stat().st_size / 1024:,.0f} KB')
        else:
            print(f'{a.target}: {unpack(a.source, a.target)} runs from {a.source}')
    except (ValueError, OSError, EOFError, tarfile.TarError) as e:
        sys.exit(f'{a.what}: {e}')


if __name__ == '__main__':
    main()
