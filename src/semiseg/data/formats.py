"""Files to arrays: images of any depth and channel count, masks in the encodings that people have."""

import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError

from semiseg.data.packed import File
from semiseg.files import replacing
from semiseg.types import IGNORE, InputError, some

Colour = tuple[int, int, int]
Pixels = NDArray[Any]

_SHOWN = {"1": "L", "P": "RGB", "PA": "RGB", "La": "LA"} | dict.fromkeys(
    ("CMYK", "YCbCr", "LAB", "HSV", "RGBa", "RGBX"), "RGB"
)
"""Pillow modes that are not pixels as they are shown, and the mode that is."""

_ORIENTATION = 0x0112
_TURNED = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[:, ::-1],
    7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
    8: lambda a: a.swapaxes(0, 1)[::-1],
}
"""EXIF 2.32, orientation: how stored rows and columns become shown ones; 1 is as stored."""

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".npy"})
"""Files that are looked at, in lower case; others in a data folder are passed over."""
_PART = ".json#"
"""In the path of a mask: between a file of COCO that says what many images show, and the image's id."""

_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


@dataclass(frozen=True)
class MaskCode:
    """How a mask file spells class ids.

    classes: ids are 0 to classes - 1, at most 255 of them; colours: of each class in RGB masks, class 0 first;
    values: (raw value, id or IGNORE) pairs, and a raw value that has none is an error, while without `values` the raw
    values are the ids; a raw 255 is IGNORE unless `values` lists it; ignored: colours that become IGNORE;
    to: the id, or IGNORE, that each class has elsewhere, which is what is read then.
    Raises InputError where the parts contradict one another.
    """

    classes: int
    colours: tuple[Colour, ...] | None = None
    values: tuple[tuple[int, int], ...] | None = None
    ignored: tuple[Colour, ...] = ()
    to: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.classes <= IGNORE:
            raise InputError(f"classes: {self.classes} classes cannot be stored in 8-bit masks; use 1 to {IGNORE}.")
        for raw, label in self.values or ():
            if not 0 <= raw < 2**16:
                raise InputError(f"data.values: raw value {raw} is not one of 0 to 65535; correct or remove it.")
            if not (0 <= label < self.classes or label == IGNORE):
                raise InputError(
                    f"data.values: {raw} is mapped to {label}; use 0 to {self.classes - 1}, or {IGNORE} to ignore it."
                )
        if self.colours is None:
            return
        if len(self.colours) != self.classes:
            raise InputError(f"classes.json: {len(self.colours)} colours for {self.classes} classes; give one each.")
        known = self.colours + self.ignored
        for index, colour in enumerate(known):
            if colour in known[:index]:
                raise InputError(f"classes.json: the colour {colour} stands for two classes; give each its own.")

    def plain(self) -> "MaskCode":
        """That of masks which hold the same classes' ids as they are, and IGNORE."""
        return MaskCode(self.classes, values=tuple((label, label) for label in range(self.classes)))

    def mapped(self, to: Sequence[int]) -> "MaskCode":
        """That of the same masks read as other classes; `to`: for each class an id, or IGNORE."""
        assert len(to) == self.classes, "every class has a place, or is ignored"
        return replace(self, to=tuple(to))


def read_image(path: File, channels: int) -> Pixels:
    """Decodes an image as it is shown: palette and CMYK to RGB, alpha dropped, turned as EXIF says.

    A file with as many channels as asked is taken whole, an alpha channel too; a grey one is repeated; RGB becomes one
    channel by luma (ITU-R BT.601). PNG, JPEG and whatever else Pillow reads (16-bit colour in PNG and TIFF only:
    elsewhere Pillow gives 8 bits); TIFF with any number of channels, which may be its pages; .npy (H, W) or (H, W, N).
    Returns (H, W, channels) uint8 or uint16, the file's depth, contiguous and writeable.
    Raises InputError for a file that is missing, damaged, of another depth, or of a channel count that does not fit.
    """
    pixels, alpha = _decode(path, raw=False)
    if pixels.dtype == np.int32 and pixels.min() >= 0 and pixels.max() < 2**16:
        pixels = pixels.astype(np.uint16)  # Pillow opens 16-bit PGM with 32 bits
    if pixels.dtype not in (np.uint8, np.uint16):
        raise InputError(f"{path}: has {pixels.dtype} values; convert it to 8 or 16 bits a channel.")
    return np.require(_fit(path, pixels, alpha, channels), requirements=["C", "W"])


