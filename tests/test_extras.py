"The library and its tests without the optional packages, as `pip install sadt_nb` leaves them."
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

TESTS = Path(__file__).parent
# Runs in a process of its own. The first argument names the packages that cannot be imported there.
HIDE = """
import sys
from importlib.machinery import PathFinder
hidden = sys.argv[1].split(',')
class Visible(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition('.')[0] not in hidden: return super().find_spec(name, path, target)
sys.meta_path = [Visible if finder is PathFinder else finder for finder in sys.meta_path]
"""
COLLECT = HIDE + """
import pytest
sys.exit(pytest.main(['--collect-only', '-q', '-n', '0', '-p', 'no:cacheprovider', sys.argv[2]]))
"""


def required(*names):
    "Return the distributions that `pip install` of `names` brings, by normalised name."
    found, queue = set(), list(names)
    while queue:
        name = re.sub('[-_.]+', '-', queue.pop()).lower()
        if name in found: continue
        try: needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError: continue # for another system
        found.add(name)
        queue += [re.match('[A-Za-z0-9._-]+', need)[0] for need in needs if 'extra ==' not in need]
    return found


def optional_packages():
    "Return the installed top-level packages that neither the library nor pytest needs."
    needed = required('sadt_nb', 'pytest', 'pytest-xdist', 'setuptools', 'pip')
    packages = metadata.packages_distributions()
    return sorted(package for package, by in packages.items()
                  if not any(re.sub('[-_.]+', '-', name).lower() in needed for name in by))


def test_every_test_file_can_be_imported_without_the_optional_packages():
    "Else a file's tests fail, and are not skipped, where the library is installed without extras."
    args = [sys.executable, '-c', COLLECT, ','.join(optional_packages()), str(TESTS)]
    done = subprocess.run(args, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
