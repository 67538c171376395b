"""The interactive pieces of the website, in a real browser; `make test-site` builds the site and runs this.

The formulas in JavaScript must give the numbers that the library gives."""
import hashlib
import json
import math
import random
from functools import partial

import explorables
import make_landscapes
import pytest
import torch
from fastai.callback.core import TrainEvalCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from matplotlib import colormaps
from sadt_nb.core.losses import Divergence
from sadt_nb.methods.asam import asam_step
from sadt_nb.methods.controls import RepeatStep
from sadt_nb.methods.sadt import normalized_ascent, sadt_step
from sadt_nb.methods.sam import sam_step
from sadt_nb.papers.claims import OUTCOMES
from sadt_nb.papers.verdict_rows import evidence_text
from sadt_nb.papers.verdicts import judged_claims
from torch import nn

HALF_THE_SQUARES = Divergence('gaussian', scale=1.5) # of three outputs: 1.5 times their mean square


class Outputs(nn.Module):
    "The loss of tutorial 1 as a network: two weights, and three outputs."
    def __init__(self, w):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(w, dtype=torch.float64))

    def forward(self, x=None):
        w1, w2 = self.weight
        return torch.stack([.4**.5 * (w1**2 - 1.25), .2**.5 * (w1 + .5), (1 + 5 * (1 - w1)**2)**.5 * w2])

    def loss(self, *args):
        w1, w2 = self.weight
        return .2 + .2 * (w1**2 - 1)**2 + .1 * w1 + .5 * (1 + 5 * (1 - w1)**2) * w2**2


def two_steps(net, lr):
    "Make one batch of `RepeatStep(2)` in a Learner."
    batch = [(torch.zeros(1, 1), torch.zeros(1, 1))]
    sgd = partial(OptimWrapper, opt=torch.optim.SGD)
    learn = Learner(DataLoaders(batch, batch), net, loss_func=net.loss, opt_func=sgd, lr=lr,
                    default_cbs=False, cbs=[TrainEvalCallback(), RepeatStep(2)])
    learn.fit(1)


def by_library(key, w, rho, lr):
    "Return the weights after one batch of a method, and the loss there."
    net = Outputs(w)
    opt = torch.optim.SGD(net.parameters(), lr=lr)
    if key == 'two': two_steps(net, lr)
    elif key == 'sam': sam_step(net, net.loss, opt, rho)
    elif key == 'asam': asam_step(net, net.loss, opt, rho)
    elif key == 'sadt':
        teacher = [normalized_ascent(rho)]
        sadt_step(net, lambda: (net(), net.loss()), opt, teacher, divergence=HALF_THE_SQUARES)
    else:
        net.loss().backward()
        opt.step()
    return net.weight.tolist(), net.loss().item()


@pytest.fixture(scope='module')
def steps(browser):
    "A tab with the formulas alone."
    tab = browser.new_page()
    tab.add_script_tag(path=explorables.FOLDER / 'steps.js')
    yield tab
    tab.close()


BATCH = """([key, w, o]) => {
  const end = Steps.methods.find(m => m.key === key).batch(w, o).end;
  return [end, Steps.loss(end)];
}"""


@pytest.mark.parametrize('key', ['plain', 'two', 'sam', 'asam', 'sadt'])
def test_a_batch_gives_the_numbers_of_the_library(key, steps):
    draw = random.Random(0)
    places = [[-.8, .3], [0., 0.], [-1.6, .8], [1.6, -.8]]
    places += [[draw.uniform(-1.6, 1.6), draw.uniform(-.8, .8)] for _ in range(20)]
    for w in places:
        rho = draw.uniform(.01, .5)
        lr = draw.uniform(.01, .1)
        end, loss = steps.evaluate(BATCH, [key, w, dict(rho=rho, lr=lr)])
        expected_end, expected_loss = by_library(key, w, rho, lr)
        assert end == pytest.approx(expected_end, abs=1e-6)
        assert loss == pytest.approx(expected_loss, abs=1e-6)


def test_the_loss_is_half_the_squares_of_the_outputs(steps):
    for w in ([-.8, .3], [1.2, -.7]):
        loss, outputs, slope = steps.evaluate('w => [Steps.loss(w), Steps.outputs(w), Steps.slope(w)]', w)
        assert loss == pytest.approx(sum(v * v for v in outputs) / 2 + .0625, abs=1e-12)
        net = Outputs(w)
        net.loss().backward()
        assert slope == pytest.approx(net.weight.grad.tolist(), abs=1e-12)
        assert outputs == pytest.approx(net().tolist(), abs=1e-12)