def read_mask(path: Path, code: MaskCode) -> NDArray[np.uint8]:
    """Decodes a mask to class ids, (H, W) uint8 below code.classes (or of code.to), or IGNORE; turned as EXIF says.

    Palette files give their indices, whatever the colours; grey ones of 1 to 16 bits their values; alpha is dropped;
    RGB ones are read by code.colours, or where there are none as grey if all channels agree; .npy (H, W) integers;
    FILE.json#ID as `coco.draw` says.
    Raises InputError for a damaged file, and for colours or values that `code` does not know.
    """
    label = _ids(path, code)
    if code.to is None:
        return label
    elsewhere = np.full(256, IGNORE, np.uint8)
    elsewhere[: code.classes] = code.to
    return elsewhere[label]


def mask_file(path: Path) -> Path:
    """The file on the disk that a mask is read from: the path itself, or what stands before the image's id."""
    before, part, _ = str(path).rpartition(_PART)
    return Path(before + part[:-1]) if part else path


def _ids(path: Path, code: MaskCode) -> NDArray[np.uint8]:
    if mask_file(path) != path:
        from semiseg.data.coco import draw  # it reads PNGs by this file

        return _from_values(path, draw(path), code)
    raw, alpha = _decode(path, raw=True)
    if raw.dtype.kind not in "biu":
        raise InputError(f"{path}: has {raw.dtype} values; save the mask with 8 or 16 bits, one class id a pixel.")
    raw = raw[..., :-1] if alpha else raw
    if raw.shape[2] == 3 and code.colours is not None:
        return _from_colours(path, raw, code)
    if raw.shape[2] == 3 and not (raw == raw[..., :1]).all():
        raise InputError(f"{path}: is an RGB mask; give each class a color in classes.json, or save class ids.")
    if raw.shape[2] not in (1, 3):
        raise InputError(f"{path}: has {raw.shape[2]} channels; save the mask with one, a class id a pixel.")
    return _from_values(path, raw[..., 0], code)


def write_mask(path: Path, mask: NDArray[np.uint8], palette: tuple[Colour, ...]) -> None:
    """Writes (H, W) uint8 ids as an 8-bit palette PNG, whole or not at all. IGNORE has VOC's (224, 224, 192)."""
    assert mask.dtype == np.uint8 and mask.ndim == 2
    colours = np.zeros((256, 3), np.uint8)
    colours[: len(palette)] = palette
    colours[IGNORE] = (224, 224, 192)
    image = Image.fromarray(mask)
    image.putpalette(colours.tobytes())
    with replacing(path) as part:
        # A third of the usual time for 13 % more bytes: where a network labels images, it needs the cores.
        image.save(part, format="PNG", compress_level=1, compress_type=zlib.Z_RLE)


def write_planes(path: Path, planes: NDArray[np.uint8]) -> None:
    """Writes (H, W, K) uint8 compressed as .npz, whole or not at all."""
    with replacing(path) as part, part.open("wb") as file:
        np.savez_compressed(file, planes=planes)


def read_planes(path: Path) -> NDArray[np.uint8]:
    """What `write_planes` wrote.

    Raises:
        InputError: it is missing or damaged.
    """
    try:
        with np.load(BytesIO(path.read_bytes()), allow_pickle=False) as file:
            planes: NDArray[np.uint8] = file["planes"]
            return planes
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(
            f"{path} cannot be read ({error}): remove the folder of labels, and they are made anew."
        ) from error


