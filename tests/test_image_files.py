"""Which files are images of which class, and how they are opened, in folders, archives and mapped folders."""
import io
import os
import struct
import tarfile
import warnings
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image
from sadt_nb.data import datasets, image_files
from sadt_nb.data.datasets import load_data
from sadt_nb.core import images
from sadt_nb.core.images import open_image
from sadt_nb.data.image_files import archive_images, folder_images, image_class
from sadt_nb.data.mapped import mapped_folder


def write(file, value=100, size=(8, 8), **kwargs):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', size, (value,) * 3).save(file, **kwargs)


def photos(root):
    "Two classes with two images each in both parts."
    for part in ('train', 'test'):
        for label, value in (('cat', 50), ('dog', 200)):
            for i in range(2): write(root / part / label / f'{i}.png', value + i)
    return root


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv('SADT_CACHE', str(tmp_path_factory.mktemp('cache')))


@pytest.fixture(autouse=True)
def no_other_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        yield


def classes(data):
    train, _ = data
    return train.vocab, [train.vocab[y] for y in train.y]


@pytest.mark.parametrize('name', [
    'train/.ipynb_checkpoints/1.png', 'train/cat/._1.png', '__MACOSX/train/cat/1.png', 'train/cat/.DS_Store',
    'train/cat/.thumbs/1.png'])
def test_hidden_files_are_no_images(name, tmp_path):
    root = photos(tmp_path / 'photos')
    write(root / name, format='png')
    assert classes(load_data(root)) == (['cat', 'dog'], ['cat', 'cat', 'dog', 'dog'])
    assert mapped_folder(root, tmp_path / 'mapped', 8)[0].vocab == ['cat', 'dog']


def test_the_class_is_the_first_folder_and_a_warning_says_so(tmp_path):
    root = photos(tmp_path / 'photos')
    write(root / 'train' / 'cat' / 'black' / 'at home' / '9.png')
    with pytest.warns(UserWarning, match=r"train/cat/black/at home belong to class 'cat'"):
        vocab, labels = classes(load_data(root))
    assert vocab == ['cat', 'dog'] and labels.count('cat') == 3
    with pytest.warns(UserWarning, match='belong to the class of the outer folder'):
        assert len(mapped_folder(root, tmp_path / 'mapped', 8)[0]) == 5
    assert image_class('train/mammals/cat/1.png', innermost=True) == 'cat'


def test_linked_class_folders_are_followed_but_never_in_a_circle(tmp_path):
    root = photos(tmp_path / 'photos')
    write(tmp_path / 'elsewhere' / '7.png')
    for part in ('train', 'test'):
        (root / part / 'fish').symlink_to(tmp_path / 'elsewhere', target_is_directory=True)
    (root / 'train' / 'cat' / 'again').symlink_to(root / 'train', target_is_directory=True)
    vocab, labels = classes(load_data(root))
    assert vocab == ['cat', 'dog', 'fish'] and labels.count('fish') == 1 and labels.count('cat') == 2


@pytest.mark.parametrize('suffix, kind', [('jfif', 'jpeg'), ('jpe', 'jpeg'), ('pgm', 'ppm'), ('pnm', 'ppm'),
                                          ('JPG', 'jpeg'), ('tiff', 'tiff'), ('webp', 'webp')])
def test_types_of_images(suffix, kind, tmp_path):
    root = photos(tmp_path / 'photos')
    write(root / 'train' / 'cat' / f'9.{suffix}', format=kind)
    assert len(load_data(root)[0]) == 5


def test_avif_where_pillow_has_it(tmp_path):
    from PIL import features
    if not features.check('avif'): pytest.skip('this Pillow cannot read AVIF')
    root = photos(tmp_path / 'photos')
    write(root / 'train' / 'cat' / '9.avif')
    assert len(load_data(root)[0]) == 5