def test_the_cost_of_a_batch_is_counted(steps):
    counts = json.loads(steps.evaluate('JSON.stringify(Steps.methods.map(m => [m.key, m.steps, m.passes]))'))
    assert counts == [['plain', 1, 1], ['two', 2, 1], ['sam', 1, 2], ['asam', 1, 2], ['sadt', 2, 2]]


# In the built site

PAGES = dict(one_step='tutorials/a_loss_you_can_see.html',
             race='tutorials/a_loss_you_can_see.html',
             verdicts='studies/verdicts.html',
             landscapes='tutorials/reading_a_landscape.html')


@pytest.fixture(params=[(1280, 'light'), (375, 'dark')], ids=['desk, light', 'phone, dark'])
def window(request, browser):
    width, scheme = request.param
    context = browser.new_context(viewport=dict(width=width, height=900), color_scheme=scheme,
                                  has_touch=width < 500)
    yield context.new_page()
    context.close()


def opened(tab, name, host):
    "Open the page of an explorable and return the explorable."
    tab.goto(host + PAGES[name])
    piece = tab.locator(f'[data-explorable={name}]')
    piece.wait_for(state='visible')
    piece.scroll_into_view_if_needed()
    return piece


def still(tab, name): return tab.locator(f'.tag_still_{name} .cell_output img')


WITHOUT_NAME = """place => [...place.querySelectorAll('button, input, select, [role=slider]')]
  .filter(e => !(e.ariaLabel || e.textContent.trim() || [...e.labels || []].some(l => l.textContent.trim())))
  .map(e => e.outerHTML)"""
SMALL_TARGETS = """place => [...place.querySelectorAll('button, select, [type=range], summary, tbody label')]
  .filter(e => e.checkVisibility() && e.getBoundingClientRect().height < 24)
  .map(e => e.outerHTML)"""
TOO_WIDE = 'document.documentElement.scrollWidth - window.innerWidth'


@pytest.mark.parametrize('name', PAGES)
def test_controls_have_names_and_room(name, window, host):
    "Each control has a name for screen readers and room for a finger; the page does not scroll sideways."
    piece = opened(window, name, host)
    assert piece.get_attribute('aria-label')
    assert piece.evaluate(WITHOUT_NAME) == []
    assert piece.evaluate(SMALL_TARGETS) == []
    assert window.evaluate(TOO_WIDE) <= 0


@pytest.mark.parametrize('name', PAGES)
def test_without_scripts_the_page_shows_its_still_picture(name, browser, host):
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto(host + PAGES[name])
    assert tab.locator(f'[data-explorable={name}]').is_hidden()
    if explorables.EXPLORABLES[name].has_still: assert still(tab, name).is_visible()
    context.close()


def test_sources_are_safe_and_small():
    "No inline handlers, no `eval`, no network: a page with a strict security policy shows them, too."
    for file in explorables.FOLDER.glob('*.js'):
        text = file.read_text(encoding='utf-8')
        for word in ('eval(', 'Function(', 'innerHTML', 'fetch(', 'XMLHttpRequest', 'import(', 'onclick'):
            assert word not in text, f'{word} in {file.name}'
        assert len(text.splitlines()) <= 250, file.name
        assert max(map(len, text.splitlines())) <= 110, file.name


def test_d3_is_the_published_file():
    "It is `dist/d3.min.js` of D3 7.9.0 as npm has it, and its licence stands beside it."
    file = explorables.FOLDER.parents[1] / explorables.D3
    sha256 = 'f2094bbf6141b359722c4fe454eb6c4b0f0e42cc10cc7af921fc158fceb86539'
    assert hashlib.sha256(file.read_bytes()).hexdigest() == sha256
    assert 'Permission to use, copy, modify' in (file.parent / 'LICENSE').read_text(encoding='utf-8')


# What a page loads: its scripts and stylesheets, and whatever these ask for
LOADED = """() => [
  ...[...document.scripts].map(e => e.src),
  ...[...document.querySelectorAll('link[rel~=stylesheet]')].map(e => e.href),
  ...performance.getEntriesByType('resource').map(e => e.name),
].filter(url => url && !url.startsWith('data:'))"""


