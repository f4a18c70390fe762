"""COCO's annotation files as columns, from which the mask of one image is drawn when it is read.

COCO says in one file what all images show. That file is read once and kept as columns with the resized images; a mask
is drawn from its own part of them by the process that needs it, always alike. Drawn into files, 118,287 masks would
have to be there before the first step, those of unlabelled images too.

A mask is named by its file and the image's id: `annotations/instances_train2017.json#139`.

Sources: Lin et al., "Microsoft COCO", ECCV 2014; Kirillov et al., "Panoptic Segmentation", CVPR 2019. pycocotools turns
polygons into runs of pixels, for everybody alike.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from semiseg.data.cache import cache_dir
from semiseg.data.formats import read_image
from semiseg.files import read_json, replacing
from semiseg.types import IGNORE, InputError, Side, some

VERSION = 1
"""Of how files are read: columns of another are made anew."""

_MISSING = "COCO's instances need a package that is not installed: pip install 'semiseg[coco]'."

Columns = dict[str, NDArray[Any]]


class _Image(BaseModel):
    id: int
    file_name: str
    height: Side
    width: Side


class _Category(BaseModel):
    id: Annotated[int, Field(ge=1, lt=IGNORE)]
    name: str


class _Instance(BaseModel):
    image_id: int
    category_id: int
    iscrowd: bool = False
    segmentation: Any


class _Segment(BaseModel):
    id: Annotated[int, Field(ge=1, lt=2**24)]
    category_id: int


class _Segmented(BaseModel):
    image_id: int
    file_name: str
    segments_info: tuple[_Segment, ...]


class _File(BaseModel):
    images: tuple[_Image, ...]
    categories: tuple[_Category, ...]


class _Instances(_File):
    annotations: tuple[_Instance, ...]


class _Panoptic(_File):
    annotations: tuple[_Segmented, ...]


@dataclass(frozen=True, eq=False)
class Annotations:
    """One annotation file. Image number i has the parts first[i] to first[i + 1].

    categories: name of each category by its id, in rising order; image (n,) int64: ids of the images that have a mask,
    in rising order; name (n,) bytes: of their files; first (n + 1,) int64;
    value (p,) uint8: what a part's pixels are in the mask, its category, or IGNORE in a crowd of instances.
    Of instances: shape (n, 2) int32, H and W in px; end (p,) int64 and runs (b,) uint8: a part's runs, as pycocotools
    packs them, in the order in which they are drawn. Of segments: number (p,) int64, that a part's pixels have in the
    PNG `file` (n,) bytes.
    """

    path: Path
    panoptic: bool
    categories: dict[int, str]
    columns: Any
    image: NDArray[np.int64]
    name: NDArray[np.bytes_]
    first: NDArray[np.int64]
    value: NDArray[np.uint8]

    def pngs(self) -> list[str]:
        """(n,) the files of segments."""
        return [name.decode() for name in _texts(self.columns.get_tensor("file"))]

    def mask(self, image: int) -> NDArray[np.uint8]:
        """(H, W) categories of an image, 0 where there is none.

        Raises:
            InputError: the file has no such image, or its PNG is missing or another one.
        """
        i = int(np.searchsorted(self.image, image))
        if i == len(self.image) or self.image[i] != image:
            raise InputError(f"{self.path} says nothing of the image {image}: restore it.")
        parts = slice(int(self.first[i]), int(self.first[i + 1]))
        return self._segments(i, parts) if self.panoptic else self._instances(i, parts)

    def _instances(self, i: int, parts: slice) -> NDArray[np.uint8]:
        height, width = self.columns.get_slice("shape")[i].tolist()
        mask = np.zeros((height, width), np.uint8)
        if parts.start == parts.stop:
            return mask
        before = max(0, parts.start - 1)
        end = self.columns.get_slice("end")[before : parts.stop].tolist()
        end = end if parts.start else [0, *end]
        runs = self.columns.get_slice("runs")[end[0] : end[-1]]
        for value, (a, b) in zip(self.value[parts].tolist(), pairwise(end), strict=True):
            counts = unpacked(runs[a - end[0] : b - end[0]])
            drawn = np.repeat(np.arange(len(counts)) % 2 > 0, counts)
            mask[drawn.reshape(width, height).T] = value
        return mask

    def _segments(self, i: int, parts: slice) -> NDArray[np.uint8]:
        png = _png(self.path, _texts(self.columns.get_slice("file")[i : i + 1])[0].decode())
        pixels = read_image(png, 3)
        numbers = (pixels.astype(np.uint32) << np.array([0, 8, 16], np.uint32)).sum(2, dtype=np.uint32)
        known = np.append(np.uint32(0), self.columns.get_slice("number")[parts].astype(np.uint32))
        # Masks are areas of one number: what costs time is done once a run of equal pixels
        flat = numbers.ravel()
        starts = np.flatnonzero(np.append(True, flat[1:] != flat[:-1]))
        place = np.searchsorted(known, flat[starts]).clip(max=len(known) - 1)
        unknown = np.unique(flat[starts][known[place] != flat[starts]])
        if len(unknown):
            raise InputError(f"{png}: has the segments {some(unknown.tolist())} that {self.path} does not list.")
        values = np.append(np.uint8(0), self.value[parts])[place]
        return np.repeat(values, np.diff(starts, append=flat.size)).reshape(numbers.shape)


def unpacked(runs: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Counts of pixels without and with a part, in turn and column by column, from the bytes that pycocotools makes.

    A count is a number of five bits a byte, the lowest first, and from the fourth on its difference to that before the
    last. Not pycocotools' own decoder: it warns under NumPy 2, and reading would need the package.
    """
    digit = runs.astype(np.int64) - 48
    last = digit & 32 == 0
    first = np.flatnonzero(np.append(True, last[:-1]))
    shift = 5 * (np.arange(len(digit)) - np.repeat(first, np.diff(first, append=len(digit))))
    number = np.add.reduceat((digit & 31) << shift, first)
    number -= np.where(digit[last] & 16, np.int64(32) << shift[last], 0)
    number[1::2] = number[1::2].cumsum()
    number[2::2] = number[2::2].cumsum()
    return number