def test_other_files_are_counted(tmp_path):
    root = photos(tmp_path / 'photos')
    (root / 'train' / 'cat' / 'notes.txt').write_text('')
    (root / 'train' / 'dog' / 'film.mp4').write_text('')
    (root / 'README').write_text('')
    with pytest.warns(UserWarning, match=r'not read: 1 \.mp4, 1 \.txt'): load_data(root)


def saved(image, kind, **kwargs):
    stream = io.BytesIO()
    image.save(stream, kind, **kwargs)
    stream.seek(0)
    return stream


@pytest.mark.parametrize('kind', ['png', 'tiff'])
def test_sixteen_bits_keep_their_range(kind):
    values = np.array([[0, 257, 25700, 65535]], dtype=np.uint16)
    got = np.asarray(open_image(saved(Image.fromarray(values), kind)))
    assert got.tolist() == [[[v, v, v] for v in (0, 1, 100, 255)]]


WRONG_PIXELS = [((-1, 5), np.int32), ((0, 70_000), np.int32), ((.5, .1), np.float32)]


@pytest.mark.parametrize('values, dtype', WRONG_PIXELS)
def test_pixels_that_are_no_colours_are_an_error(values, dtype):
    stream = saved(Image.fromarray(np.array([values], dtype=dtype)), 'tiff')
    with pytest.raises(ValueError, match='must have whole numbers of at most 16 bits, got values from'):
        open_image(stream)


@pytest.mark.parametrize('orientation', range(1, 9))
def test_images_are_turned_upright(orientation):
    picture = np.zeros((2, 3, 3), dtype=np.uint8)
    picture[0, 0] = 255
    image = Image.fromarray(picture)
    exif = image.getexif()
    exif[0x0112] = orientation
    turns = {1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
             5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a, -1),
             7: lambda a: a[::-1, ::-1].transpose(1, 0, 2), 8: lambda a: np.rot90(a)}
    got = np.asarray(open_image(saved(image, 'png', exif=exif)))
    assert np.array_equal(got, turns[orientation](picture))


def test_transparent_and_palette_images_become_rgb():
    red = saved(Image.new('RGBA', (2, 2), (255, 0, 0, 255)), 'png')
    assert open_image(red).getpixel((0, 0)) == (255, 0, 0)
    assert open_image(saved(Image.new('P', (2, 2)), 'gif')).mode == 'RGB'


def test_other_formats_are_not_tried(tmp_path):
    root = photos(tmp_path / 'photos')
    eps = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n'
    (root / 'train' / 'cat' / '9.png').write_bytes(eps) # Pillow would start Ghostscript for it
    for read in (load_data, lambda root: mapped_folder(root, tmp_path / 'mapped', 8)):
        with pytest.raises(ValueError, match='is not a readable image'): read(root)


def pack(root, archive, top='photos'):
    if archive.suffix == '.zip':
        with zipfile.ZipFile(archive, 'w') as z:
            for f in root.rglob('*'):
                if f.is_file(): z.write(f, f'{top}/{f.relative_to(root)}')
    else:
        with tarfile.open(archive, 'w:*' if archive.suffix == '.tar' else 'w:gz') as tar: tar.add(root, top)
    return archive


@pytest.mark.parametrize('name', ['a.zip', 'a.tar.gz', 'a.tgz', 'a.tar'])
def test_archives_hold_the_same_images(name, tmp_path):
    root = photos(tmp_path / 'photos')
    write(root / 'train' / 'cat' / '._0.png', format='png')
    if name == 'a.tar':
        with tarfile.open(tmp_path / name, 'w') as tar: tar.add(root, 'photos')
        archive = tmp_path / name
    else: archive = pack(root, tmp_path / name)
    from_archive, from_folder = load_data(archive), load_data(root)
    for a, b in zip(from_archive, from_folder):
        assert a.vocab == b.vocab and (a.x == b.x).all() and (a.y == b.y).all()
    listed = {(part, label, file) for part, label, file, _ in archive_images(archive)}
    assert listed == {(part, label, file) for part, label, file, _ in folder_images(root)}