@pytest.mark.parametrize('name', PAGES)
def test_all_that_a_page_loads_comes_from_our_host(name, window, host):
    "D3 is loaded once, before the files that draw with it."
    opened(window, name, host)
    loaded = window.evaluate(LOADED)
    assert [url for url in loaded if not url.startswith(host)] == []
    scripts = window.evaluate('[...document.scripts].map(e => e.src)')
    ours = [url for url in scripts if '/d3/' in url or '/explorables/' in url]
    assert ours[0] == host + explorables.D3
    assert len(set(ours)) == len(ours) > 1


def test_pages_without_an_explorable_do_without_d3(browser, host):
    tab = browser.new_page()
    tab.goto(host)
    loaded = tab.evaluate(LOADED)
    assert loaded and not [url for url in loaded if '/d3/' in url]
    tab.close()


def losses(piece):
    "Return the losses that the table of the first explorable shows."
    rows = piece.locator('tbody tr').all()
    return {r.get_attribute('data-method'): float(r.locator('.loss').inner_text().replace('\u2212', '-'))
            for r in rows}


def expected_losses(w, rho):
    found = {key: by_library(key, w, rho, .08)[1] for key in ('plain', 'sam', 'asam', 'sadt')}
    return pytest.approx(found, abs=6e-4)


def test_one_step_by_keyboard(window, host):
    """The arrow keys move the point, and the slider changes the radius.

    The table shows the losses of the library."""
    piece = opened(window, 'one_step', host)
    assert still(window, 'one_step').is_hidden()
    assert losses(piece) == expected_losses([-.8, .3], .25)
    handle = piece.get_by_role('slider', name='the weights')
    handle.focus()
    for key in ('ArrowLeft', 'ArrowLeft', 'ArrowDown', 'Shift+ArrowRight'): window.keyboard.press(key)
    assert handle.get_attribute('aria-valuetext').startswith('w1 \u22120.74, w2 0.28')
    assert losses(piece) == expected_losses([-.74, .28], .25)
    piece.locator('input[type=range]').focus()
    window.keyboard.press('ArrowRight')
    assert losses(piece) == expected_losses([-.74, .28], .26)
    piece.get_by_role('button', name='step with SAM', exact=True).press('Enter')
    end, _ = by_library('sam', [-.74, .28], .26, .08)
    assert losses(piece) == expected_losses(end, .26)
    piece.get_by_role('button', name='back to the start').click()
    assert losses(piece) == expected_losses([-.8, .3], .25)


def test_one_step_by_hand(window, host):
    "The pointer drags the point, which stays on the map."
    piece = opened(window, 'one_step', host)
    handle = piece.locator('.handle')
    box = handle.bounding_box()
    x = box['x'] + box['width'] / 2
    y = box['y'] + box['height'] / 2
    window.mouse.move(x, y)
    window.mouse.down()
    window.mouse.move(x + 60, y + 5, steps=3)
    moved = float(handle.get_attribute('aria-valuenow'))
    scale = 3.2 / (piece.locator('.plane').bounding_box()['width'] - 34)
    assert moved == pytest.approx(-.8 + 60 * scale, abs=.02)
    window.mouse.move(x + 5000, y)
    window.mouse.up()
    assert float(handle.get_attribute('aria-valuenow')) == 1.6
    assert window.evaluate(TOO_WIDE) <= 0
    box = handle.bounding_box()
    window.mouse.move(box['x'] + 20, box['y'] + 20)
    window.mouse.move(box['x'] + 15, box['y'] + 20)
    assert float(handle.get_attribute('aria-valuenow')) == 1.6 # released


def test_one_step_draws_only_what_is_chosen(window, host):
    piece = opened(window, 'one_step', host)
    red = piece.locator('.plane path[stroke="#d62728"]')
    assert red.count() == 3 # first step, climb, second step
    piece.get_by_role('checkbox', name='SADT').uncheck()
    assert red.count() == 0


# How many of the map's areas cover a place, given from 0 to 1 to the right and downward
AREAS = """(place, places) => {
  const box = place.querySelector('.plane svg svg').getBoundingClientRect();
  const covers = (path, [right, down]) => {
    const at = new DOMPoint(box.x + right * box.width, box.y + down * box.height);
    return path.isPointInFill(at.matrixTransform(path.getScreenCTM().inverse()));
  };
  const areas = [...place.querySelectorAll('.levels path')];
  return places.map(p => areas.filter(path => covers(path, p)).length);
}"""


