"""Rows, image and mask files, and the cache of resized files."""

import contextlib
import io
import os
import pickle
import struct
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from semiseg.data import cache, formats
from semiseg.data.cache import open_image, open_mask, open_pair, resize_image, resize_mask, target_size
from semiseg.data.formats import MaskCode, image_size, mask_values, read_image, read_mask, write_mask
from semiseg.data.rows import Row, Rows
from semiseg.types import IGNORE, InputError

H, W = 6, 9
Array = NDArray[Any]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEMISEG_CACHE", str(tmp_path / "cache"))


def noise(*shape: int, high: int = 256, dtype: Any = np.uint8) -> Array:
    return np.random.default_rng(0).integers(0, high, shape).astype(dtype)


def save(path: Path, array: Array, mode: str | None = None, **options: Any) -> Path:
    image = Image.fromarray(array)
    (image if mode is None else image.convert(mode)).save(path, **options)
    return path


def save_png(path: Path, array: Array, depth: int, kind: int) -> Path:
    """A PNG of any bit depth and colour type (0 grey, 2 RGB, 4 grey and alpha, 6 RGBA), which Pillow cannot write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    def line(row: Array) -> bytes:
        if depth >= 8:
            return row.astype(f">u{depth // 8}").tobytes()
        return np.packbits(np.unpackbits(row[:, None], axis=1)[:, 8 - depth :]).tobytes()

    header = struct.pack(">IIBBBBB", array.shape[1], array.shape[0], depth, kind, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + line(row) for row in array))
    signature = b"\x89PNG\r\n\x1a\n"
    path.write_bytes(signature + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))
    return path


def one_sentence(caught: pytest.ExceptionInfo[InputError], *words: object) -> None:
    text = str(caught.value)
    assert text.endswith(".")
    assert "\n" not in text
    for word in words:
        assert str(word) in text


# ----------------------------------------------------------------------------------------------------------------- rows


def test_a_mask_read_as_other_classes(tmp_path: Path) -> None:
    """Each class has a place elsewhere, or is ignored; whatever the encoding."""
    Image.fromarray(np.array([[0, 1, 2, 255]], np.uint8)).save(tmp_path / "ids.png")
    to = [7, IGNORE, 7]
    assert read_mask(tmp_path / "ids.png", MaskCode(3).mapped(to)).tolist() == [[7, IGNORE, 7, IGNORE]]
    colours = ((1, 0, 0), (2, 0, 0), (3, 0, 0))
    Image.fromarray(np.array([[colours[2], colours[1]]], np.uint8)).save(tmp_path / "rgb.png")
    assert read_mask(tmp_path / "rgb.png", MaskCode(3, colours).mapped(to)).tolist() == [[7, IGNORE]]


def test_pools_with_codes_of_their_own() -> None:
    one, two = MaskCode(3).mapped([1, 0, 2]), MaskCode(2)
    own = Rows.of("/r", ["a", "b"], ["m", "n"])
    pools = own, own.read_by(one), own.read_by(two), own.read_by(one)
    both = (pools[0] + pools[1]) + (pools[2] + pools[3])
    assert [row.code for row in both] == [None, None, one, one, two, two, one, one]
    assert both.codes == (one, two)
    assert [row.code for row in both[[4, 0, 7]]] == [two, None, one]
    assert both.without_masks()[2].code is None


def test_rows_give_paths_and_parts() -> None:
    rows = Rows.of("/data", ["a.jpg", "sub/b.jpg", "c.jpg"], ["m/a.png", "", "m/c.png"])
    assert len(rows) == 3
    assert rows[0] == Row(Path("/data/a.jpg"), Path("/data/m/a.png"), "a.jpg")
    assert rows[-2] == Row(Path("/data/sub/b.jpg"), None, "sub/b.jpg")
    assert [row.name for row in rows[1:]] == ["sub/b.jpg", "c.jpg"]
    assert rows[np.array([2, 0])].names.tolist() == ["c.jpg", "a.jpg"]
    assert rows[[1]].names.tolist() == ["sub/b.jpg"]
    assert len(rows[[]]) == 0
    assert rows.masked.tolist() == [True, False, True]
    assert rows[rows.masked].mask.tolist() == ["m/a.png", "m/c.png"]
    assert not rows.without_masks().masked.any()
    assert rows.masked.any()
    with pytest.raises(IndexError):
        rows[3]


def test_rows_add() -> None:
    here, there = Rows.of("/a", ["x.jpg"], ["x.png"]), Rows.of("/b", ["x.jpg", "/c/y.jpg"])
    same = here + here
    assert same.root == "/a"
    assert same.names.tolist() == ["x.jpg", "x.jpg"]
    both = here + there
    assert [row.image for row in both] == [Path("/a/x.jpg"), Path("/b/x.jpg"), Path("/c/y.jpg")]
    assert [row.mask for row in both] == [Path("/a/x.png"), None, None]
    assert len(both + here) == 4


def test_rows_pickle() -> None:
    rows = Rows.of("/data", [f"images/a_rather_long_name_{i:04}.jpg" for i in range(50)])
    copy = pickle.loads(pickle.dumps(rows))
    assert copy.root == rows.root
    assert copy[7] == rows[7]
    assert copy.masked.tolist() == rows.masked.tolist()


def test_a_million_rows_are_small() -> None:
    images = [f"images/train/sequence_05/frame_{i:07}.jpg" for i in range(1_000_000)]
    tracemalloc.start()
    rows = Rows.of("/data", images)
    size, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size > 30e6  # else the columns escape the measurement
    assert len(rows) == 1_000_000
    assert rows[999_999].name.endswith("0999999.jpg")
    assert size < 150e6
    assert peak < 200e6


# --------------------------------------------------------------------------------------------------------------- images


def test_rgb_and_grey_of_8_bits(tmp_path: Path) -> None:
    colour, grey = noise(H, W, 3), noise(H, W)
    for ending in ("png", "bmp", "tif"):
        rgb, single = save(tmp_path / f"c.{ending}", colour), save(tmp_path / f"g.{ending}", grey)
        np.testing.assert_array_equal(read_image(rgb, 3), colour)
        np.testing.assert_array_equal(read_image(single, 1), grey[..., None])
        np.testing.assert_array_equal(read_image(single, 5), np.repeat(grey[..., None], 5, 2))
    jpeg = save(tmp_path / "c.jpg", np.full((H, W, 3), (200, 100, 50), np.uint8), quality=95)
    assert read_image(jpeg, 3).dtype == np.uint8
    assert abs(read_image(jpeg, 3).astype(int) - (200, 100, 50)).max() <= 3


def test_images_are_contiguous_and_writeable(tmp_path: Path) -> None:
    for path in (save(tmp_path / "a.png", noise(H, W, 4)), save(tmp_path / "b.jpg", noise(H, W, 3))):
        image = read_image(path, 3)
        assert image.flags.c_contiguous
        assert image.flags.writeable


def test_16_bits_are_exact(tmp_path: Path) -> None:
    grey, colour = noise(H, W, high=2**16, dtype=np.uint16), noise(H, W, 4, high=2**16, dtype=np.uint16)
    np.testing.assert_array_equal(read_image(save(tmp_path / "g.png", grey), 1)[..., 0], grey)
    np.testing.assert_array_equal(read_image(save(tmp_path / "g.tif", grey), 3)[..., 2], grey)
    np.testing.assert_array_equal(read_image(save(tmp_path / "g.pgm", grey), 1)[..., 0], grey)
    np.testing.assert_array_equal(read_image(save_png(tmp_path / "c.png", colour[..., :3], 16, 2), 3), colour[..., :3])
    np.testing.assert_array_equal(read_image(save_png(tmp_path / "a.png", colour, 16, 6), 3), colour[..., :3])
    np.testing.assert_array_equal(read_image(save_png(tmp_path / "l.png", colour[..., :2], 16, 4), 1), colour[..., :1])
    tifffile.imwrite(tmp_path / "c.tif", colour[..., :3], photometric="rgb")
    np.testing.assert_array_equal(read_image(tmp_path / "c.tif", 3), colour[..., :3])
    assert read_image(tmp_path / "c.tif", 3).dtype == np.uint16


def test_alpha_is_dropped_unless_asked_for(tmp_path: Path) -> None:
    rgba, la = noise(H, W, 4), noise(H, W, 2)
    np.testing.assert_array_equal(read_image(save(tmp_path / "a.png", rgba), 3), rgba[..., :3])
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", 4), rgba)
    save_png(tmp_path / "l.png", la, 8, 4)
    np.testing.assert_array_equal(read_image(tmp_path / "l.png", 3), np.repeat(la[..., :1], 3, 2))


def test_palette_one_bit_and_cmyk(tmp_path: Path) -> None:
    index = noise(H, W, high=4)
    palette = noise(4, 3)
    image = Image.fromarray(index)
    image.putpalette(palette.tobytes())
    image.save(tmp_path / "p.png")
    np.testing.assert_array_equal(read_image(tmp_path / "p.png", 3), palette[index])
    bits = noise(H, W, high=2)
    np.testing.assert_array_equal(read_image(save(tmp_path / "b.png", bits * 255, "1"), 1)[..., 0], bits * 255)
    cmyk = save(tmp_path / "c.tif", np.full((H, W, 3), (250, 20, 130), np.uint8), "CMYK")
    assert (read_image(cmyk, 3) == (250, 20, 130)).all()
    jpeg = save(tmp_path / "c.jpg", np.full((H, W, 3), (250, 20, 130), np.uint8), "CMYK", quality=95)
    assert abs(read_image(jpeg, 3).astype(int) - (250, 20, 130)).max() <= 4


def test_colour_to_one_channel_is_luma_at_any_depth(tmp_path: Path) -> None:
    colour = noise(H, W, 3)
    luma = np.asarray(Image.fromarray(colour).convert("L"))
    np.testing.assert_array_equal(read_image(save(tmp_path / "c.png", colour), 1)[..., 0], luma)
    wide = np.full((H, W, 3), (65535, 65535, 65535), np.uint16)
    assert (read_image(save_png(tmp_path / "w.png", wide, 16, 2), 1) == 65535).all()


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("ending", ["png", "tif", "jpg"])
def test_exif_rotation(tmp_path: Path, ending: str, turn: int) -> None:
    stored = np.kron(noise(2, 3), np.ones((16, 16), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = turn
    path = save(tmp_path / f"a.{ending}", stored, exif=exif)
    flips = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    image = Image.fromarray(stored)
    shown = np.asarray(image.transpose(flips[turn]) if turn in flips else image).astype(int)
    read = read_image(path, 1)[..., 0].astype(int)
    assert image_size(path) == shown.shape
    assert read.shape == shown.shape
    assert abs(read - shown).max() <= (0 if ending != "jpg" else 12)


def test_exif_rotation_of_many_channels(tmp_path: Path) -> None:
    stored = noise(H, W, 6)
    tag = [(0x0112, "H", 1, 6, True)]
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="minisblack", planarconfig="contig", extratags=tag)
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif", 6), np.rot90(stored, -1))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_tiff_of_many_channels(tmp_path: Path, dtype: Any) -> None:
    many = noise(H, W, 5, high=np.iinfo(dtype).max + 1, dtype=dtype)
    path = tmp_path / "a.tif"
    first = np.ascontiguousarray(many.transpose(2, 0, 1))
    for array, options in (
        (many, {"photometric": "minisblack", "planarconfig": "contig"}),
        (many, {"photometric": "rgb"}),  # Pillow opens the first three or four of these and says nothing of the others
        (many, {"photometric": "minisblack", "planarconfig": "contig", "compression": "zlib"}),
        (first, {"photometric": "minisblack", "planarconfig": "separate"}),
        (first, {"photometric": "minisblack"}),  # as pages
        (many, {"photometric": "minisblack"}),  # as pages of (W, N)
        (first, {"photometric": "minisblack", "imagej": True, "metadata": {"axes": "CYX"}}),
    ):
        tifffile.imwrite(path, array, **options)
        np.testing.assert_array_equal(read_image(path, 5), many, err_msg=str(options))


def test_tiff_with_alpha_or_a_fourth_band(tmp_path: Path) -> None:
    for dtype in (np.uint8, np.uint16):
        four = noise(H, W, 4, dtype=dtype)
        tifffile.imwrite(tmp_path / "a.tif", four, photometric="rgb", extrasamples=["unassalpha"])
        np.testing.assert_array_equal(read_image(tmp_path / "a.tif", 3), four[..., :3])
        np.testing.assert_array_equal(read_image(tmp_path / "a.tif", 4), four)
        tifffile.imwrite(tmp_path / "b.tif", four, photometric="rgb", extrasamples=["unspecified"])
        np.testing.assert_array_equal(read_image(tmp_path / "b.tif", 4), four)
        with pytest.raises(InputError) as caught:
            read_image(tmp_path / "b.tif", 3)
        one_sentence(caught, "b.tif", "4 channels", "data.channels")


def test_tiff_with_a_thumbnail(tmp_path: Path) -> None:
    colour = noise(20, 30, 3)
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        writer.write(colour, photometric="rgb", metadata=None)
        writer.write(colour[::4, ::4].copy(), photometric="rgb", subfiletype=1, metadata=None)
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif", 3), colour)


def test_sizes_without_and_with_decoding(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", noise(H, W, 5))
    tifffile.imwrite(tmp_path / "a.tif", noise(H, W, 5), photometric="minisblack")  # as pages of (W, N)
    for name in ("a.npy", "a.tif"):
        assert image_size(tmp_path / name) == (H, W)
    with pytest.raises(InputError, match=r"gone\.png"):
        image_size(tmp_path / "gone.png")


@pytest.mark.skipif(find_spec("imagecodecs") is not None, reason="imagecodecs is installed")
def test_tiff_that_needs_another_package(tmp_path: Path) -> None:
    pages = [Image.fromarray(noise(H, W)), Image.fromarray(noise(H, W))]
    pages[0].save(tmp_path / "a.tif", compression="tiff_lzw", save_all=True, append_images=pages[1:])
    with pytest.raises(InputError) as caught:
        read_image(tmp_path / "a.tif", 2)
    one_sentence(caught, "a.tif", "pip install imagecodecs")


def test_npy(tmp_path: Path) -> None:
    many, grey = noise(H, W, 7, high=2**16, dtype=np.uint16), noise(H, W)
    np.save(tmp_path / "m.npy", many)
    np.save(tmp_path / "g.npy", grey)
    np.testing.assert_array_equal(read_image(tmp_path / "m.npy", 7), many)
    np.testing.assert_array_equal(read_image(tmp_path / "g.npy", 3)[..., 1], grey)
    np.save(tmp_path / "f.npy", grey.astype(np.float32))
    np.save(tmp_path / "d.npy", noise(2, H, W, 3))
    np.save(tmp_path / "o.npy", np.array([[{}]]), allow_pickle=True)
    for name, words in (("f", ("float32", "8 or 16")), ("d", ("(H, W, N)",)), ("o", ("decoded",))):
        with pytest.raises(InputError) as caught:
            read_image(tmp_path / f"{name}.npy", 3)
        one_sentence(caught, f"{name}.npy", *words)


def test_channels_that_do_not_fit(tmp_path: Path) -> None:
    np.save(tmp_path / "m.npy", noise(H, W, 7))
    for path, channels in ((tmp_path / "m.npy", 3), (save(tmp_path / "c.png", noise(H, W, 3)), 4)):
        with pytest.raises(InputError) as caught:
            read_image(path, channels)
        one_sentence(caught, path, "data.channels")


def damaged(tmp_path: Path) -> Iterator[Path]:
    """Whole files of every decoder, cut at many places."""
    colour = noise(40, 60, 3)
    save(tmp_path / "a.png", colour)
    save(tmp_path / "a.jpg", colour)
    save(tmp_path / "a.bmp", colour)
    save(tmp_path / "a.gif", colour)
    save(tmp_path / "a.webp", colour)
    save(tmp_path / "plain.tif", colour)
    save(tmp_path / "lzw.tif", colour, compression="tiff_lzw")
    save_png(tmp_path / "deep.png", noise(40, 60, 3, dtype=np.uint16), 16, 2)
    tifffile.imwrite(tmp_path / "many.tif", noise(40, 60, 6), photometric="minisblack", planarconfig="contig")
    tifffile.imwrite(tmp_path / "deep.tif", noise(40, 60, 3, dtype=np.uint16), photometric="rgb", compression="zlib")
    np.save(tmp_path / "a.npy", colour)
    for whole in sorted(tmp_path.glob("*.*")):
        data = whole.read_bytes()
        for share in (0, 0.001, 0.01, 0.1, 0.5, 0.9):
            cut = tmp_path / "cut" / f"{whole.stem}-{share}{whole.suffix}"
            cut.parent.mkdir(exist_ok=True)
            cut.write_bytes(data[: int(len(data) * share)])
            yield cut


@pytest.mark.filterwarnings("ignore")
def test_truncated_files_name_themselves(tmp_path: Path) -> None:
    cuts = list(damaged(tmp_path))
    assert len(cuts) == 66
    for path in cuts:
        for read in (lambda p: read_image(p, 3), lambda p: read_mask(p, MaskCode(3))):
            with pytest.raises(InputError) as caught:
                read(path)
            one_sentence(caught, path)


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=150, deadline=None)
@given(
    place=st.integers(0, 10_000), value=st.integers(0, 255), name=st.sampled_from(["png", "jpg", "tif", "npy", "gif"])
)
def test_a_wrong_byte_never_raises_anything_else(
    place: int, value: int, name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / f"wrong.{name}"
    colour, file = noise(12, 15, 3), io.BytesIO()
    if name == "npy":
        np.save(file, colour)
    elif name == "tif":
        tifffile.imwrite(file, np.dstack([colour, colour]), photometric="minisblack", planarconfig="contig")
    else:
        Image.fromarray(colour).save(file, {"png": "PNG", "jpg": "JPEG", "gif": "GIF"}[name])
    data = bytearray(file.getvalue())
    data[place % len(data)] = value
    path.write_bytes(data)
    with contextlib.suppress(InputError):
        read_image(path, 6 if name == "tif" else 3)


def test_files_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "folder.png").mkdir()
    for name, words in (("text.png", "known format"), ("folder.png", "no such file"), ("gone.png", "no such file")):
        with pytest.raises(InputError) as caught:
            read_image(tmp_path / name, 3)
        one_sentence(caught, tmp_path / name, words)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(InputError, match="bomb") as caught:
        read_image(save(tmp_path / "large.png", noise(H, W, 3)), 3)


def test_a_failing_disk_is_not_a_damaged_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(OSError, match="Input/output"):
        read_image(tmp_path / "a.png", 3)


# ---------------------------------------------------------------------------------------------------------------- masks

PALETTE = ((0, 0, 0), (200, 10, 20), (30, 30, 250))
CODE = MaskCode(3, colours=PALETTE)
PLAIN = MaskCode(3)


def ids() -> Array:
    return np.where(noise(H, W, high=5) == 4, IGNORE, noise(H, W, high=3)).astype(np.uint8)


def test_written_masks_are_palette_files_and_read_back(tmp_path: Path) -> None:
    mask = ids()
    write_mask(tmp_path / "m.png", mask, PALETTE)
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png", CODE), mask)
    with Image.open(tmp_path / "m.png") as image:
        assert image.mode == "P"
        assert (np.asarray(image.convert("RGB"))[mask == 1] == (200, 10, 20)).all()
        assert (np.asarray(image.convert("RGB"))[mask == IGNORE] == (224, 224, 192)).all()
    assert (tmp_path / "m.png").read_bytes()[24] == 8
    assert [path.name for path in tmp_path.glob("*")] == ["m.png"]


def test_a_mask_is_written_whole_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mask(tmp_path / "m.png", ids(), PALETTE)
    before = (tmp_path / "m.png").read_bytes()

    def fail(image: Image.Image, path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(InputError, match="No space"):
        write_mask(tmp_path / "m.png", ids() * 0, PALETTE)
    assert (tmp_path / "m.png").read_bytes() == before
    assert [path.name for path in tmp_path.glob("*")] == ["m.png"]


def test_grey_masks_of_any_depth(tmp_path: Path) -> None:
    mask = ids()
    for path in (
        save(tmp_path / "8.png", mask),
        save(tmp_path / "16.png", mask.astype(np.uint16)),
        save(tmp_path / "16.tif", mask.astype(np.uint16)),
        save_png(tmp_path / "la.png", np.dstack([mask, noise(H, W)]), 8, 4),
        save(tmp_path / "rgb.png", np.dstack([mask] * 3)),
        save(tmp_path / "rgba.png", np.dstack([mask] * 3 + [noise(H, W)])),
    ):
        read = read_mask(path, PLAIN)
        assert read.dtype == np.uint8
        assert read.flags.writeable
        np.testing.assert_array_equal(read, mask, err_msg=path.name)
    for dtype in (np.uint8, np.int64, np.uint16):
        np.save(tmp_path / "m.npy", mask.astype(dtype))
        np.testing.assert_array_equal(read_mask(tmp_path / "m.npy", PLAIN), mask)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_masks_of_few_bits_are_not_stretched(tmp_path: Path, depth: int) -> None:
    mask = noise(H, W, high=2**depth)
    np.testing.assert_array_equal(read_mask(save_png(tmp_path / "m.png", mask, depth, 0), MaskCode(16)), mask)


def test_tiff_masks_give_what_is_stored(tmp_path: Path) -> None:
    bits = noise(H, W, high=2).astype(bool)
    tifffile.imwrite(tmp_path / "b.tif", bits)
    np.testing.assert_array_equal(read_mask(tmp_path / "b.tif", MaskCode(2)), bits)
    np.testing.assert_array_equal(read_mask(save(tmp_path / "p.tif", bits), MaskCode(2)), bits)
    tifffile.imwrite(tmp_path / "w.tif", ids(), photometric="miniswhite")
    np.testing.assert_array_equal(read_mask(tmp_path / "w.tif", PLAIN), ids())


def test_palette_masks_give_indices_whatever_the_colours(tmp_path: Path) -> None:
    mask = noise(H, W, high=3)
    image = Image.fromarray(mask)
    image.putpalette(bytes([9, 9, 9, 9, 9, 9, 200, 10, 20]))
    for ending in ("png", "tif", "bmp"):
        image.save(tmp_path / f"m.{ending}")
        np.testing.assert_array_equal(read_mask(tmp_path / f"m.{ending}", CODE), mask)


def test_colour_coded_masks(tmp_path: Path) -> None:
    code = MaskCode(3, PALETTE, ignored=((224, 224, 192),))
    mask = ids()
    colours = np.zeros((256, 3), np.uint8)
    colours[:3], colours[IGNORE] = PALETTE, (224, 224, 192)
    np.testing.assert_array_equal(read_mask(save(tmp_path / "m.png", colours[mask]), code), mask)
    rgba = np.dstack([colours[mask], noise(H, W)])
    np.testing.assert_array_equal(read_mask(save(tmp_path / "a.png", rgba), code), mask)
    with pytest.raises(InputError) as caught:
        read_mask(tmp_path / "m.png", CODE)
    one_sentence(caught, "m.png", "(224, 224, 192)", "class file")
    with pytest.raises(InputError) as caught:
        read_mask(tmp_path / "m.png", PLAIN)
    one_sentence(caught, "m.png", "RGB", "classes.json")


def test_unknown_colours_are_counted_and_three_named(tmp_path: Path) -> None:
    pixels = np.zeros((H, W, 3), np.uint8)
    pixels[0, :5, 0] = [1, 2, 3, 4, 5]
    with pytest.raises(InputError) as caught:
        read_mask(save(tmp_path / "m.png", pixels), CODE)
    one_sentence(caught, "(1, 0, 0), (2, 0, 0), (3, 0, 0) and 2 more")
    with pytest.raises(InputError) as caught:
        read_mask(save(tmp_path / "grey.png", np.dstack([noise(H, W, high=3)] * 3)), CODE)
    one_sentence(caught, "grey.png", "one channel")


def test_values_beyond_the_class_list(tmp_path: Path) -> None:
    mask = ids()
    mask[0, :5] = [3, 9, 17, 40, 41]
    with pytest.raises(InputError) as caught:
        read_mask(save(tmp_path / "m.png", mask), PLAIN)
    one_sentence(caught, "m.png", "3, 9, 17 and 2 more", "3 classes", "data.values")
    for value in (-1, 70_000):
        np.save(tmp_path / "m.npy", np.full((H, W), value))
        with pytest.raises(InputError) as caught:
            read_mask(tmp_path / "m.npy", PLAIN)
        one_sentence(caught, "m.npy", value)
    with pytest.raises(InputError) as caught:
        read_mask(save(tmp_path / "m.jpg", noise(H, W)), PLAIN)
    one_sentence(caught, "m.jpg", "JPEG", "PNG")
    np.save(tmp_path / "f.npy", np.zeros((H, W)))
    with pytest.raises(InputError, match="float64"):
        read_mask(tmp_path / "f.npy", PLAIN)
    np.save(tmp_path / "c.npy", noise(H, W, 5))
    with pytest.raises(InputError, match="5 channels"):
        read_mask(tmp_path / "c.npy", PLAIN)


def test_raw_values_are_listed(tmp_path: Path) -> None:
    raw = np.array([[7, 11, 26_000], [255, 11, 0]], np.uint16)
    assert mask_values(save(tmp_path / "m.png", raw)) == {0, 7, 11, 255, 26_000}
    with pytest.raises(InputError, match=r"c\.png.*classes\.json"):
        mask_values(save(tmp_path / "c.png", noise(H, W, 3)))


def test_raw_values_are_mapped(tmp_path: Path) -> None:
    raw = np.array([[7, 11, 26_000], [255, 11, 0]], np.uint16)
    code = MaskCode(2, values=((0, IGNORE), (7, 0), (11, 1), (26_000, 1)))
    expected = [[0, 1, 1], [IGNORE, 1, IGNORE]]
    assert read_mask(save(tmp_path / "m.png", raw), code).tolist() == expected
    narrow = np.where(raw > 255, 11, raw).astype(np.uint8)
    assert read_mask(save(tmp_path / "n.png", narrow), code).tolist() == expected
    with pytest.raises(InputError) as caught:
        read_mask(tmp_path / "m.png", MaskCode(2, values=((0, 0), (7, 0), (11, 1))))
    one_sentence(caught, "m.png", "26000", "data.values")


def test_0_and_255_of_two_classes_are_asked_about(tmp_path: Path) -> None:
    mask = np.array([[0, 255, 0]], np.uint8)
    path = save(tmp_path / "m.png", mask)
    with pytest.raises(InputError) as caught:
        read_mask(path, MaskCode(2))
    one_sentence(caught, "m.png", "data.values: {0: 0, 255: 1}", "{0: 0, 1: 1}")
    assert read_mask(path, MaskCode(2, values=((0, 0), (255, 1)))).tolist() == [[0, 1, 0]]
    assert read_mask(path, MaskCode(2, values=((0, 0), (1, 1)))).tolist() == [[0, 255, 0]]
    assert read_mask(path, PLAIN).tolist() == [[0, 255, 0]]
    assert read_mask(save(tmp_path / "b.png", mask, "1"), MaskCode(2)).tolist() == [[0, 1, 0]]


def test_codes_that_contradict_themselves() -> None:
    for make, words in (
        (lambda: MaskCode(256), ("256",)),
        (lambda: MaskCode(2, values=((1, 2),)), ("data.values", "1 is mapped to 2")),
        (lambda: MaskCode(2, values=((70_000, 1),)), ("data.values", "70000")),
        (lambda: MaskCode(2, colours=((0, 0, 0),)), ("1 colours for 2 classes",)),
        (lambda: MaskCode(2, colours=((0, 0, 0), (0, 0, 0))), ("(0, 0, 0)",)),
    ):
        with pytest.raises(InputError) as caught:
            make()
        one_sentence(caught, *words)


@settings(max_examples=40, deadline=None)
@given(height=st.integers(1, 20), width=st.integers(1, 20), classes=st.integers(3, 255), seed=st.integers(0, 99))
def test_any_mask_reads_back(
    height: int, width: int, classes: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rng = np.random.default_rng(seed)
    colours = np.unique(rng.integers(0, 256, (2 * classes, 3)), axis=0)[:classes]
    rng.shuffle(colours)
    code = MaskCode(classes, tuple((int(r), int(g), int(b)) for r, g, b in colours))
    mask = rng.integers(0, classes, (height, width)).astype(np.uint8)
    folder = tmp_path_factory.getbasetemp()
    write_mask(folder / "any.png", mask, code.colours or ())
    np.testing.assert_array_equal(read_mask(folder / "any.png", code), mask)
    save(folder / "rgb.png", colours[mask].astype(np.uint8))
    np.testing.assert_array_equal(read_mask(folder / "rgb.png", code), mask)


@pytest.mark.skipif("SEMISEG_DATA" not in os.environ, reason="needs real data: set SEMISEG_DATA")
def test_real_pairs_are_read() -> None:
    root = Path(os.environ["SEMISEG_DATA"])
    for name, classes in (("camvid", 11), ("idd_lite", 7), ("dsb2018", 2)):
        masks = sorted((root / name / "masks" / "val").iterdir())[:20]
        assert masks
        for path in masks:
            image = next((root / name / "images" / "val").glob(f"{path.stem}.*"))
            row = Row(image, path, image.name)
            pixels, mask = open_pair(row, 3, MaskCode(classes), None, cache=False)
            assert pixels.shape == (*mask.shape, 3)


# ---------------------------------------------------------------------------------------------------------------- cache


def pair(folder: Path, height: int = 36, width: int = 48) -> Row:
    write_mask(folder / "m.png", noise(height, width, high=3), PALETTE)
    return Row(save(folder / "i.png", noise(height, width, 3)), folder / "m.png", "i.png")


def test_target_size() -> None:
    assert target_size(None, (360, 480)) == (360, 480)
    assert target_size((180, 240), (100, 900)) == (180, 240)
    assert target_size(240, (360, 480)) == (180, 240)
    assert target_size(240, (480, 361)) == (240, 180)
    assert target_size(8, (1000, 3)) == (8, 1)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_images_are_resized_with_antialiasing(dtype: Any, channels: int) -> None:
    high = np.iinfo(dtype).max + 1
    image = noise(36, 48, channels, high=high, dtype=dtype)
    small = resize_image(image, (18, 20))
    assert small.dtype == dtype
    assert small.shape == (18, 20, channels)
    assert small.flags.c_contiguous
    pixels = torch.from_numpy(image.astype(np.float64)).permute(2, 0, 1)[None]
    exact = torch.nn.functional.interpolate(pixels, (18, 20), mode="bilinear", antialias=True)[0].permute(1, 2, 0)
    assert abs(small.astype(float) - exact.numpy()).max() <= 1.01
    assert resize_image(image, (36, 48)) is image


def test_masks_are_resized_by_the_nearest_centre() -> None:
    mask = np.arange(36, dtype=np.uint8).reshape(6, 6)
    assert resize_mask(mask, (2, 3)).tolist() == [[7, 9, 11], [25, 27, 29]]
    assert resize_mask(mask, (6, 6)) is mask


def test_pairs_come_at_the_size_asked_for_and_the_cache_changes_nothing(tmp_path: Path) -> None:
    row = pair(tmp_path)
    for size, shape in ((None, (36, 48)), (24, (18, 24)), ((18, 20), (18, 20))):
        plain = open_pair(row, 3, PLAIN, size, cache=False)
        assert not (tmp_path / "cache").exists() or size is not None
        for _ in range(2):
            image, mask = open_pair(row, 3, PLAIN, size, cache=True)
            assert image.shape == (*shape, 3)
            assert mask.shape == shape
            np.testing.assert_array_equal(image, plain[0])
            np.testing.assert_array_equal(mask, plain[1])
            assert image.flags.writeable
            assert mask.flags.writeable
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == 4
    np.testing.assert_array_equal(open_image(row, 3, 24, cache=True), open_image(row, 3, 24, cache=False))
    np.testing.assert_array_equal(open_mask(row, PLAIN, None, cache=True), read_mask(tmp_path / "m.png", PLAIN))


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    calls: list[Path] = []

    def count(read: Callable[..., Any]) -> Callable[..., Any]:
        def reader(path: Path, argument: Any) -> Any:
            calls.append(path)
            return read(path, argument)

        return reader

    monkeypatch.setattr(cache, "read_image", count(formats.read_image))
    monkeypatch.setattr(cache, "read_mask", count(formats.read_mask))
    return calls


def test_a_file_is_decoded_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row, calls = pair(tmp_path), counted(monkeypatch)
    for _ in range(3):
        open_pair(row, 3, PLAIN, 24, cache=True)
    assert len(calls) == 2
    open_image(row, 1, 24, cache=True)
    open_image(row, 3, 20, cache=True)
    open_mask(row, MaskCode(4), 24, cache=True)
    assert len(calls) == 5
    os.utime(row.image, ns=(1, 1))
    open_image(row, 3, 24, cache=True)
    assert len(calls) == 6
    open_pair(row, 3, PLAIN, 24, cache=False)
    assert len(calls) == 8


def test_damaged_cache_files_are_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row, calls = pair(tmp_path), counted(monkeypatch)
    first = open_image(row, 3, 24, cache=True)
    (kept,) = (tmp_path / "cache").rglob("*.npy")
    whole = kept.read_bytes()
    for length in (0, 5, 60, len(whole) // 2, len(whole) - 1):
        kept.write_bytes(whole[:length])
        np.testing.assert_array_equal(open_image(row, 3, 24, cache=True), first)
        assert kept.read_bytes() == whole
    assert len(calls) == 6


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = pair(tmp_path)
    monkeypatch.setenv("SEMISEG_CACHE", str(tmp_path / "m.png"))  # a file where a folder should be
    assert open_pair(row, 3, PLAIN, 24, cache=True)[0].shape == (18, 24, 3)


def test_pairs_of_different_sizes_are_found_at_any_size_also_in_the_cache(tmp_path: Path) -> None:
    row = pair(tmp_path)
    write_mask(tmp_path / "m.png", noise(18, 24, high=3), PALETTE)
    for size in (None, 24, (18, 20)):
        for keep in (False, True, True):
            with pytest.raises(InputError) as caught:
                open_pair(row, 3, PLAIN, size, cache=keep)
            one_sentence(caught, tmp_path / "m.png", tmp_path / "i.png", "24x18", "48x36")


def test_a_missing_file_is_named_with_the_cache_too(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.png"):
        open_image(Row(tmp_path / "gone.png", None, "gone.png"), 3, 24, cache=True)


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache.cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("SEMISEG_CACHE")
    assert cache.cache_dir() == Path.home() / ".cache" / "semiseg"