def _decode(path: File, raw: bool) -> tuple[Pixels, bool]:
    """(H, W, K) and whether the last channel is alpha. `raw`: as stored, for masks, instead of as shown."""
    try:
        data = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise InputError(f"{path}: there is no such file; correct the path or put the file there.") from error
    except PermissionError as error:
        raise InputError(f"{path}: may not be read; change the file's permissions.") from error
    try:
        pixels, alpha = _npy(data) if path.suffix.lower() == ".npy" else _image(data, raw)
    except UnidentifiedImageError as error:
        raise InputError(f"{path}: is not an image of a known format, or is damaged; replace or remove it.") from error
    # Decoders raise whatever the damage leads them to: OSError, SyntaxError, struct.error, zlib.error, IndexError, ...
    except Exception as error:
        reason = str(error).rstrip(".") or type(error).__name__
        remedy = "pip install imagecodecs" if "imagecodecs" in reason else "replace or remove it"
        raise InputError(f"{path}: cannot be decoded ({reason}); {remedy}.") from error
    return (pixels if pixels.ndim == 3 else pixels[..., None]), alpha


def _npy(data: bytes) -> tuple[Pixels, bool]:
    array = np.load(BytesIO(data), allow_pickle=False)
    if not (isinstance(array, np.ndarray) and array.ndim in (2, 3) and array.size > 0):
        raise ValueError("not one array of shape (H, W) or (H, W, N)")
    return array, False


def _image(data: bytes, raw: bool) -> tuple[Pixels, bool]:
    if data.startswith(_TIFF) and (read := _tiff(data)) is not None:
        return read
    image = Image.open(BytesIO(data))
    stored = _rawmode(image)
    image.load()
    turn = image.getexif().get(_ORIENTATION, 1)
    if image.format == "PNG" and stored.endswith(";16B") and image.mode != "I;16":
        pixels, alpha = _deep_png(data, stored)
    elif raw and image.mode in ("1", "P"):
        pixels, alpha = np.array(image), False
    else:
        shown = image.convert(_SHOWN[image.mode]) if image.mode in _SHOWN else image
        pixels, alpha = np.array(shown), shown.mode in ("LA", "RGBA")
    if raw and image.format == "TIFF" and image.mode in ("1", "L") and stored.endswith("I"):
        pixels = ~pixels  # Pillow inverts where white is stored as 0, which is how tifffile stores a boolean mask
    if raw and stored.startswith(("L;2", "L;4")):
        pixels //= 255 // (2 ** int(stored[2]) - 1)  # Pillow stretches small depths to 0..255
    if pixels.dtype == ">u2":
        pixels = pixels.astype(np.uint16)
    return (_TURNED[turn](pixels) if turn in _TURNED else pixels), alpha


def _deep_png(data: bytes, stored: str) -> tuple[Pixels, bool]:
    """16-bit colour, of which Pillow keeps the upper bytes; read in the other byte order it keeps the lower ones."""
    if stored == "LA;16B":
        return _unpack(data, "RGBA").view(">u2").astype(np.uint16), True
    upper, lower = (_unpack(data, stored[:-1] + order) for order in "BL")
    return (upper.astype(np.uint16) << 8) | lower, stored.startswith("RGBA")


def _unpack(data: bytes, rawmode: str) -> Pixels:
    image = Image.open(BytesIO(data))
    image.tile = [image.tile[0]._replace(args=rawmode)]
    return np.array(image)


def _rawmode(image: ImageFile.ImageFile) -> str:
    """How the file holds its pixels, as "RGB;16B"; known before they are loaded, and "" in formats that do not tell."""
    args = image.tile[0].args if image.tile else ""
    return str(args[0] if isinstance(args, tuple) else args)


