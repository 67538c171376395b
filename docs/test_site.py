"""The built website in a real browser; `make test-site` builds it and runs this.

Every page is opened twice: at a desktop's width in the light theme, and at a phone's in the dark theme."""
import functools
import html.parser
import json
import os
import re
import subprocess
import sys
from itertools import groupby
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

import gallery
import nbformat
import pytest

ROOT = Path(__file__).parents[1]
SITE = ROOT / '_build' / 'html'
NBS = ROOT / 'nbs'
PAGES = sorted(p.relative_to(SITE).as_posix() for p in SITE.rglob('*.html') if '_static' not in p.parts)
CONTENT = [p for p in PAGES if p not in ('genindex.html', 'search.html', 'py-modindex.html')]
TUTORIALS = sorted((NBS / 'tutorials').glob('*.ipynb'))
STUDIES = sorted((NBS / 'studies').glob('*.ipynb'))


def page_stem(nb): return re.sub(r'^\d+_', '', nb.stem)


def is_part(nb):
    "Return whether a page belongs to the page of another method, as `sadt_teachers` belongs to `sadt`."
    return any(page_stem(nb).startswith(f'{page_stem(other)}_') for other in nb.parent.glob('*.ipynb'))


METHODS = [nb for nb in sorted((NBS / 'methods').glob('*.ipynb'))
           if nb.stem != '99_registry' and not is_part(nb)]


def page_of(nb): return (nb.parent.relative_to(NBS) / page_stem(nb)).as_posix() + '.html'


def notebooks():
    "Return all notebooks that have a page."
    return [nb for nb in NBS.rglob('*.ipynb') if nb.stem != 'all' and '.ipynb_checkpoints' not in nb.parts]


@pytest.fixture(scope='session', params=[(1400, 'light'), (375, 'dark')], ids=['desk, light', 'phone, dark'])
def window(request, browser):
    width, scheme = request.param
    c = browser.new_context(viewport=dict(width=width, height=900), color_scheme=scheme)
    yield c.new_page(), width, scheme
    c.close()


# Text nodes whose contrast with their background is below WCAG's AA: 4.5, or 3 for large letters.
# Text over pictures is left out.
CONTRAST = r"""() => {
  const parse = c => {
    const m = c.match(/[\d.]+/g).map(Number);
    return m.length < 4 ? [...m.slice(0, 3), 1] : m;
  };
  const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
  const linear = v => {
    v /= 255;
    return v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  };
  const luminance = c => {
    const [r, g, b] = c.map(linear);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const background = e => {
    const stack = [];
    for (let n = e; n; n = n.parentElement) {
      const c = parse(getComputedStyle(n).backgroundColor);
      if (c[3] > 0) stack.push(c);
      if (c[3] === 1) break;
    }
    return stack.reverse().reduce((b, t) => over(t, b), [255, 255, 255, 1]);
  };
  const skipped = 'svg, script, style, mjx-container, .visually-hidden, .headerlink';
  const bad = {};
  const root = document.querySelector('article') || document.body;
  const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode.textContent.trim();
    const e = walker.currentNode.parentElement;
    if (!text || e.closest(skipped)) continue;
    if (!e.checkVisibility({checkOpacity: true, checkVisibilityCSS: true})) continue;
    const s = getComputedStyle(e);
    const b = background(e);
    const f = over(parse(s.color), b);
    const [hi, lo] = [luminance(f), luminance(b)].sort((x, y) => y - x);
    const ratio = (hi + .05) / (lo + .05);
    const size = parseFloat(s.fontSize);
    const large = size >= 24 || size >= 18.66 && +s.fontWeight >= 700;
    if (ratio < (large ? 3 : 4.5)) {
      const colours = `${s.color} on rgb(${b.slice(0, 3).map(Math.round)})`;
      bad[colours] = `${ratio.toFixed(2)}: ${e.className || e.tagName} "${text.slice(0, 30)}"`;
    }
  }
  return bad;
}"""
# The text of an element without its descendants that match a selector
TEXT_WITHOUT = """(a, selector) => {
  const c = a.cloneNode(true);
  c.querySelectorAll(selector).forEach(e => e.remove());
  return c.textContent;
}"""
FORMULAS_ARE_SET = 'n => document.querySelectorAll("mjx-container").length >= n'
IMAGES_WITHOUT_TEXT = """() => [...document.querySelectorAll('article img')]
  .filter(i => !i.alt.trim()).map(i => i.src)"""
