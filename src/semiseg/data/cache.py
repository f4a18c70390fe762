"""Opens the files of a row at the size that a run works on, and keeps what was resized."""

import os
import struct
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from semiseg.data.formats import MaskCode, mask_file, read_image, read_mask, read_planes
from semiseg.data.packed import File, Packed
from semiseg.data.rows import Row
from semiseg.files import replacing
from semiseg.types import InputError

Size = int | tuple[int, int] | None
"""data.size: the longest side in px, exact (H, W) in px, or None for the file's own."""

Shape = tuple[int, int]
AnyFile = TypeVar("AnyFile", Path, File)
_SHAPE = struct.Struct("<II")


def cache_dir() -> Path:
    """Where resized files are kept: $SEMISEG_CACHE, or ~/.cache/semiseg. It may be deleted at any time."""
    named = os.environ.get("SEMISEG_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "semiseg"


def target_size(size: Size, shape: Shape) -> Shape:
    """(H, W) in px that `size` asks of an image of `shape`; the shorter side is rounded, and at least 1."""
    if size is None:
        return shape
    if isinstance(size, tuple):
        return size
    height, width = (max(1, round(side * size / max(shape))) for side in shape)
    return height, width


def resize_image(image: NDArray[Any], shape: Shape) -> NDArray[Any]:
    """(H, W, N) uint8 or uint16 to (*shape, N), bilinear, antialiased when it shrinks; the same depth."""
    if image.shape[:2] == shape:
        return image
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
    if image.dtype == np.uint8:
        small = F.interpolate(pixels, shape, mode="bilinear", antialias=True)
    else:
        small = F.interpolate(pixels.float(), shape, mode="bilinear", antialias=True).round().clamp(0, 65535)
    return np.ascontiguousarray(small[0].permute(1, 2, 0).numpy().astype(image.dtype, copy=False))


def resize_mask(mask: NDArray[np.uint8], shape: Shape) -> NDArray[np.uint8]:
    """(H, W) uint8 to `shape`, by the nearest pixel's centre: `resize_image` aligns centres too."""
    if mask.shape == shape:
        return mask
    small: NDArray[np.uint8] = F.interpolate(torch.from_numpy(mask)[None, None], shape, mode="nearest-exact")[
        0, 0
    ].numpy()
    return small


def open_image(row: Row, channels: int, size: Size, cache: bool) -> NDArray[Any]:
    """The row's image at the size asked for, (H, W, channels) uint8 or uint16. Raises InputError like `read_image`."""
    return _open_image(row, channels, size, cache)[0]


def open_mask(row: Row, code: MaskCode, size: Size, cache: bool) -> NDArray[np.uint8]:
    """The row's mask at the size asked for, (H, W) uint8 ids or IGNORE. Raises InputError like `read_mask`."""
    return _open_mask(row, code, size, cache)[0]


def open_confidence(row: Row, size: Size, cache: bool = False) -> NDArray[np.uint8]:
    """The row's map of confidence at the size asked for, (H, W) uint8, 255: 1. Raises InputError like `read_image`."""
    assert row.confidence is not None, f"{row.name} has no confidence"
    return _resized(
        row.confidence, ("confidence",), size, cache, lambda path: read_image(path, 1)[..., 0], resize_mask
    )[0]


def open_soft(row: Row, size: Size, cache: bool = False) -> NDArray[np.uint8]:
    """A soft pseudo-label without its mask at the size asked for, (2 * top - 1, H, W) uint8, as in types.Labelled.

    Raises InputError where a file cannot be read.
    """
    others = _resized(row.soft, ("soft",), size, cache, read_planes, _resize_planes)[0]
    return np.concatenate([open_confidence(row, size, cache)[None], others.transpose(2, 0, 1)])


def _resize_planes(planes: NDArray[np.uint8], shape: Shape) -> NDArray[np.uint8]:
    return np.stack([resize_mask(np.ascontiguousarray(plane), shape) for plane in planes.transpose(2, 0, 1)], 2)


def open_pair(
    row: Row, channels: int, code: MaskCode, size: Size, cache: bool, whole_mask: bool = False
) -> tuple[NDArray[Any], NDArray[np.uint8]]:
    """The row's image and mask at the size asked for, or the mask at its own: `whole_mask`.

    Raises InputError also where the two files differ in size.
    """
    image, image_shape = _open_image(row, channels, size, cache)
    mask, mask_shape = _open_mask(row, code, None if whole_mask else size, cache)
    if image_shape != mask_shape:
        raise InputError(
            f"{row.mask}: is {_text(mask_shape)} where its image {row.image} is {_text(image_shape)}; "
            "make both the same size or correct the pair."
        )
    return image, mask


def _text(shape: Shape) -> str:
    return f"{shape[1]}x{shape[0]} px"


def _open_image(row: Row, channels: int, size: Size, cache: bool) -> tuple[NDArray[Any], Shape]:
    return _resized(row.image, ("image", channels), size, cache, lambda path: read_image(path, channels), resize_image)


def _open_mask(row: Row, code: MaskCode, size: Size, cache: bool) -> tuple[NDArray[np.uint8], Shape]:
    assert row.mask is not None, f"{row.name} has no mask"
    code = row.code or code
    return _resized(row.mask, ("mask", code), size, cache, lambda path: read_mask(path, code), resize_mask)


def _resized(
    path: AnyFile,
    kind: tuple[Any, ...],
    size: Size,
    cache: bool,
    read: Callable[[AnyFile], NDArray[Any]],
    resize: Callable[[NDArray[Any], Shape], NDArray[Any]],
) -> tuple[NDArray[Any], Shape]:
    """The array at the size asked for, and the file's own (H, W). `kind`: what the pixels depend on but the file."""
    kept = _place(path, kind, size) if cache and size is not None else None
    if kept is not None and (found := _load(kept)) is not None:
        return found
    full = read(path)
    shape = full.shape[0], full.shape[1]
    array = resize(full, target_size(size, shape))
    if kept is not None:
        _keep(kept, array, shape)
    return array, shape


def _place(path: File, kind: tuple[Any, ...], size: Size) -> Path | None:
    """The cached file's path, another one whenever the source changes; None where there is no source."""
    if isinstance(path, Packed):
        source: tuple[object, ...] = (path,)  # with the shard's size and time of change
    else:
        try:
            stat = mask_file(path).stat()
        except OSError:
            return None  # the reader tells the user
        source = str(path.absolute()), stat.st_mtime_ns, stat.st_size
    key = repr((*source, kind, size))
    name = blake2b(key.encode(), digest_size=16).hexdigest()
    return cache_dir() / "resized" / name[:2] / f"{name}.npy"


def _load(kept: Path) -> tuple[NDArray[Any], Shape] | None:
    try:
        with kept.open("rb") as file:
            array = np.load(file, allow_pickle=False)
            return array, _SHAPE.unpack(file.read())
    except (OSError, ValueError, EOFError, struct.error):
        return None  # not there yet, or damaged: written anew


def _keep(kept: Path, array: NDArray[Any], shape: Shape) -> None:
    """Writes the array as .npy, and after it the source's (H, W), by which pairs of different sizes are still found."""
    try:
        with replacing(kept) as part, part.open("wb") as file:
            np.save(file, array)
            file.write(_SHAPE.pack(*shape))
    except InputError:
        pass  # a full or read-only disk costs time, not the run
