"""The built website in a real browser; `make test-site` builds it and runs this.

Every page is opened once on a desk and once on a phone, in the light and in the dark."""
import functools
import html.parser
import json
import os
import re
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parents[1]
SITE = ROOT / '_build' / 'html'
NBS = ROOT / 'nbs'
PAGES = sorted(p.relative_to(SITE).as_posix() for p in SITE.rglob('*.html') if '_static' not in p.parts)
CONTENT = [p for p in PAGES if p not in ('genindex.html', 'search.html', 'py-modindex.html')]
TUTORIALS = sorted((NBS / 'tutorials').glob('*.ipynb'))


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args): pass


@pytest.fixture(scope='session')
def host():
    server = ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=SITE))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/'
    server.shutdown()


@pytest.fixture(scope='session')
def browser():
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=os.environ.get('CHROMIUM', '/usr/bin/chromium'),
                              args=['--no-sandbox', '--disable-gpu', '--disable-background-networking', '--disable-component-update', '--disable-sync', '--no-first-run'])
        yield b
        b.close()


@pytest.fixture(scope='session', params=[(1280, 'light'), (375, 'dark')], ids=['desk, light', 'phone, dark'])
def window(request, browser):
    width, scheme = request.param
    c = browser.new_context(viewport=dict(width=width, height=900), color_scheme=scheme)
    yield c.new_page(), width, scheme
    c.close()


# Text nodes whose contrast with what lies behind them is below WCAG's AA: 4.5, or 3 for large letters. Text over pictures is left out.
CONTRAST = r"""() => {
  const parse = c => { const m = c.match(/[\d.]+/g).map(Number); return m.length < 4 ? [...m.slice(0, 3), 1] : m };
  const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
  const light = c => { const [r, g, b] = c.map(v => { v /= 255; return v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4 }); return .2126 * r + .7152 * g + .0722 * b };
  const behind = e => { const stack = []; for (let n = e; n; n = n.parentElement) { const c = parse(getComputedStyle(n).backgroundColor); if (c[3] > 0) stack.push(c); if (c[3] === 1) break }
                        return stack.reverse().reduce((b, t) => over(t, b), [255, 255, 255, 1]) };
  const bad = {}, walker = document.createTreeWalker(document.querySelector('article') || document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const e = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || e.closest('svg, script, style, mjx-container, .visually-hidden, .headerlink') || !e.checkVisibility({checkOpacity: true, checkVisibilityCSS: true})) continue;
    const s = getComputedStyle(e), b = behind(e), f = over(parse(s.color), b), [hi, lo] = [light(f), light(b)].sort((x, y) => y - x), ratio = (hi + .05) / (lo + .05);
    const large = parseFloat(s.fontSize) >= 24 || parseFloat(s.fontSize) >= 18.66 && +s.fontWeight >= 700;
    if (ratio < (large ? 3 : 4.5)) bad[`${s.color} on rgb(${b.slice(0, 3).map(Math.round)})`] = `${ratio.toFixed(2)}: ${e.className || e.tagName} "${walker.currentNode.textContent.trim().slice(0, 30)}"`;
  }
  return bad }"""


@pytest.mark.parametrize('page', PAGES)
def test_page(page, window, host):
    "Loads without an error and without another host; no directive shows; pictures have a text; formulas are set; nothing sticks out; everything can be read."
    tab, width, scheme = window
    said, asked = [], []
    on_console = lambda m: said.append(m.text) if m.type in ('error', 'warning') else None
    on_error, on_request = lambda e: said.append(str(e)), lambda r: asked.append(r.url)
    for event, hook in (('console', on_console), ('pageerror', on_error), ('request', on_request)): tab.on(event, hook)
    tab.goto(host + page, wait_until='load')
    formulas = tab.locator('.math').count()
    if formulas: tab.wait_for_function('n => document.querySelectorAll("mjx-container").length >= n', arg=formulas, timeout=60_000)
    for event, hook in (('console', on_console), ('pageerror', on_error), ('request', on_request)): tab.remove_listener(event, hook)
    assert not said
    assert not [u for u in asked if not u.startswith((host, 'data:', 'blob:'))]
    assert tab.locator('h1').count() >= 1 and tab.title()
    text = tab.locator('article, #search-results').first.evaluate("a => { const c = a.cloneNode(true); c.querySelectorAll('code.literal').forEach(e => e.remove()); return c.textContent }") # a page may speak of directives, in code within a line
    assert not re.search(r'#\|\s*\w|:::|^\s*\{py:|nbdev\.showdoc', text, re.M)
    if formulas: assert not re.search(r'\$\$|\\(?:frac|rho|mathrm)\b', tab.locator('article, #search-results').first.evaluate("a => { const c = a.cloneNode(true); c.querySelectorAll('mjx-container, script, pre, code').forEach(e => e.remove()); return c.textContent }")), 'a formula that was not set'
    assert not tab.locator('mjx-merror').count(), 'a formula with an error'
    assert tab.evaluate("[...document.querySelectorAll('article img')].filter(i => !i.alt.trim()).map(i => i.src)") == []
    assert tab.evaluate("[...document.querySelectorAll('article img')].filter(i => i.complete && !i.naturalWidth).map(i => i.src)") == []
    assert tab.evaluate("[...document.querySelectorAll('table.dataframe thead')].filter(h => getComputedStyle(h).display == 'none').length") == 0, 'numbers without the names of their columns'
    assert tab.evaluate("document.documentElement.dataset.theme") == scheme
    wide = tab.evaluate("w => document.documentElement.scrollWidth <= w ? [] : [...document.querySelectorAll('article *')].filter(e => e.getBoundingClientRect().right > w + 1).slice(0, 3).map(e => e.outerHTML.slice(0, 120))", width)
    assert not wide
    assert tab.evaluate(CONTRAST) == {}


