"Package metadata is in settings.ini, where nbdev keeps it; this file passes it to setuptools."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_namespace_packages, setup

ini = ConfigParser(delimiters=['='])
ini.read('settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
statuses = {1: '1 - Planning', 2: '2 - Pre-Alpha', 3: '3 - Alpha', 4: '4 - Beta', 5: '5 - Production/Stable'}
extras = ('dev', 'distributed', 'integrations', 'bench', 'timm', 'clip', 'ray', 'weights', 'sweep',
          'completion')

STORED = [f'published/**/*.{end}' for end in ('json', 'gz', 'safetensors', 'sha256')]

setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    keywords=cfg['keywords'],
    author=cfg['author'],
    author_email=cfg['author_email'],
    url=cfg['git_url'],
    license='Apache-2.0',
    long_description=Path('README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    # folders of results have no __init__.py
    packages=find_namespace_packages(include=['sadt_nb', 'sadt_nb.*'], exclude=['*.__pycache__']),
    include_package_data=True,
    package_data={'sadt_nb': ['py.typed', *STORED]},
    python_requires='>=' + cfg['min_python'],
    install_requires=cfg['requirements'].split(),
    extras_require={extra: cfg[f'{extra}_requirements'].split() for extra in extras},
    entry_points={'console_scripts': cfg['console_scripts'].split()},
    zip_safe=False,
    classifiers=[
        f'Development Status :: {statuses[int(cfg["status"])]}',
        'Intended Audience :: Science/Research',
        'Programming Language :: Python :: 3',
        'Programming Language :: Python :: 3.11'],
)