MISSING_IMAGES = """() => [...document.querySelectorAll('article img')]
  .filter(i => i.complete && !i.naturalWidth).map(i => i.src)"""
HIDDEN_TABLE_HEADS = """() => [...document.querySelectorAll('table.dataframe thead')]
  .filter(h => getComputedStyle(h).display == 'none').length"""
# The first elements that are wider than the window, where the page scrolls sideways
TOO_WIDE = """w => {
  if (document.documentElement.scrollWidth <= w) return [];
  const sticksOut = e => e.getBoundingClientRect().right > w + 1;
  const wide = [...document.querySelectorAll('article *')].filter(sticksOut);
  return wide.slice(0, 3).map(e => e.outerHTML.slice(0, 120));
}"""
# Displayed formulas that do not fit; on a phone, although their letters are at their smallest
WIDE_FORMULAS = """() => [...document.querySelectorAll('mjx-container[display="true"]')]
  .filter(m => m.scrollWidth > m.clientWidth + 1).map(m => m.textContent.slice(0, 40))"""
# At a desktop's width: code that is shown without a click and does not fit into its box, by its longest line
WIDE_CODE = """() => [...document.querySelectorAll('article div.highlight pre')]
  .filter(e => !e.closest('.cell_output') && e.checkVisibility() && e.scrollWidth > e.clientWidth + 1)
  .map(e => e.textContent.split('\\n').reduce((a, b) => b.length > a.length ? b : a))"""
# On a phone: figures whose letters are below 70% of their size
TINY_FIGURES = """() => [...document.querySelectorAll('div.cell_output img')]
  .filter(i => i.clientWidth && i.clientWidth < Math.min(.7 * i.naturalWidth, i.naturalWidth)).length"""
# Cells of tables whose text runs into the next cell
OVERFULL_CELLS = """() => [...document.querySelectorAll('article :is(td, th)')]
  .filter(c => c.checkVisibility() && c.scrollWidth > c.clientWidth + 1)
  .map(c => c.textContent.slice(0, 40))"""
THEME = 'document.documentElement.dataset.theme'
# The code of cells that is shown without a click
OPEN_CODE = """() => [...document.querySelectorAll('div.cell_input pre')]
  .filter(e => e.checkVisibility()).map(e => e.textContent)"""


def load(tab, url):
    "Open a page and wait for its formulas; return its messages and requests, and the number of formulas."
    messages = []
    requests = []
    def on_console(m):
        if m.type in ('error', 'warning'): messages.append(m.text)
    def on_error(e): messages.append(str(e))
    def on_request(r): requests.append(r.url)
    hooks = dict(console=on_console, pageerror=on_error, request=on_request)
    for event, hook in hooks.items(): tab.on(event, hook)
    tab.goto(url, wait_until='load')
    formulas = tab.locator('.math').count()
    if formulas: tab.wait_for_function(FORMULAS_ARE_SET, arg=formulas, timeout=60_000)
    for event, hook in hooks.items(): tab.remove_listener(event, hook)
    return messages, requests, formulas