OUTSIDE = ['../train/cat/1.png', '/train/cat/1.png', 'C:/train/cat/1.png', 'photos/../../train/cat/1.png',
           'train/cat/../../../1.png']


@pytest.mark.parametrize('name', ['a.zip', 'a.tar'])
@pytest.mark.parametrize('member', OUTSIDE)
def test_members_that_lead_outside_are_refused(member, name, tmp_path):
    if name == 'a.zip':
        with zipfile.ZipFile(tmp_path / name, 'w') as z: z.writestr(member, b'')
    else:
        with tarfile.open(tmp_path / name, 'w') as tar: tar.addfile(tarfile.TarInfo(member))
    with pytest.raises(ValueError, match='leads outside'): list(archive_images(tmp_path / name))


@pytest.mark.parametrize('kind', [tarfile.SYMTYPE, tarfile.LNKTYPE], ids=['symbolic', 'hard'])
def test_links_in_archives_are_refused(kind, tmp_path):
    link = tarfile.TarInfo('train/cat/1.png')
    link.type, link.linkname = kind, '/etc/passwd'
    with tarfile.open(tmp_path / 'a.tar', 'w') as tar: tar.addfile(link)
    with pytest.raises(ValueError, match='is a link'): list(archive_images(tmp_path / 'a.tar'))