def _tiff(data: bytes) -> tuple[Pixels, bool] | None:
    """Reads what Pillow would cut down to 8 bits or fewer channels; None where Pillow is exact: it has more codecs."""
    from tifffile import TiffFile  # most runs never meet a TIFF, and the import takes longer than reading a hundred

    with TiffFile(BytesIO(data)) as tiff:
        page = tiff.pages.first
        extra = page.extrasamples
        alpha = len(extra) == 1 and extra[0] in (1, 2)
        if len(tiff.pages) == 1 and (page.samplesperpixel == 1 or (page.bitspersample == 8 and (alpha or not extra))):
            return None
        pixels, axes = tiff.series[0].asarray(), tiff.series[0].axes
        turn = page.tags[_ORIENTATION].value if _ORIENTATION in page.tags else 1
    if pixels.ndim not in (2, 3):
        raise ValueError(f"its pages form an array of {pixels.ndim} dimensions, {axes}")
    # Some writers store an (H, W, N) array as H pages of (W, N), so that only the sizes tell what the pages are
    first = axes.startswith(("S", "C")) if set(axes) & set("SC") else pixels.shape[0] < pixels.shape[-1]
    if pixels.ndim == 3 and first:
        pixels = np.moveaxis(pixels, 0, 2)
    return (_TURNED[turn](pixels) if turn in _TURNED else pixels), alpha


def _fit(path: File, pixels: Pixels, alpha: bool, channels: int) -> Pixels:
    """(H, W, K) to (H, W, channels)."""
    if alpha and pixels.shape[2] != channels:
        pixels = pixels[..., :-1]
    stored = pixels.shape[2]
    if stored == channels:
        return pixels
    if stored == 1:
        return np.repeat(pixels, channels, axis=2)
    if stored == 3 and channels == 1:
        # The weights in 1/65536 and the rounding of Pillow's convert("L"), so that 16 bits are treated as 8 bits are
        luma = (pixels @ np.array([19595, 38470, 7471], np.uint32) + 0x8000) >> 16
        return luma.astype(pixels.dtype)[..., None]
    raise InputError(f"{path}: has {stored} channels where data.channels is {channels}; set data.channels to {stored}.")


def _from_values(path: Path, raw: Pixels, code: MaskCode) -> NDArray[np.uint8]:
    label, unknown = _look_up(raw, code)
    if len(unknown):
        raise InputError(_unknown_values(path, np.unique(unknown), code))
    if code.classes == 2 and code.values is None and label.max() == IGNORE and set(np.unique(label)) == {0, IGNORE}:
        raise InputError(
            f"{path}: has the values 0 and 255 only; write data.values: {{0: 0, 255: 1}} if 255 is class 1, "
            "or {0: 0, 1: 1} if it marks what to ignore."
        )
    return label


def _look_up(raw: Pixels, code: MaskCode) -> tuple[NDArray[np.uint8], Pixels]:
    """(H, W) ids, and the raw values of the pixels that have none."""
    ids, known = _table(code)
    if raw.dtype == np.uint8:  # bytes.translate takes a tenth of an index array's time
        data = bytearray(raw)
        label = np.frombuffer(data.translate(ids[:256].tobytes()), np.uint8).reshape(raw.shape)
        return label, np.frombuffer(data.translate(None, bytes(np.flatnonzero(known[:256]).tolist())), np.uint8)
    inside = np.where((raw >= 0) & (raw < 2**16), raw, 2**16).astype(np.intp)
    return ids[inside], raw[~known[inside]]


@lru_cache(maxsize=16)
def _table(code: MaskCode) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """(65537,) id of each raw value, and whether it has one; the last entry stands for all values beyond 16 bits."""
    pairs = code.values if code.values is not None else [(label, label) for label in range(code.classes)]
    ids, known = np.zeros(2**16 + 1, np.uint8), np.zeros(2**16 + 1, np.bool_)
    for raw, label in ((IGNORE, IGNORE), *pairs):
        ids[raw], known[raw] = label, True
    return ids, known


def _unknown_values(path: Path, values: Pixels, code: MaskCode) -> str:
    lossy = " (JPEG changes values: save masks as PNG)" if path.suffix.lower() in (".jpg", ".jpeg") else ""
    found = f"{path}: has mask values {some(values.tolist())}{lossy}"
    if code.values is not None:
        return f"{found} that data.values does not list; add each with its class id, or with {IGNORE} to ignore it."
    beyond = f"{found} beyond the {code.classes} classes (ids 0 to {code.classes - 1}, {IGNORE} is ignored)"
    if code.classes == 19 and values.max() <= 33:  # the ids of *_labelIds.png end there
        return (
            f"{beyond}, which look like raw Cityscapes ids; set data.format: cityscapes (it reads them), "
            "or give each value an id by data.values."
        )
    return f"{beyond}; add the missing classes, or give each value an id by data.values."