@pytest.mark.parametrize('page', PAGES)
def test_page(page, window, host):
    """A page loads without an error and from this host only.

    No directive is visible, pictures have an alternative text, formulas are typeset, nothing is too wide, and
    text is legible."""
    tab, width, scheme = window
    messages, requests, formulas = load(tab, host + page)
    assert not messages
    assert not [url for url in requests if not url.startswith((host, 'data:', 'blob:'))]
    assert tab.locator('h1').count() >= 1
    assert tab.title()
    content = tab.locator('article, #search-results').first
    text = content.evaluate(TEXT_WITHOUT, 'code.literal') # inline code may name directives
    assert not re.search(r'#\|\s*\w|:::|^\s*\{py:|nbdev\.showdoc', text, re.M)
    prose = content.evaluate(TEXT_WITHOUT, 'mjx-container, script, pre, code')
    assert '](' not in prose, 'a link that was not made'
    assert r'\|' not in content.evaluate(TEXT_WITHOUT, 'mjx-container, script, pre'), 'a type with an escape'
    if formulas: assert not re.search(r'\$\$|\\(?:frac|rho|mathrm)\b', prose), 'a formula that was not set'
    assert not tab.locator('mjx-merror').count(), 'a formula with an error'
    assert tab.evaluate(IMAGES_WITHOUT_TEXT) == []
    assert tab.evaluate(MISSING_IMAGES) == []
    assert tab.evaluate(HIDDEN_TABLE_HEADS) == 0, 'numbers without the names of their columns'
    assert tab.evaluate(THEME) == scheme
    assert not tab.evaluate(TOO_WIDE, width)
    assert tab.evaluate(CONTRAST) == {}
    if formulas: tab.wait_for_timeout(300) # on a phone their letters are fitted when all are set
    assert tab.evaluate(WIDE_FORMULAS) == []
    assert tab.evaluate(OVERFULL_CELLS) == []
    if width < 480: assert tab.evaluate(TINY_FIGURES) == 0
    else: assert tab.evaluate(WIDE_CODE) == []


def test_the_contrast_check_can_fail(browser):
    tab = browser.new_page()
    tab.set_content('<article style="background:#fff"><p style="color:#999">grey on white</p>'
                    '<p style="color:#333">dark on white</p>'
                    '<h1 style="font-size:30px;color:#888">large</h1></article>')
    assert list(tab.evaluate(CONTRAST)) == ['rgb(153, 153, 153) on rgb(255,255,255)']
    tab.close()


class Document(html.parser.HTMLParser):
    "The anchors and links of a page."
    def __init__(self, text):
        super().__init__()
        self.ids = set()
        self.links = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.ids |= {a[k] for k in ('id', 'name') if a.get(k)}
        self.links += [a[k] for k in ('href', 'src') if a.get(k)]


@functools.cache
def document(path): return Document(path.read_text(encoding='utf-8'))


def broken(page, root):
    "Return links that lead nowhere on this site, with the reason; links to other hosts must be https."
    here = root / page
    for link in document(here).links:
        u = urlsplit(link)
        if u.scheme or u.netloc:
            if u.scheme not in ('https', 'data', 'mailto'): yield link, 'neither https nor on this site'
            continue
        target = (here.parent / unquote(u.path)).resolve() if u.path else here
        if target.is_dir(): target /= 'index.html'
        if not target.is_file():
            yield link, 'no such file'
            continue
        has_anchor = u.fragment and target.suffix == '.html'
        if has_anchor and unquote(u.fragment) not in document(target).ids:
            yield link, 'no such place on the page'


@pytest.mark.parametrize('page', PAGES)
def test_links_lead_somewhere(page): assert list(broken(page, SITE)) == []


def test_the_link_check_can_fail(tmp_path):
    links = ['other.html#there', 'other.html#gone', 'no.html',
             'http://example.org', 'https://example.org', '#']
    (tmp_path / 'other.html').write_text('<p id="there"></p>')
    anchors = ''.join(f'<a href="{link}"></a>' for link in links)
    (tmp_path / 'index.html').write_text(f'{anchors}<img src="no.png">')
    found = [link for link, _ in broken('index.html', tmp_path)]
    assert found == ['other.html#gone', 'no.html', 'http://example.org', 'no.png']


def test_every_notebook_has_its_page():
    expected = {page_of(nb) for nb in notebooks()}
    assert expected <= set(PAGES)
    others = {'api.html', 'changelog.html', 'citing.html', 'contributing.html', 'search.html',
              'genindex.html'}
    assert others <= set(PAGES)
    text = (SITE / 'tutorials' / 'index.html').read_text(encoding='utf-8')
    cards = text.split('<article')[1].split('</article>')[0]
    order = re.findall(r'sd-stretched-link[^>]*href="(\w+\.html)"', cards)
    assert order == [f'{page_stem(t)}.html' for t in TUTORIALS], 'the course in its order'


