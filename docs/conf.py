"Configuration of the website for Sphinx; docs/build.py fills the source folder and calls it."
import configparser
from pathlib import Path

root = Path(__file__).parents[1]
settings = configparser.ConfigParser(delimiters=['='])
settings.read(root / 'settings.ini', encoding='utf-8')
settings = settings['DEFAULT']

project = settings['title']
author = settings['author']
release = settings['version']
project_copyright = settings['copyright']
extensions = ['myst_nb', 'sphinx_copybutton', 'sphinx_design']
templates_path = []
html_static_path = [str(root / 'docs' / '_static')]
html_css_files = ['sadt_nb.css']
html_js_files = ['fit_formulas.js', 'fit_figures.js', 'search_excerpts.js']
html_search_scorer = str(root / 'docs' / 'search_scorer.js')
html_favicon = str(root / 'docs' / '_static' / 'logo.svg')
html_logo = html_favicon

nb_execution_mode = 'off'         # pages show the outputs that are committed in the notebooks
nb_render_markdown_format = 'myst'
nb_ipywidgets_js = {}             # they would come from another host
nb_code_prompt_show = 'Show the source'
nb_code_prompt_hide = 'Hide the source'
myst_enable_extensions = ['dollarmath', 'amsmath', 'colon_fence', 'attrs_inline', 'attrs_block', 'deflist',
                          'tasklist', 'html_image']
myst_heading_anchors = 4
suppress_warnings = ['myst.header'] # a section's page may begin at any level

add_module_names = False          # the breadcrumb names the module

html_theme = 'sphinx_book_theme'
html_title = project
html_context = dict(default_mode='auto')
html_theme_options = dict(
    repository_url=settings['git_url'], use_repository_button=True, use_issues_button=True,
    use_download_button=False, use_fullscreen_button=False, home_page_in_toc=True, navbar_persistent=[],
    show_navbar_depth=1, show_toc_level=2, article_header_start=['toggle-primary-sidebar'])
html_copy_source = False
html_show_sourcelink = False
mathjax_path = 'mathjax/tex-svg.js' # es5/tex-svg.js of MathJax 3.2.2, 2 MB: no fonts and no other host
copybutton_prompt_text = r'\$ |>>> '
copybutton_prompt_is_regexp = True
copybutton_exclude = '.linenos, .gp, .go'