def draw(path: Path) -> NDArray[np.uint8]:
    """The mask that a path `FILE.json#ID` names: (H, W) uint8 categories, 0 for none, IGNORE in crowds of instances.

    Raises:
        InputError: the file is missing or damaged, or has no such image.
    """
    file, _, image = str(path).rpartition("#")
    return annotations(Path(file)).mask(int(image))


def annotations(path: Path) -> Annotations:
    """What a file `instances_*.json` or `panoptic_*.json` says, from the columns that are kept of it.

    Raises:
        InputError: it is missing or damaged, or contradicts itself.
    """
    try:
        stat = path.stat()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): put it there.") from None
    return _annotations(path.absolute(), stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=8)
def _annotations(path: Path, changed: int, size: int) -> Annotations:
    key = blake2b(repr((VERSION, str(path), changed, size)).encode(), digest_size=16).hexdigest()
    kept = cache_dir() / "coco" / f"{key}.safetensors"
    try:
        return _load(path, kept)
    except (OSError, SafetensorError):  # not there yet, or damaged: made anew
        pass
    content: _File
    if _panoptic(path):
        content = read_json(path, _Panoptic)
        columns = _segment_columns(path, content)
    else:
        _pycocotools()  # or the error would come after a minute
        content = read_json(path, _Instances)
        columns = _instance_columns(path, content)
    names = {category.id: category.name for category in sorted(content.categories, key=lambda category: category.id)}
    with replacing(kept) as part:
        save_file(columns, part, {"categories": json.dumps(list(names.items()))})
    return _load(path, kept)


def _panoptic(path: Path) -> bool:
    return path.name.startswith("panoptic")


def _load(path: Path, kept: Path) -> Annotations:
    columns: Any = safe_open(kept, framework="np")
    image, name, first, value = (columns.get_tensor(column) for column in ("image", "name", "first", "value"))
    categories = dict(json.loads(columns.metadata()["categories"]))
    return Annotations(path, _panoptic(path), categories, columns, image, _texts(name), first, value)


def _instance_columns(path: Path, content: _Instances) -> Columns:
    """The parts of an image are in the order in which they are drawn: crowds, then instances from large to small.

    The file's order says nothing of what is in front. Polygons of large things, such as tables, go over what stands on
    them; so the smaller one is on top.
    """
    images, places = _images(path, content.images)
    entries, tool = content.annotations, _pycocotools()
    packed = [_packed(path, entry, images[_place(path, places, entry.image_id)]) for entry in entries]
    image = np.array([places[entry.image_id] for entry in entries], np.int64)
    crowd = np.array([entry.iscrowd for entry in entries], bool)
    area = np.array([tool.area(part) for part in packed], np.int64)  # of more than 255 at once it fails
    order = np.lexsort((-area, ~crowd, image))
    value = _values(path, content, [entry.category_id for entry in entries])
    value[crowd] = IGNORE
    runs = [packed[i]["counts"] for i in order.tolist()]
    return {
        **_of_images(images),
        "shape": np.array([(entry.height, entry.width) for entry in images], np.int32).reshape(-1, 2),
        "first": np.searchsorted(image[order], np.arange(len(images) + 1)),
        "value": value[order],
        "end": np.cumsum([len(part) for part in runs], dtype=np.int64),
        "runs": np.frombuffer(b"".join(runs), np.uint8),
    }