METHOD_PAGES = {'SAM': 'methods/sam',
                'ASAM': 'methods/asam',
                'ESAM': 'methods/esam',
                'LookSAM': 'methods/looksam',
                'GSAM': 'methods/gsam',
                'FriendlySAM': 'methods/friendly_sam',
                'WSAM': 'methods/wsam',
                'SAF': 'methods/saf',
                'MESA': 'methods/mesa',
                'SADT': 'methods/sadt',
                'GradientCentralization': 'methods/gradient_centralization',
                'AGC': 'methods/agc',
                'Distillation': 'methods/distillation',
                'born_again': 'methods/born_again',
                'RepeatStep': 'methods/controls',
                'MSAM': 'methods/msam',
                'WeightAverage': 'methods/weight_average',
                'hessian_trace': 'measures/hessian'}
SEARCH_HAS_ENDED = r"""() =>
  document.querySelector('#search-results p.search-summary, #search-results .search-summary') &&
  !/Searching|Preparing/.test(document.querySelector('#search-results').innerText.split('\n')[0])"""
SEARCH_RESULTS = """() => [...document.querySelectorAll('#search-results ul.search li > a')]
  .map(a => a.getAttribute('href'))"""


# what people type, and pages of which one must be among the first three
TYPED = {'rho': ['guides/which_method'],
         'AMP': ['guides/amp_accumulation_clipping_ddp'],
         'gradient accumulation': ['guides/amp_accumulation_clipping_ddp'],
         'DDP': ['guides/amp_accumulation_clipping_ddp'],
         'multi GPU': ['guides/amp_accumulation_clipping_ddp'],
         'resume': ['guides/amp_accumulation_clipping_ddp'],
         'label noise': ['studies/distill_digits', 'studies/all_methods_on_noisy_digits'],
         'EMA': ['methods/weight_average'],
         'SWA': ['methods/weight_average'],
         'BatchNorm': ['guides/amp_accumulation_clipping_ddp'],
         'my own loop': ['guides/in_your_loop'],
         'timm': ['guides/in_your_loop'],
         'Hugging Face': ['guides/in_your_loop'],
         'ViT': ['models/vit'],
         'weight decay': ['core/recipe', 'core/optim', 'tutorials/94_percent_in_minutes']}


def search(word, browser, host):
    "Return the pages that the search finds, best first, each once."
    tab = browser.new_page()
    tab.goto(f'{host}search.html?q={quote(word)}')
    tab.wait_for_function(SEARCH_HAS_ENDED, timeout=30_000)
    found = tab.evaluate(SEARCH_RESULTS)
    tab.close()
    pages = [urlsplit(link).path.removesuffix('.html') for link in found]
    return list(dict.fromkeys(pages))


@pytest.mark.parametrize('word,page', METHOD_PAGES.items())
def test_search_finds(word, page, browser, host):
    found = search(word, browser, host)
    assert page in found[:5], found[:5]


@pytest.mark.parametrize('word,pages', TYPED.items())
def test_search_finds_what_people_type(word, pages, browser, host):
    found = search(word, browser, host)
    assert set(pages) & set(found[:3]), found[:5]


EXCERPTS = """() => [...document.querySelectorAll('#search-results ul.search > li p.context')]
  .map(p => p.textContent)"""
EXCERPTS_ARE_THERE = 'document.querySelectorAll("#search-results ul.search > li p.context").length > 4'


@pytest.mark.parametrize('word', ['rho', 'AMP', 'which method'])
def test_excerpts_come_from_the_text_of_a_page(word, browser, host):
    "Not from the theme's menus and the list of contents, which stand above it."
    tab = browser.new_page()
    tab.goto(f'{host}search.html?q={quote(word)}')
    tab.wait_for_function(SEARCH_HAS_ENDED, timeout=30_000)
    tab.wait_for_function(EXCERPTS_ARE_THERE, timeout=30_000)
    excerpts = tab.evaluate(EXCERPTS)
    tab.close()
    menus = 'System Settings', 'Contents', 'View the notebook'
    assert [e for e in excerpts if any(m in e for m in menus)] == []