def _from_colours(path: Path, raw: Pixels, code: MaskCode) -> NDArray[np.uint8]:
    if raw.dtype != np.uint8:
        raise InputError(f"{path}: has {raw.dtype} colours; save the RGB mask with 8 bits a channel.")
    # Masks are areas of one colour: what costs time is done once a run of equal pixels
    flat = _pack(raw).ravel()
    starts = np.flatnonzero(np.append(True, flat[1:] != flat[:-1]))
    known, ids = _colour_ids(code)
    place = np.searchsorted(known, flat[starts]).clip(max=len(known) - 1)
    unknown = known[place] != flat[starts]
    if unknown.any():
        raise InputError(_unknown_colours(path, raw, np.unique(flat[starts][unknown])))
    return np.repeat(ids[place], np.diff(starts, append=flat.size)).reshape(raw.shape[:2])


def _pack(colours: Pixels) -> NDArray[np.uint32]:
    """(..., 3) uint8 to (...) numbers, equal where the colours are."""
    four = np.zeros((*colours.shape[:-1], 4), np.uint8)
    for channel in range(3):  # three long strided copies, not one short copy a pixel
        four[..., channel] = colours[..., channel]
    return four.view(np.uint32)[..., 0]


@lru_cache(maxsize=16)
def _colour_ids(code: MaskCode) -> tuple[NDArray[np.uint32], NDArray[np.uint8]]:
    """The packed colours in rising order, and the id of each."""
    assert code.colours is not None
    packed = _pack(np.array(code.colours + code.ignored))
    ids = np.array([*range(code.classes), *[IGNORE] * len(code.ignored)], np.uint8)
    order = np.argsort(packed)
    return packed[order], ids[order]


def _unknown_colours(path: Path, raw: Pixels, packed: NDArray[np.uint32]) -> str:
    if (raw == raw[..., :1]).all():
        return f"{path}: is an RGB mask of greys that are not in the class file; save class ids with one channel."
    colours = [tuple(four[:3]) for four in packed.view(np.uint8).reshape(-1, 4).tolist()]
    return f"{path}: has colours {some(colours)} that are not in the class file; add them there or correct the mask."


def image_size(path: File) -> tuple[int, int]:
    """(H, W) in px of an image as it is shown, from its head where that tells. Raises InputError like `read_image`."""
    try:
        with Image.open(path if isinstance(path, Path) else BytesIO(path.read_bytes())) as image:
            if image.format != "TIFF":  # whose pages may be channels, and whose size Pillow turns while it loads
                width, height = image.size
                turned = image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
                return (width, height) if turned else (height, width)
    except Exception:  # noqa: BLE001  a file that Pillow does not know, or damage, which the reader explains
        pass
    pixels, _ = _decode(path, raw=False)
    return pixels.shape[0], pixels.shape[1]


def image_channels(path: File) -> int:
    """Channels of an image's pixels, alpha left out. Raises InputError like `read_image`."""
    pixels, alpha = _decode(path, raw=False)
    return int(pixels.shape[2]) - alpha


def mask_values(path: Path) -> set[int]:
    """The raw values in a mask file, before any class list.

    Raises:
        InputError: the file is damaged, or is an RGB mask, whose colours need a class file.
    """
    raw, alpha = _decode(path, raw=True)
    raw = raw[..., :-1] if alpha else raw
    if raw.shape[2] == 3 and not (raw == raw[..., :1]).all():
        colours = np.unique(raw.reshape(-1, 3), axis=0)
        raise InputError(
            f"{path}: is an RGB mask, and there is no classes.json; write one with the name and color of each class "
            f"(found here: {some([tuple(c) for c in colours.tolist()])})."
        )
    return {int(value) for value in np.unique(raw[..., 0])}