def test_the_contrast_check_can_fail(browser):
    tab = browser.new_page()
    tab.set_content('<article style="background:#fff"><p style="color:#999">grey on white</p><p style="color:#333">dark on white</p><h1 style="font-size:30px;color:#888">large</h1></article>')
    assert list(tab.evaluate(CONTRAST)) == ['rgb(153, 153, 153) on rgb(255,255,255)']
    tab.close()


class Document(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.ids, self.links = set(), []
        self.feed(text)
    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.ids |= {a[k] for k in ('id', 'name') if a.get(k)}
        self.links += [a[k] for k in ('href', 'src') if a.get(k)]

@functools.cache
def document(path): return Document(path.read_text(encoding='utf-8'))

def broken(page, root):
    "Links that lead nowhere on this site, with what is wrong; those to other hosts must be https."
    here = root / page
    for link in document(here).links:
        u = urlsplit(link)
        if u.scheme or u.netloc:
            if u.scheme not in ('https', 'data', 'mailto'): yield link, 'neither https nor on this site'
            continue
        target = (here.parent / unquote(u.path)).resolve() if u.path else here
        if target.is_dir(): target /= 'index.html'
        if not target.is_file(): yield link, 'no such file'
        elif u.fragment and target.suffix == '.html' and unquote(u.fragment) not in document(target).ids: yield link, 'no such place on the page'

@pytest.mark.parametrize('page', PAGES)
def test_links_lead_somewhere(page): assert list(broken(page, SITE)) == []

def test_the_link_check_can_fail(tmp_path):
    (tmp_path / 'other.html').write_text('<p id="there"></p>')
    (tmp_path / 'index.html').write_text('<a href="other.html#there"></a><a href="other.html#gone"></a><a href="no.html"></a><img src="no.png"><a href="http://example.org"></a><a href="https://example.org"></a><a href="#"></a>')
    assert [link for link, _ in broken('index.html', tmp_path)] == ['other.html#gone', 'no.html', 'no.png', 'http://example.org']


def test_every_notebook_has_its_page():
    expected = {(nb.parent.relative_to(NBS) / re.sub(r'^\d+_', '', nb.stem)).as_posix() + '.html' for nb in NBS.rglob('*.ipynb') if nb.stem != 'all' and '.ipynb_checkpoints' not in nb.parts}
    assert expected <= set(PAGES) and {'api.html', 'changelog.html', 'citing.html', 'contributing.html', 'search.html', 'genindex.html'} <= set(PAGES)
    order = re.findall(r'href="(\w+\.html)"', (SITE / 'tutorials' / 'index.html').read_text(encoding='utf-8').split('<article')[1].split('</table>')[0])
    assert order == [re.sub(r'^\d+_', '', t.stem) + '.html' for t in TUTORIALS], 'the course in its order'


METHOD_PAGES = {'SAM': 'methods/sam', 'ASAM': 'methods/asam', 'ESAM': 'methods/esam', 'LookSAM': 'methods/looksam', 'GSAM': 'methods/gsam', 'SAF': 'methods/saf', 'MESA': 'methods/mesa', 'SADT': 'methods/sadt',
                'GradientCentralization': 'methods/gradient_centralization', 'AGC': 'methods/agc', 'Distillation': 'methods/distillation', 'born_again': 'methods/born_again', 'RepeatStep': 'methods/controls', 'hessian_trace': 'measures/hessian'}

@pytest.mark.parametrize('word,page', METHOD_PAGES.items())
def test_search_finds(word, page, browser, host):
    tab = browser.new_page()
    tab.goto(f'{host}search.html?q={word}')
    tab.wait_for_function('document.querySelector("#search-results p.search-summary, #search-results .search-summary") && !/Searching|Preparing/.test(document.querySelector("#search-results").innerText.split("\\n")[0])', timeout=30_000)
    found = tab.evaluate("[...document.querySelectorAll('#search-results ul.search li > a')].map(a => a.getAttribute('href'))")
    tab.close()
    assert any(f'{page}.html' in f for f in found[:5]), found[:5]


def test_colour_mode_and_sidebar_work(browser, host):
    "The button changes the mode, which is remembered; on a phone the menu opens and leads on; previous and next are there."
    c = browser.new_context(viewport=dict(width=375, height=800), color_scheme='light')
    tab = c.new_page()
    tab.goto(host + 'methods/sam.html')
    mode = lambda: tab.evaluate("document.documentElement.dataset.theme")
    assert mode() == 'light'
    tab.locator('.theme-switch-button:visible').click()
    tab.locator('.theme-change-button[data-mode=dark]').click()
    assert mode() == 'dark'
    tab.reload()
    assert mode() == 'dark'
    tab.locator('button.primary-toggle:visible, label.primary-toggle:visible, .sidebar-toggle.primary-toggle:visible').first.click()
    menu = tab.locator('.bd-sidebar-primary:visible, dialog#pst-primary-sidebar-modal:visible').first
    menu.get_by_role('link', name='ASAM', exact=True).click()
    tab.wait_for_url('**/methods/asam.html')
    assert tab.locator('a.left-prev').get_attribute('href') == 'sam.html' and tab.locator('a.right-next').get_attribute('href') == 'esam.html'
    c.close()


def test_copy_button_copies_the_code(browser, host):
    c = browser.new_context(permissions=['clipboard-read', 'clipboard-write'])
    tab = c.new_page()
    tab.goto(host + 'index.html')
    block = tab.locator('div.highlight-sh, div.highlight-bash').first
    block.hover()
    block.locator('button.copybtn').click()
    tab.wait_for_timeout(300)
    assert tab.evaluate('navigator.clipboard.readText()').startswith('make demo')
    c.close()


def test_figures_of_the_notebooks_are_all_there():
    "As many pictures with an alt text as the notebooks store."
    for nb in NBS.rglob('*.ipynb'):
        if nb.stem == 'all' or '.ipynb_checkpoints' in nb.parts: continue
        page = document(SITE / nb.parent.relative_to(NBS) / (re.sub(r'^\d+_', '', nb.stem) + '.html'))
        stored = sum('image/png' in o.get('data', {}) for c in nbformat.read(nb, 4).cells if c.cell_type == 'code' and not c.source.startswith('#| hide') for o in c.outputs)
        assert sum('_images/' in l for l in page.links) >= stored, nb.stem


@pytest.fixture(scope='session')
def outside(tmp_path_factory):
    "An environment that has all that the library needs, but not the library; pip finds its wheel where a reader's pip would find PyPI."
    wheels = list((ROOT / 'dist').glob('*.whl'))
    assert wheels, 'make dist comes first'
    folder = tmp_path_factory.mktemp('outside')
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', folder / 'env'], check=True)
    packages = next((folder / 'env').glob('lib/python*/site-packages'))
    (packages / 'needs.pth').write_text(str(Path(nbformat.__file__).parents[1])) # the editable install of the checkout is a .pth in there, which is not followed
    return folder, {'PIP_NO_INDEX': '1', 'PIP_FIND_LINKS': str(ROOT / 'dist'), 'PIP_NO_DEPS': '1', 'PIP_IGNORE_INSTALLED': '1', 'PATH': os.environ['PATH'], 'HOME': str(folder), 'PYTHONWARNINGS': 'ignore', 'MPLBACKEND': 'agg'}

@pytest.mark.parametrize('nb', TUTORIALS, ids=[t.stem for t in TUTORIALS])
def test_tutorial_starts_outside_the_checkout(nb, outside):
    "Its install cell installs the library where it is missing, and its imports work then."
    folder, env = outside
    subprocess.run(['rm', '-rf', *next((folder / 'env').glob('lib/python*/site-packages')).glob('sadt_nb*')], check=True)
    cells = [c.source for c in nbformat.read(nb, 4).cells if c.cell_type == 'code']
    assert '%pip install -q sadt_nb' in cells[0]
    script = f"""
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
for source in {json.dumps(cells[:2])}: shell.run_cell(source).raise_error()
import sadt_nb
print('from', sadt_nb.__file__)
"""
    done = subprocess.run([folder / 'env' / 'bin' / 'python', '-c', script], cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert f'from {folder.resolve()}' in done.stdout.replace('/private', ''), done.stdout + done.stderr