def drawing_lines(block):
    "Return how many lines of a block of code draw, and how many lines it has."
    lines = [line for line in block.split('\n') if line.strip()]
    made = re.findall(r'^(.+?) = plt\.subplots', block, re.M)
    names = '|'.join(['plt', 'fig', r'axs?\d?', *re.findall(r'\w+', ' '.join(made))])
    return sum(bool(re.search(rf'\b({names})(\[.*?\])?\.\w+\(', line)) for line in lines), len(lines)


# the snippets of guides are there to be copied, with their imports
FOLDED = [nb for nb in notebooks() if nb.parent.name != 'guides']


@pytest.mark.parametrize('nb', FOLDED, ids=[n.stem for n in FOLDED])
def test_imports_and_drawing_are_folded(nb, browser, host):
    """No block of code that is open begins with an import, and none mostly draws.

    In a study none draws a figure at all."""
    tab = browser.new_page()
    tab.goto(host + page_of(nb))
    shown = tab.evaluate(OPEN_CODE)
    tab.close()
    for block in shown:
        assert not re.match(r'(import|from) ', block), block
        if nb in STUDIES: assert 'plt.subplots' not in block, block
        drawing, lines = drawing_lines(block)
        assert lines < 4 or drawing <= lines / 2, block


def test_the_count_of_drawing_lines_can_fail():
    block = "fig, ax = plt.subplots()\nax.plot(x)\naxs[0].set(title='t')\n\nx = figure(1)"
    assert drawing_lines(block) == (3, 4)
    assert drawing_lines("fig, (left, right_) = plt.subplots(1, 2)\nleft.plot(x)\nright_.plot(x)") == (3, 3)


# The vertical extent of the first figure of a page, in pixels from its top; `None` without a figure
FIRST_FIGURE = """() => {
  const figures = [...document.querySelectorAll('article div.cell_output img')];
  const box = figures.filter(i => i.checkVisibility() && i.clientWidth > 120)[0]?.getBoundingClientRect();
  return box ? [box.top + scrollY, box.bottom + scrollY] : null;
}"""


@pytest.fixture(scope='module')
def desk(browser):
    "A tab of 1400 x 900 pixels."
    context = browser.new_context(viewport=dict(width=1400, height=900), color_scheme='light')
    yield context.new_page()
    context.close()


@pytest.mark.parametrize('nb', METHODS, ids=[n.stem for n in METHODS])
def test_a_method_has_a_figure_within_the_first_two_screens(nb, desk, host):
    load(desk, host + page_of(nb))
    top, bottom = desk.evaluate(FIRST_FIGURE)
    assert top + .9 * (bottom - top) <= 2 * 900, 'more than a tenth of the figure is below'


def test_only_notebooks_that_install_the_library_are_offered_in_colab():
    for nb in notebooks():
        links = document(SITE / page_of(nb)).links
        offered = any(link.startswith('https://colab.research.google.com/') for link in links)
        code = [c.source for c in nbformat.read(nb, 4).cells if c.cell_type == 'code']
        installs = bool(code) and '%pip install -q sadt_nb' in code[0]
        assert offered == installs, nb.stem


def test_the_first_screen_of_the_home_page(desk, host):
    "Two sentences, three lines to install and use, and the whole dot plot."
    load(desk, host + 'index.html')
    _, bottom = desk.evaluate(FIRST_FIGURE)
    assert bottom <= 900
    prose = desk.locator('article > section > p:not(.page-links)').first.inner_text()
    assert len(re.findall(r'[.!?](?:\s|$)', prose)) == 2
    blocks = desk.locator('article div.highlight pre').all()
    shown = [b.inner_text() for b in blocks if b.bounding_box() and b.bounding_box()['y'] < 900]
    assert len(''.join(shown).splitlines()) == 3, shown
    assert shown[0].startswith('git clone')