def test_the_areas_of_the_map_are_levels_of_the_loss(window, host):
    "A place lies in the areas of all levels above its loss, also after the window has become narrower."
    piece = opened(window, 'one_step', host)
    draw = random.Random(0)
    places = [[draw.random(), draw.random()] for _ in range(40)]
    losses = [Outputs([-1.6 + 3.2 * x, .8 - 1.6 * y]).loss().item() for x, y in places]
    levels = [.1, .15, .2, .25, .3, .35, .4, .5, .7, 1, 1.5, 2.2, 3.2, 5, 8]
    expected = [sum(loss < level for level in levels) for loss in losses]
    assert piece.evaluate(AREAS, places) == expected
    window.set_viewport_size(dict(width=350, height=700))
    window.wait_for_function("place => place.querySelector('.plane svg svg').clientWidth < 260",
                             arg=piece.element_handle())
    assert piece.evaluate(AREAS, places) == expected
    assert window.evaluate(TOO_WIDE) <= 0


def table(piece):
    "Return the rows of the race's table: steps, passes, loss, and passes until the flat minimum is reached."
    rows = piece.locator('tbody tr').all()
    return {r.get_attribute('data-method'): [td.inner_text() for td in r.locator('td').all()] for r in rows}


def race_by_library(key, batches, passes):
    "Return the loss after a number of batches, and the number of passes until the flat minimum is near."
    w = [-.8, .3]
    reached = None
    for i in range(1, batches + 1):
        w, loss = by_library(key, w, .25, .08)
        if reached is None and math.dist(w, [.9304029, 0]) < .2: reached = i * passes
    return f'{loss:.3f}', str(reached or '\u2013')


