"""Differences of accuracies in both readings of BatchNorm, and the pages that show them."""
import json
import re
from pathlib import Path

import pytest
from sadt_nb.experiments.report import both_readings

NBS = Path(__file__).parents[1] / 'nbs'
FOLDERS = 'studies', 'guides', 'tutorials'


def runs(*pairs): return [dict(accuracy=a, accuracy_bn=b) for a, b in pairs]


def text(groups, pairs): return str(both_readings(groups, pairs))


def test_a_change_of_sign_is_found_with_both_means():
    groups = dict(plain=runs((.50, .60), (.60, .60)), sam=runs((.52, .58), (.61, .61)))
    # means: (.02 + .01) / 2 and (-.02 + .01) / 2
    found = text(groups, [('sam', 'plain')])
    assert found.startswith('The one difference of accuracies on this page changes its sign between')
    assert found.endswith('\n- sam minus plain: +1.50 and -0.50')
    assert text(groups, [('plain', 'sam')]).endswith('\n- plain minus sam: -1.50 and +0.50')


@pytest.mark.parametrize('running, fresh', [(.01, .02), (-.01, -.02), (0, .01), (0, -.01), (.01, 0), (0, 0)])
def test_equal_signs_and_differences_of_zero_do_not_change(running, fresh):
    groups = dict(a=runs((.3, .4), (.7, .1)), b=runs((.3 - running, .4 - fresh), (.7 - running, .1 - fresh)))
    one_line = ('The one difference of accuracies on this page does not change its sign between '
                "BatchNorm's running averages and re-estimated statistics.")
    assert text(groups, [('a', 'b')]) == one_line


def test_changed_signs_come_with_the_reading_that_decides():
    decides = ("To judge a paper's claim, we use the accuracies with the running averages, because the "
               "papers' authors measure in this way.")
    groups = dict(a=runs((.5, .5)), b=runs((.6, .4)), c=runs((.7, .7)))
    for pairs in ([('b', 'a')], [('b', 'a'), ('c', 'a')]): # one difference, and one of two
        head, _, rest = text(groups, pairs).partition('\n\n')
        order = 'Differences in points, running averages first:'
        assert head.endswith(f'and re-estimated statistics. {decides} {order}')
        assert rest == '- b minus a: +10.00 and -10.00' # the running averages come first
    for pairs in ([('c', 'a')], [('c', 'a'), ('a', 'c')]):
        assert 'decide' not in text(groups, pairs)


def test_only_common_repetitions_count():
    a, b, extra = runs((.5, .5), (.6, .4), (.9, .9))
    groups = dict(first={0: b, 7: extra}, second={0: a, 3: extra})
    assert text(groups, [('first', 'second')]).endswith('first minus second: +10.00 and -10.00')
    groups['first'][3] = dict(accuracy=.4, accuracy_bn=.9) # means: (.1 - .5) / 2 and (-.1 + 0) / 2
    found = text(groups, [('first', 'second')])
    assert found.startswith('The one difference of accuracies on this page does not')


def test_pairs_are_counted_once_and_kept_in_order():
    groups = dict(a=runs((.5, .5)), b=runs((.6, .4)), c=runs((.7, .7)))
    found = text(groups, [('b', 'a'), ('c', 'a'), ('b', 'a'), ('a', 'b')])
    lines = found.splitlines()
    assert lines[0].startswith('2 of 3 differences of accuracies on this page change their sign')
    assert [line.split(':')[0] for line in lines[2:]] == ['- b minus a', '- a minus b']


@pytest.mark.parametrize('pairs, message', [
    ([], '`pairs` must name'), ([('a', 'x')], "no group is named 'x'; choose one of a, b, c, percent"),
    ([('a', 'c')], "'a' and 'c' have no repetition in common"),
    ([('a', 'percent')], r"the accuracies of 'percent' must lie in \[0, 1\]")])
def test_wrong_pairs_are_refused(pairs, message):
    groups = dict(a=runs((.5, .5)), b=runs((.6, .4)), c={'seed 9': runs((.7, .7))[0]}, percent=runs((50, 51)))
    with pytest.raises(ValueError, match=message): both_readings(groups, pairs)


def pages():
    "Yield name and code cells of each page that compares accuracies of stored runs."
    for file in sorted([NBS / 'index.ipynb', *(f for d in FOLDERS for f in (NBS / d).glob('*.ipynb'))]):
        if not file.exists(): continue
        cells = [c for c in json.loads(file.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']
        source = '\n'.join(''.join(c['source']) for c in cells)
        reads = 'load_results' in source or 'read_result(' in source
        compares = re.search(r"'accuracy(_bn)?'|\.accuracy_bn|= comparison\(", source)
        if reads and compares: yield file.stem, cells


@pytest.mark.parametrize('name, cells', pages(), ids=lambda v: v if isinstance(v, str) else '')
def test_every_page_that_compares_accuracies_shows_both_readings(name, cells):
    shown = [c for c in cells if 'both_readings(' in ''.join(c['source'])]
    assert len(shown) == 1
    output = ''.join(''.join(o.get('data', {}).get('text/plain', '')) for o in shown[0]['outputs'])
    assert 'differences of accuracies on this page change' in output


@pytest.mark.skipif(not NBS.exists(), reason='the installed library has no notebooks')
def test_the_pages_are_found():
    found = {name for name, _ in pages()}
    assert found >= {'index', '21_which_method', '06_what_makes_sadt_work', '10_94_percent_in_minutes'}
    assert len(found) >= 13