def test_the_cards_have_minutes_to_read_and_run():
    "A notebook without a measured time, such as that of a new method, has the minutes to read alone."
    measured = json.loads((ROOT / 'docs' / 'minutes.json').read_text())
    by_stem = {page_stem(nb): nb for nb in TUTORIALS + sorted((NBS / 'methods').glob('*.ipynb'))}
    assert measured.keys() <= by_stem.keys()
    for stem, nb in by_stem.items():
        text = (SITE / nb.parent.name / 'index.html').read_text(encoding='utf-8')
        card = next(c for c in text.split('class="sd-card ')[1:] if f'href="{stem}.html"' in c)
        assert re.search(r'\d+ min to read', card), stem
        assert bool(re.search(r'about \d+ (s|min) to run', card)) == (stem in measured), stem


@pytest.mark.parametrize('code, names', [
    ("get_dls('cifar10', bs=64)", ['cifar10']), ('Run(method="sam", data="svhn")', ['svhn']),
    ("load_data(\n    'cifar100')", ['cifar100']), ("get_dls('digits')", []), ("published['cifar10']", []),
    ("Run(data='noisy_digits')", [])])
def test_a_card_names_the_data_that_its_notebook_downloads(code, names):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code),
                                               nbformat.v4.new_markdown_cell("get_dls('imagenet')")])
    assert gallery.downloads(notebook) == names
    expected = f'CPU, downloads {names[0]}' if names else 'CPU, no download'
    assert gallery.cost('a_page', {}, notebook) == expected
    assert gallery.cost('sam', {'sam': {2}}, notebook) == '2 passes per batch'


# the words in which a tutorial says its minutes
MINUTES = {'a': 1, 'two': 2, 'three': 3, 'ten': 10, 'fifteen': 15, 'twenty': 20, 'twenty-five': 25}


@pytest.mark.parametrize('nb', TUTORIALS, ids=page_stem)
def test_a_tutorial_announces_the_minutes_of_its_card(nb):
    notebook = nbformat.read(nb, as_version=4)
    text = notebook.cells[0].source
    pattern = r'takes about ([a-z-]+) minutes to read and (less than )?([a-z]+) minutes? to run'
    to_read, less, to_run = re.search(pattern, text).groups()
    reading, running = gallery.times(notebook, page_stem(nb))
    assert abs(MINUTES[to_read] - int(reading.split()[0])) < 4, reading
    number, unit = re.fullmatch(r'about (\d+) (s|min) to run', running).groups()
    minutes = int(number) / 60 if unit == 's' else int(number)
    if less: assert minutes < MINUTES[to_run], running
    else: assert round(minutes) == MINUTES[to_run], running


def test_the_check_for_open_code_can_fail(browser):
    tab = browser.new_page()
    cell = '<div class="cell_input"><pre>import torch</pre></div>'
    tab.set_content(f'{cell}<details>{cell}</details>')
    assert tab.evaluate(OPEN_CODE) == ['import torch']
    tab.close()


def test_colour_mode_and_sidebar_work(browser, host):
    """The button changes the colour mode, which survives a reload.

    On a phone the menu opens and its links work. A page has links to the previous and the next one."""
    c = browser.new_context(viewport=dict(width=375, height=800), color_scheme='light')
    tab = c.new_page()
    tab.goto(host + 'methods/sam.html')
    assert tab.evaluate(THEME) == 'light'
    tab.locator('.theme-switch-button:visible').click()
    tab.locator('.theme-change-button[data-mode=dark]').click()
    assert tab.evaluate(THEME) == 'dark'
    tab.reload()
    assert tab.evaluate(THEME) == 'dark'
    toggles = ('button.primary-toggle:visible', 'label.primary-toggle:visible',
               '.sidebar-toggle.primary-toggle:visible')
    tab.locator(', '.join(toggles)).first.click()
    menu = tab.locator('.bd-sidebar-primary:visible, dialog#pst-primary-sidebar-modal:visible').first
    menu.get_by_role('link', name='ASAM', exact=True).click()
    tab.wait_for_url('**/methods/asam.html')
    assert tab.locator('a.left-prev').get_attribute('href') == 'sam.html'
    assert tab.locator('a.right-next').get_attribute('href') == 'esam.html'
    c.close()