@pytest.mark.parametrize('key,passes', dict(plain=1, sam=2, asam=2, sadt=2).items())
def test_the_race_ends_as_in_the_library(key, passes, browser, host):
    tab = browser.new_page()
    piece = opened(tab, 'race', host)
    loss, reached = race_by_library(key, 150 // passes, passes)
    assert table(piece)[key][1:] == ['150', loss, reached]
    tab.close()


COUNTS = dict( # what is equal: steps and passes of each method when 100 of it are made
    batches=dict(plain=[100, 100], two=[200, 100], sam=[100, 200], asam=[100, 200], sadt=[200, 200]),
    steps=dict(plain=[100, 100], two=[100, 50], sam=[100, 200], asam=[100, 200], sadt=[100, 100]),
    passes=dict(plain=[100, 100], two=[200, 100], sam=[50, 100], asam=[50, 100], sadt=[100, 100]))


def test_the_race_counts_steps_and_passes(window, host):
    "SAM's passes count double, and the reader chooses what is equal."
    piece = opened(window, 'race', host)
    piece.locator('input[type=range]').first.fill('100')
    for unit, counts in COUNTS.items():
        piece.get_by_role('radio', name=unit).check()
        assert {k: [int(v) for v in row[:2]] for k, row in table(piece).items()} == counts
    assert 'two plain steps after 11 passes, SAM after 142 passes' in piece.get_by_role('status').inner_text()


def test_the_race_runs_pauses_and_follows_the_point(window, host):
    piece = opened(window, 'race', host)
    time = piece.locator('input[type=range]').first
    piece.get_by_role('button', name='run').press('Enter')
    window.wait_for_function('element => +element.value > 5 && +element.value < 150',
                             arg=time.element_handle())
    piece.get_by_role('button', name='pause').click()
    paused = time.input_value()
    before = table(piece)
    window.wait_for_timeout(200)
    assert time.input_value() == paused
    assert int(before['plain'][1]) == int(paused)
    piece.get_by_role('slider', name='the weights').press('Shift+ArrowRight')
    assert table(piece) != before


def test_the_race_does_not_move_where_no_motion_is_wanted(browser, host):
    context = browser.new_context(reduced_motion='reduce')
    tab = context.new_page()
    piece = opened(tab, 'race', host)
    time = piece.locator('input[type=range]').first
    time.fill('3')
    piece.get_by_role('button', name='run').click()
    assert time.input_value() == '150'
    context.close()


def test_a_race_that_diverges_says_so(window, host):
    "At a rate of 0.12 two plain steps have the length 0.24."
    piece = opened(window, 'race', host)
    piece.get_by_label('learning rate').fill('0.12')
    piece.get_by_label('radius').fill('0.5')
    for key in ['Shift+ArrowLeft'] * 9: piece.get_by_role('slider', name='the weights').press(key)
    for key in ['Shift+ArrowUp'] * 6: piece.get_by_role('slider', name='the weights').press(key)
    assert 'diverges' in {row[2] for row in table(piece).values()}
    assert 'NaN' not in piece.inner_text()


CLAIMS = """all => all.filter(row => row.checkVisibility())
  .map(row => row.querySelector('summary').lastChild.textContent.trim())"""


@pytest.fixture(scope='module')
def claims(): return judged_claims()


def test_the_verdicts_filter_by_paper_outcome_and_method(window, host, claims):
    """Each filter leaves the claims that the library names, alone and together with the other filters.

    The claims are counted; `show all` shows all of them again."""
    piece = opened(window, 'verdicts', host)
    rows = window.locator('details.claim')
    every = [c for of_paper in claims.values() for c in of_paper]
    def shown(): return rows.evaluate_all(CLAIMS)
    assert shown() == [c.says for c in every]
    for paper, of_paper in claims.items():
        piece.get_by_label('paper').select_option(paper)
        assert shown() == [c.says for c in of_paper]
        assert f'{len(of_paper)} of {len(every)} claims' in piece.get_by_role('status').inner_text()
        for outcome in {c.outcome for c in every}:
            piece.get_by_label('outcome').select_option(outcome)
            assert shown() == [c.says for c in of_paper if c.outcome == outcome]
        piece.get_by_label('outcome').select_option('')
    piece.get_by_role('button', name='show all').click()
    assert len(shown()) == len(every)
    for method in {c.method for c in every}:
        piece.get_by_label('method').select_option(method)
        assert shown() == [c.says for c in every if c.method == method]


def test_a_claim_opens_to_its_evidence(window, host, claims):
    "By keyboard; the evidence is the library's, and its links lead to studies."
    opened(window, 'verdicts', host)
    row = window.locator('details.claim').first
    row.locator('summary').focus()
    window.keyboard.press('Enter')
    assert row.locator('li').first.is_visible()
    text = row.text_content()
    first = claims['SADT'][0]
    measured = [e for e in (*first.ours, *first.control) if e.n]
    assert len(measured) > 20
    for e in measured: assert evidence_text(e) in text
    links = {a.get_attribute('href') for a in row.locator('a').all()}
    assert 'flatness.html' in links
    assert 'sadt_grid sadt/table1 --only' in text


def test_the_rows_of_the_page_have_the_outcomes_of_the_rule(window, host, claims):
    "A page that was not run again after new results would show old outcomes."
    opened(window, 'verdicts', host)
    every = [(paper, c.outcome, c.method) for paper, of_paper in claims.items() for c in of_paper]
    shown = 'all => all.map(row => [row.dataset.paper, row.dataset.outcome, row.dataset.method])'
    assert [tuple(row) for row in window.locator('details.claim').evaluate_all(shown)] == every
    assert {outcome for _, outcome, _ in every} <= OUTCOMES.keys()


# The first of the pictures as data, to see whether it has changed
PICTURE = "place => place.querySelector('canvas').toDataURL()"


def test_the_landscapes_turn_by_keyboard_and_by_hand(window, host):
    "Sliders and pointer turn all surfaces; a full turn gives the first picture again."
    piece = opened(window, 'landscapes', host)
    assert still(window, 'landscapes').is_hidden()
    first = piece.evaluate(PICTURE)
    turn = piece.get_by_label('turn')
    turn.press('ArrowRight')
    assert turn.input_value() == '40'
    assert piece.evaluate(PICTURE) != first
    turn.press('ArrowLeft')
    assert piece.evaluate(PICTURE) == first
    box = piece.locator('canvas').first.bounding_box()
    window.mouse.move(box['x'] + 50, box['y'] + 90)
    window.mouse.down()
    window.mouse.move(box['x'] + 100, box['y'] + 90, steps=2)
    window.mouse.up()
    assert turn.input_value() == '65'
    piece.get_by_label('logarithmic').uncheck()
    linear = piece.evaluate(PICTURE)
    assert linear != first
    piece.get_by_label('tilt').press('End')
    assert piece.get_by_label('tilt').input_value() == '90'
    assert piece.evaluate(PICTURE) != linear


@pytest.fixture
def phone(browser):
    context = browser.new_context(viewport=dict(width=375, height=900), has_touch=True, is_mobile=True)
    yield context.new_page()
    context.close()


def swipe(tab, element, right, down):
    "Move a finger from the middle of an element by some pixels."
    box = element.bounding_box()
    x = box['x'] + box['width'] / 2
    y = box['y'] + box['height'] / 2
    session = tab.context.new_cdp_session(tab)
    def touch(kind, *points):
        session.send('Input.dispatchTouchEvent', dict(type=kind, touchPoints=points))
        tab.wait_for_timeout(50)
    touch('touchStart', dict(x=x, y=y))
    for i in range(1, 11): touch('touchMove', dict(x=x + right * i / 10, y=y + down * i / 10))
    touch('touchEnd')
    tab.wait_for_timeout(300) # until the page rests


def test_a_finger_moves_the_point_and_not_the_page(phone, host):
    piece = opened(phone, 'one_step', host)
    scrolled = phone.evaluate('scrollY')
    handle = piece.locator('.handle')
    swipe(phone, handle, 60, 40)
    assert phone.evaluate('scrollY') == scrolled
    scale = 3.2 / (piece.locator('.plane').bounding_box()['width'] - 34)
    assert float(handle.get_attribute('aria-valuenow')) == pytest.approx(-.8 + 60 * scale, abs=.02)
    assert 'w2 0.3' not in handle.get_attribute('aria-valuetext')


def test_a_finger_turns_the_landscapes_sideways_and_else_scrolls_the_page(phone, host):
    piece = opened(phone, 'landscapes', host)
    canvas = piece.locator('canvas').first
    angles = [piece.get_by_label(name) for name in ('turn', 'tilt')]
    scrolled = phone.evaluate('scrollY')
    swipe(phone, canvas, 50, 0)
    assert [a.input_value() for a in angles] == ['65', '45']
    assert phone.evaluate('scrollY') == scrolled
    swipe(phone, canvas, 0, -100)
    assert phone.evaluate('scrollY') == pytest.approx(scrolled + 100, abs=30)
    assert [a.input_value() for a in angles] == ['65', '45']


def test_the_colours_of_a_landscape_are_its_losses(browser, host):
    "Seen from above, a piece has the colour of the loss at its place."
    tab = browser.new_page()
    piece = opened(tab, 'landscapes', host)
    piece.get_by_label('turn').fill('0')
    piece.get_by_label('tilt').fill('90')
    # at the first place the loss differs most from the loss with both directions exchanged
    places = [[-.2667, -.7333], [.5, 0], [-.8, .8], [.8, .8], [-.8, -.8]]
    found = piece.evaluate(PIXELS, places)
    surface = explorables.landscapes()['landscapes'][1]
    assert len({tuple(c) for c in found}) == len(places)
    for (x, y), seen in zip(places, found):
        assert share_of_color(seen) == pytest.approx(share_of_loss(loss_near(surface, x, y)), abs=.1)
    tab.close()


# The brightest pixel near each point, because lines between the pieces are darker
PIXELS = """(place, points) => {
  const canvas = place.querySelectorAll('canvas')[1];
  const ratio = canvas.width / canvas.clientWidth;
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  const scale = Math.min(width / 2.9, height / 2.7);
  return points.map(([x, y]) => {
    const at = [width / 2 + scale * x, height / 2 - scale * y].map(v => Math.round(ratio * v));
    const {data} = canvas.getContext('2d').getImageData(at[0] - 2, at[1] - 2, 5, 5);
    const pixels = [...Array(25).keys()].map(i => [...data.slice(4 * i, 4 * i + 3)]);
    const bright = ([r, g, b]) => r + g + b;
    return pixels.reduce((best, p) => bright(p) > bright(best) ? p : best);
  });
}"""


def loss_near(surface, x, y):
    "Return the loss at the stored point next to (x, y)."
    def index(v): return min(range(len(surface['at'])), key=lambda i: abs(surface['at'][i] - v))
    return surface['loss'][index(x)][index(y)]


def share_of_loss(loss): return math.log(loss / .001) / math.log(10 / .001)


def share_of_color(color):
    "Return the place of a colour on matplotlib's own scale, from 0 to 1."
    def distance(i): return math.dist(color, [255 * c for c in colormaps['viridis'](i)[:3]])
    return min(range(256), key=distance) / 255


def test_the_landscapes_are_those_of_the_tutorial():
    "The stored losses are the library's for the tutorial's networks, but for rounding while training."
    stored = explorables.landscapes()
    names = make_landscapes.definitions()
    assert [s['name'] for s in stored['landscapes']] == list(names['kinds'])
    assert explorables.LANDSCAPES.stat().st_size < 300_000
    now = make_landscapes.landscape(names, 'batches of 500', points=3)
    every_15th = [row[::15] for row in stored['landscapes'][1]['loss'][::15]]
    for row, again in zip(every_15th, now['loss'], strict=True): assert row == pytest.approx(again, rel=.05)