def _packed(path: Path, entry: _Instance, image: _Image) -> dict[str, Any]:
    """The runs of an instance, whichever of the three forms the file has: polygons, counts, or counts as text."""
    found, tool, size = entry.segmentation, _pycocotools(), [image.height, image.width]
    try:
        if isinstance(found, dict):
            if list(found["size"]) != size:
                raise ValueError("another size")
            text = isinstance(found["counts"], str)
            runs = found | {"counts": found["counts"].encode()} if text else tool.frPyObjects(found, *size)
            if not text and sum(found["counts"]) != image.height * image.width:
                raise ValueError("another number of pixels")
        else:
            if not found or min(map(len, found)) < 6:
                raise ValueError("no polygon")
            runs = tool.merge(tool.frPyObjects(found, *size))
        return dict(runs)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise InputError(
            f"{path}: an annotation of {image.file_name} has neither polygons of three points or more nor runs of its "
            "size: correct or remove it."
        ) from error


def _segment_columns(path: Path, content: _Panoptic) -> Columns:
    """Images without an entry have no mask."""
    images, places = _images(path, content.images)
    entries = sorted(content.annotations, key=lambda entry: _place(path, places, entry.image_id))
    images = [images[places[entry.image_id]] for entry in entries]
    _once(path, [image.id for image in images])
    parts = [sorted(entry.segments_info, key=lambda segment: segment.id) for entry in entries]
    flat = [segment for image in parts for segment in image]
    return {
        **_of_images(images),
        "file": _bytes(entry.file_name for entry in entries),
        "first": np.cumsum([0, *map(len, parts)], dtype=np.int64),
        "number": np.array([segment.id for segment in flat], np.int64),
        "value": _values(path, content, [segment.category_id for segment in flat]),
    }


def _images(path: Path, images: Iterable[_Image]) -> tuple[list[_Image], dict[int, int]]:
    """In the order of their ids, and the place of each id."""
    ordered = sorted(images, key=lambda image: image.id)
    _once(path, [image.id for image in ordered])
    return ordered, {image.id: place for place, image in enumerate(ordered)}


def _once(path: Path, ids: Sequence[int]) -> None:
    twice = [a for a, b in pairwise(ids) if a == b]
    if twice:
        raise InputError(f"{path} has the image {twice[0]} twice: remove one of the two.")


def _place(path: Path, places: dict[int, int], image: int) -> int:
    if image not in places:
        raise InputError(f"{path} has an annotation of the image {image}, which it does not list: correct it.")
    return places[image]


def _values(path: Path, content: _File, categories: Sequence[int]) -> NDArray[np.uint8]:
    known = [category.id for category in content.categories]
    unknown = set(categories) - set(known)
    if unknown or len(set(known)) < len(known):
        wrong = (
            f"an annotation of the category {min(unknown)}, which it does not list" if unknown else "a category twice"
        )
        raise InputError(f"{path} has {wrong}: correct it.")
    return np.array(categories, np.uint8)


def _of_images(images: Sequence[_Image]) -> Columns:
    return {"image": np.array([image.id for image in images], np.int64), "name": _bytes(i.file_name for i in images)}


def _bytes(texts: Iterable[str]) -> NDArray[np.uint8]:
    """Texts as (n, longest) uint8: the file of columns knows no texts."""
    array = np.array([text.encode() for text in texts], dtype=np.bytes_)
    return np.frombuffer(array.tobytes(), np.uint8).reshape(len(array), array.dtype.itemsize)


def _texts(array: NDArray[np.uint8]) -> NDArray[np.bytes_]:
    return np.frombuffer(array.tobytes(), f"S{array.shape[1]}")


def _png(path: Path, name: str) -> Path:
    """A PNG of segments: in the folder that is named like the file, beside it or one above."""
    return next(
        (folder / name for folder in png_folders(path) if (folder / name).is_file()), png_folders(path)[0] / name
    )


def png_folders(path: Path) -> tuple[Path, Path]:
    """Where the PNGs of `annotations/panoptic_train2017.json` may be: beside it, as it is unpacked, or one above."""
    return path.with_suffix(""), path.parents[1] / path.stem


def _pycocotools() -> Any:
    try:
        from pycocotools import mask
    except ImportError as error:
        raise InputError(_MISSING) from error
    return mask