def test_copy_button_copies_the_code(browser, host):
    c = browser.new_context(permissions=['clipboard-read', 'clipboard-write'])
    tab = c.new_page()
    tab.goto(host + 'index.html')
    block = tab.locator('div.highlight-sh, div.highlight-bash').first
    block.hover()
    block.locator('button.copybtn').click()
    tab.wait_for_timeout(300)
    assert tab.evaluate('navigator.clipboard.readText()').startswith('git clone')
    c.close()


def stored_figures(nb):
    "Return the number of figures in the visible cells of a notebook."
    count = 0
    for c in nbformat.read(nb, 4).cells:
        if c.cell_type != 'code' or c.source.startswith('#| hide'): continue
        count += sum('image/png' in o.get('data', {}) for o in c.outputs)
    return count


def test_figures_of_the_notebooks_are_all_there():
    "A page has at least as many pictures as its notebook stores."
    for nb in notebooks():
        links = document(SITE / page_of(nb)).links
        assert sum('_images/' in link for link in links) >= stored_figures(nb), nb.stem


def printed(nb):
    "Return the number of times that visible cells of a notebook begin to print, or change the stream."
    count = 0
    for c in nbformat.read(nb, 4).cells:
        if c.cell_type != 'code' or c.source.startswith('#| hide'): continue
        streams = groupby(o.get('name') for o in c.outputs) # other outputs have no name
        count += sum(name is not None for name, _ in streams)
    return count


def test_lines_that_a_cell_prints_share_a_box():
    for nb in notebooks():
        page = (SITE / page_of(nb)).read_text(encoding='utf-8')
        assert len(re.findall('class="output (?:stream|stderr)', page)) == printed(nb), nb.stem


@pytest.fixture(scope='session')
def outside(tmp_path_factory):
    """Return a folder whose environment has all requirements but not the library, and its variables.

    With these variables pip installs the built wheel instead of asking PyPI."""
    wheels = list((ROOT / 'dist').glob('*.whl'))
    assert wheels, 'make dist comes first'
    folder = tmp_path_factory.mktemp('outside')
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', folder / 'env'], check=True)
    packages = next((folder / 'env').glob('lib/python*/site-packages'))
    # Python does not read the .pth file in that folder, which is the editable install of the checkout
    requirements = Path(nbformat.__file__).parents[1]
    (packages / 'needs.pth').write_text(str(requirements))
    env = {'PIP_NO_INDEX': '1', 'PIP_FIND_LINKS': str(ROOT / 'dist'), 'PIP_NO_DEPS': '1',
           'PIP_IGNORE_INSTALLED': '1', 'PATH': os.environ['PATH'], 'HOME': str(folder),
           'PYTHONWARNINGS': 'ignore', 'MPLBACKEND': 'agg'}
    return folder, env


@pytest.mark.parametrize('nb', TUTORIALS, ids=[t.stem for t in TUTORIALS])
def test_tutorial_starts_outside_the_checkout(nb, outside):
    "The install cell installs the missing library, and then the imports work."
    folder, env = outside
    packages = next((folder / 'env').glob('lib/python*/site-packages'))
    subprocess.run(['rm', '-rf', *packages.glob('sadt_nb*')], check=True)
    cells = [c.source for c in nbformat.read(nb, 4).cells if c.cell_type == 'code']
    assert '%pip install -q sadt_nb' in cells[0]
    script = f"""
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
for source in {json.dumps(cells[:2])}: shell.run_cell(source).raise_error()
import sadt_nb
print('from', sadt_nb.__file__)
"""
    command = [folder / 'env' / 'bin' / 'python', '-c', script]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert f'from {folder.resolve()}' in done.stdout.replace('/private', ''), done.stdout + done.stderr
