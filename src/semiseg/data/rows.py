"""Pools of images as columns: a million rows cost some 60 MB, where a list of objects would cost gigabytes."""

import hashlib
import posixpath
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Self, overload

import numpy as np
from numpy.dtypes import StringDType
from numpy.typing import NDArray

from semiseg.data.formats import MaskCode
from semiseg.data.packed import File, Packed, Shard

Strings = NDArray[Any]
"""An array whose dtype is StringDType."""
CHUNK = 1000
"""Rows whose names are one text at a time."""


class Row(NamedTuple):
    """One image of a pool. `name` is what `Rows.names` has for it; `mask` is None for an unlabelled image.

    `code`: how the mask is read where it is not one of the data's own.
    `confidence`: a map of 0..255 in the mask's size, of a pseudo-label.
    """

    image: File
    mask: Path | None
    name: str
    code: MaskCode | None = None
    confidence: Path | None = None

    @property
    def soft(self) -> Path:
        """The file of a soft pseudo-label's less probable classes: in a folder beside that of the confidence."""
        assert self.confidence is not None, f"{self.name} has no pseudo-label"
        shard = self.confidence.parent
        return shard.parents[1] / "soft" / shard.name / f"{self.confidence.stem}.npz"


@dataclass(frozen=True, eq=False)
class Rows:
    """A pool of images, some or all with masks.

    image (n,) and mask (n,) StringDType: paths with forward slashes in the row's place, which is an absolute folder or
    a shard, or absolute paths (masks of images in a shard always); mask "" for none.
    place (n,) uint32: i for places[i]; None: all are in places[0].
    at (n, 2) int64: where in its shard an image is, as in `Packed`; None where no place is a shard.
    code (n,) uint8: 0 for masks that are read as the data's own, i for those in folders[i - 1] ("": in the row's place)
    that are read by codes[i - 1]. confidence (n,) StringDType: maps beside the masks. None: of no row.
    """

    image: Strings
    mask: Strings
    places: tuple[str | Shard, ...]
    place: NDArray[np.uint32] | None = None
    at: NDArray[np.int64] | None = None
    code: NDArray[np.uint8] | None = None
    codes: tuple[MaskCode, ...] = ()
    folders: tuple[str, ...] = ()
    confidence: Strings | None = None

    def __post_init__(self) -> None:
        assert self.image.ndim == 1
        columns = (self.mask, self.place, self.at, self.code, self.confidence)
        assert all(column is None or len(column) == len(self.image) for column in columns)
        assert self.place is not None or len(self.places) == 1
        assert len(self.codes) == len(self.folders)

    @classmethod
    def of(cls, root: Path | str, images: Iterable[str], masks: Iterable[str] | None = None) -> Self:
        """Builds a pool from paths relative to `root`; without `masks` no row has one."""
        image = np.fromiter(images, StringDType())
        mask = np.zeros(len(image), StringDType()) if masks is None else np.fromiter(masks, StringDType())
        return cls(image, mask, (str(root),))

    @property
    def root(self) -> str:
        """The folder of all files; "" where there are several."""
        return str(self.places[0]) if len(self.places) == 1 else ""

    def __len__(self) -> int:
        return len(self.image)

    @overload
    def __getitem__(self, key: int | np.integer[Any]) -> Row: ...
    @overload
    def __getitem__(self, key: slice | NDArray[Any] | list[int]) -> Self: ...
    def __getitem__(self, key: int | np.integer[Any] | slice | NDArray[Any] | list[int]) -> Row | Self:
        """A number gives that Row; a slice, an index array or a boolean array gives the chosen Rows in that order."""
        if isinstance(key, (int, np.integer)):
            return self._row(int(key))
        index = np.array(key, np.intp) if isinstance(key, list) else key
        names = ("image", "mask", "place", "at", "code", "confidence")
        columns = {name: column[index] for name in names if (column := getattr(self, name)) is not None}
        return replace(self, **columns)

    def _row(self, i: int) -> Row:
        name, place = self.image[i], self.places[0 if self.place is None else self.place[i]]
        number = 0 if self.code is None else int(self.code[i])
        own, folder = (self.codes[number - 1], self.folders[number - 1]) if number else (None, "")
        mask, sure = (
            Path(str(place), folder, column[i]) if column is not None and column[i] else None
            for column in (self.mask, self.confidence)
        )
        image: File = Path(str(place), name)
        if isinstance(place, Shard):
            assert self.at is not None, "a shard's images are found by numbers"
            image = Packed(place, name, (int(self.at[i, 0]), int(self.at[i, 1])))
        return Row(image, mask, name if len(self.places) == 1 else posixpath.join(str(place), name), own, sure)

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))

    def __add__(self, other: "Rows") -> "Rows":
        """One pool after the other."""
        if not len(self) or not len(other):
            return self if len(self) else other
        places = tuple(dict.fromkeys(self.places + other.places))
        place = np.concatenate([self._numbers(places), other._numbers(places)]) if len(places) > 1 else None
        kinds, its = list(zip(self.codes, self.folders, strict=True)), zip(other.codes, other.folders, strict=True)
        numbers = [0]
        for kind in its:
            kinds += [kind] if kind not in kinds else []
            numbers.append(kinds.index(kind) + 1)
        code = None if other.code is None else np.array(numbers, np.uint8)[other.code]
        return Rows(
            np.concatenate([self.image, other.image]),
            np.concatenate([self.mask, other.mask]),
            places,
            place,
            self._joined(other, self.at, other.at),
            self._joined(other, self.code, code),
            tuple(code for code, _ in kinds),
            tuple(folder for _, folder in kinds),
            self._joined(other, self.confidence, other.confidence),
        )

    def _numbers(self, places: tuple[str | Shard, ...]) -> NDArray[np.uint32]:
        """(n,) the number in `places` of each row's place."""
        known = {place: number for number, place in enumerate(places)}
        own = np.array([known[place] for place in self.places], np.uint32)
        return np.full(len(self), own[0]) if self.place is None else own[self.place]

    def _joined(self, other: "Rows", own: NDArray[Any] | None, its: NDArray[Any] | None) -> NDArray[Any] | None:
        """A column that may be missing, of both pools."""
        known = own if own is not None else its
        if known is None:
            return None
        columns = ((self, own), (other, its))
        return np.concatenate(
            [np.zeros((len(r), *known.shape[1:]), known.dtype) if c is None else c for r, c in columns]
        )

    @property
    def names(self) -> Strings:
        """(n,) StringDType, what identifies a row: the image column, behind the row's place where there are several."""
        return self.image if len(self.places) == 1 else self._paths()

    def digest(self) -> str:
        """What tells these images from others: their number, and a hash of their names in their order."""
        images = hashlib.sha256()
        for start in range(0, len(self), CHUNK):  # one text of a million names would take gigabytes
            names = "\n".join(self[start : start + CHUNK].names)
            images.update((names if start == 0 else f"\n{names}").encode())
        return f"{len(self)}, {images.hexdigest()[:16]}"

    def _paths(self) -> Strings:
        """(n,) StringDType, the image column behind the row's place."""
        homes = [str(place) for place in self.places]
        pairs = zip(self._numbers(self.places), self.image, strict=True)
        return np.fromiter((posixpath.join(homes[number], name) for number, name in pairs), StringDType())

    def without(self, other: "Rows") -> Self:
        """The rows whose image is not in the other pool."""
        return self[~np.isin(self._paths(), other._paths())]

    @property
    def masked(self) -> NDArray[np.bool_]:
        """(n,) bool, True where the row has a mask."""
        return np.not_equal(self.mask, "")

    def without_masks(self) -> "Rows":
        """The same images with no mask, so that none can be opened."""
        return Rows(self.image, np.zeros(len(self), StringDType()), self.places, self.place, self.at)

    def with_masks(
        self,
        masks: Iterable[str | Path],
        code: MaskCode,
        confidences: Iterable[str | Path] | None = None,
        folder: Path | str = "",
    ) -> "Rows":
        """The same images with other masks, read by `code`, and maps of their confidence: a path a row of each.

        The paths are relative to `folder`, or absolute.
        """
        sure = None if confidences is None else np.fromiter(map(str, confidences), StringDType())
        mask, number = np.fromiter(map(str, masks), StringDType()), np.ones(len(self), np.uint8)
        return replace(self, mask=mask, code=number, codes=(code,), folders=(str(folder),), confidence=sure)

    def read_by(self, code: MaskCode) -> "Rows":
        """The same rows, with masks that are read by `code`."""
        assert not any(self.folders), "these masks lie elsewhere"
        return replace(self, code=np.ones(len(self), np.uint8), codes=(code,), folders=("",))