@pytest.mark.parametrize('name', ['a.zip', 'a.tgz', 'a.rar'])
def test_damaged_and_other_files_are_named(name, tmp_path):
    if name == 'a.rar': (tmp_path / name).write_bytes(b'Rar!' + bytes(100))
    else:
        content = pack(photos(tmp_path / 'photos'), tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[:len(content) // 2])
    with pytest.raises(ValueError, match=f'{name} is not a complete tar or zip archive'):
        list(archive_images(tmp_path / name))


def test_a_changed_file_is_decoded_again(tmp_path):
    root = photos(tmp_path / 'photos')
    assert int(load_data(root)[0].x[0, 0, 0, 0]) == 50
    write(root / 'train' / 'cat' / '0.png', 77)
    os.utime(root / 'train' / 'cat' / '0.png', (1, 1))
    assert int(load_data(root)[0].x[0, 0, 0, 0]) == 77


def test_a_colon_in_a_folders_name_is_no_drive(tmp_path):
    with zipfile.ZipFile(tmp_path / 'a.zip', 'w') as z:
        for part in ('train', 'test'):
            stream = io.BytesIO()
            Image.new('RGB', (4, 4)).save(stream, 'png')
            z.writestr(f'cats: mine/{part}/cat/1.png', stream.getvalue())
    assert [item[1] for item in archive_images(tmp_path / 'a.zip')] == ['cat', 'cat']


@pytest.mark.parametrize('name', ['a.zip', 'a.tgz'])
def test_flipped_bytes_in_an_archive_are_an_error(name, tmp_path):
    content = bytearray(pack(photos(tmp_path / 'photos'), tmp_path / name).read_bytes())
    for i in range(60, 120): content[i] ^= 255
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match='is not'): load_data(tmp_path / name)


def tar_bytes(*names):
    "Return an uncompressed tar archive with an image for each name."
    stream, image = io.BytesIO(), io.BytesIO()
    Image.new('RGB', (8, 8)).save(image, 'png')
    with tarfile.open(fileobj=stream, mode='w') as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(image.getvalue())
            tar.addfile(member, io.BytesIO(image.getvalue()))
    return stream.getvalue()


FOUR = [f'{part}/{label}/1.png' for part in ('train', 'test') for label in ('cat', 'dog')]


def test_a_tar_archive_without_its_end_is_an_error(tmp_path):
    "Cut anywhere before the mark at its end, it would be a smaller data set."
    content, archive = tar_bytes(*FOUR), tmp_path / 'a.tar'
    last = content.rindex(b'IEND') // 512 # the block with the end of the last image
    for cut in range(512, (last + 1) * 512, 256):
        archive.write_bytes(content[:cut])
        with pytest.raises(ValueError, match='is not a complete tar'): list(archive_images(archive))
    archive.write_bytes(content[:(last + 2) * 512])
    assert len(list(archive_images(archive))) == 4, 'with one block of the mark, it is complete'


@pytest.mark.parametrize('member', range(4))
def test_a_damaged_header_in_a_tar_archive_is_an_error(member, tmp_path):
    content = bytearray(tar_bytes(*FOUR))
    content[content.index(FOUR[member].encode())] ^= 255
    (tmp_path / 'a.tar').write_bytes(content)
    with pytest.raises(ValueError, match='is not a complete tar'): list(archive_images(tmp_path / 'a.tar'))


@pytest.mark.parametrize('again', ['train/cat/1.png', './train/cat/1.png', 'old/train/cat/1.png'])
@pytest.mark.parametrize('name', ['a.tar', 'a.zip'])
def test_an_image_that_an_archive_has_twice_is_an_error(name, again, tmp_path):
    "An unpacked folder has the later one; or the archive has two data sets, whose images would be mixed."
    archive = tmp_path / name
    if name == 'a.tar': archive.write_bytes(tar_bytes(*FOUR, again))
    else:
        with warnings.catch_warnings(), zipfile.ZipFile(archive, 'w') as z:
            warnings.simplefilter('ignore')
            for member in (*FOUR, again): z.writestr(member, b'')
    with pytest.raises(ValueError, match="two files 'train/cat/1.png'"): list(archive_images(archive))


def test_damaged_lzma_in_a_zip_archive_is_an_error(tmp_path):
    with zipfile.ZipFile(tmp_path / 'a.zip', 'w', zipfile.ZIP_LZMA) as z:
        for name in FOUR: z.writestr(name, os.urandom(100) * 20)
    content = bytearray((tmp_path / 'a.zip').read_bytes())
    start = content.index(FOUR[1].encode()) + 40
    for i in range(start, start + 40): content[i] ^= 255
    (tmp_path / 'a.zip').write_bytes(content)
    with pytest.raises(ValueError, match='is not a complete tar or zip archive'):
        list(archive_images(tmp_path / 'a.zip'))


def test_the_message_about_another_file_is_one_line(tmp_path):
    "A command prints the last line of a message."
    (tmp_path / 'a.txt').write_text('not an archive')
    with pytest.raises(ValueError, match='^.*a.txt is not a complete tar or zip archive .*again$') as e:
        list(archive_images(tmp_path / 'a.txt'))
    assert '\n' not in str(e.value)


# Files that would fill memory or disk

def png_head(width, height):
    "Return a PNG of a few bytes whose head states a size; it has no pixels."
    def chunk(kind, data):
        body = kind + data
        return struct.pack('>I', len(data)) + body + struct.pack('>I', zlib.crc32(body))
    head = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
    chunks = chunk(b'IHDR', head) + chunk(b'IDAT', zlib.compress(b'')) + chunk(b'IEND', b'')
    return b'\x89PNG\r\n\x1a\n' + chunks


def read_mapped(root): return mapped_folder(root, root.parent / 'mapped', 8)
def read_zip(root): return load_data(pack(root, root.parent / 'a.zip'))
def read_tar(root): return load_data(pack(root, root.parent / 'a.tgz'))


READERS = [load_data, read_mapped, read_zip, read_tar]


@pytest.mark.parametrize('read', READERS, ids=lambda f: f.__name__)
@pytest.mark.parametrize('size', [(8000, 7000), (1, 50_000_001), (40_000, 40_000)])
def test_too_many_pixels_are_refused_before_they_are_decoded(size, read, tmp_path):
    root = photos(tmp_path / 'photos')
    (root / 'train' / 'cat' / '9.png').write_bytes(png_head(*size))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', Image.DecompressionBombWarning)
        reason = r'9\.png is not a readable image.*(pixels, more than|exceeds limit)'
        with pytest.raises(ValueError, match=reason): read(root)


@pytest.mark.parametrize('read', READERS, ids=lambda f: f.__name__)
def test_too_large_a_file_is_refused(read, tmp_path, monkeypatch):
    root = photos(tmp_path / 'photos')
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(
        root / 'train' / 'cat' / '9.png')
    for module in (images, image_files): monkeypatch.setattr(module, 'MOST_FILE_BYTES', 5000)
    with pytest.raises(ValueError, match=r'9\.png.*(more than 5,000)'): read(root)


LIMITS = {'MOST_MEMBERS': (7, 'it has more than 7 members'),
          'MOST_ARCHIVE_BYTES': (300, 'it unpacks to more than 300 bytes')}


@pytest.mark.parametrize('name', ['a.zip', 'a.tgz'])
@pytest.mark.parametrize('limit', LIMITS)
def test_an_archive_has_a_limit(limit, name, tmp_path, monkeypatch):
    most, message = LIMITS[limit]
    archive = pack(photos(tmp_path / 'photos'), tmp_path / name)
    monkeypatch.setattr(image_files, limit, most)
    with pytest.raises(ValueError, match=f'{name} is not read, because {message}'):
        list(archive_images(archive))


def test_a_member_that_states_a_smaller_size_is_not_read_whole(tmp_path, monkeypatch):
    "A zip of a megabyte of zeros whose directory says 10 bytes."
    archive = tmp_path / 'a.zip'
    with zipfile.ZipFile(archive, 'w', zipfile.ZIP_DEFLATED) as z: z.writestr('train/cat/1.png', bytes(10**6))
    content = archive.read_bytes()
    archive.write_bytes(content.replace(struct.pack('<I', 10**6), struct.pack('<I', 10)))
    monkeypatch.setattr(image_files, 'MOST_FILE_BYTES', 5000)
    with pytest.raises(ValueError): list(archive_images(archive))


def test_the_list_of_tar_members_does_not_grow(tmp_path):
    archive = pack(photos(tmp_path / 'photos'), tmp_path / 'a.tgz')
    seen = []
    real = tarfile.TarFile.extractfile
    def extractfile(tar, member):
        seen.append(len(tar.members))
        return real(tar, member)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(tarfile.TarFile, 'extractfile', extractfile)
        assert len(list(archive_images(archive))) == 8
    assert max(seen) <= 1


def test_all_images_together_have_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, 'MOST_ALL_PIXELS', 8 * 64 - 1)
    with pytest.raises(ValueError, match='more than 511 pixels together, too many for the memory'):
        load_data(photos(tmp_path / 'photos'))
    assert len(load_data(tmp_path / 'photos', size=4)[0]) == 4


def test_control_characters_in_names_are_shown_as_escapes(tmp_path):
    root = photos(tmp_path / 'photos')
    (root / 'train' / 'cat' / 'a.\x1b[2J').write_text('')
    write(root / 'train' / 'cat' / 'b\x1b]0;title\x07' / '9.png')
    with pytest.warns(UserWarning) as caught: load_data(root)
    text = ' '.join(str(w.message) for w in caught)
    assert r'.\x1b[2j' in text and r'b\x1b]0;title\x07' in text
    assert '\x1b' not in text and '\x07' not in text


@pytest.mark.parametrize('options, label', [({}, 'mammals'), (dict(innermost=True), 'cat')])
def test_the_class_of_an_image_in_an_archive(options, label, tmp_path):
    with zipfile.ZipFile(tmp_path / 'a.zip', 'w') as z: z.writestr('train/mammals/cat/1.png', b'')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        found, = archive_images(tmp_path / 'a.zip', **options)
    assert found[:2] == ('train', label)
