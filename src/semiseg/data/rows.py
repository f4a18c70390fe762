"""Pools of images as columns: a million rows cost some 60 MB, where a list of objects would cost gigabytes."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Self, overload

import numpy as np
from numpy.dtypes import StringDType
from numpy.typing import NDArray

from semiseg.data.formats import MaskCode

Strings = NDArray[Any]
"""An array whose dtype is StringDType."""


class Row(NamedTuple):
    """One image of a pool. `name` is its entry in the pool's image column; `mask` is None for an unlabelled image.

    `code`: how the mask is read where it is not one of the data's own.
    `confidence`: a map of 0..255 in the mask's size, of a pseudo-label.
    """

    image: Path
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

    root: absolute folder, or "" where the columns hold absolute paths; image (n,) and mask (n,) StringDType: paths
    relative to root with forward slashes, mask "" for none; code (n,) uint8, 0 for the data's own, i for codes[i - 1];
    confidence (n,) StringDType as mask. None: of no row.
    """

    root: str
    image: Strings
    mask: Strings
    code: NDArray[np.uint8] | None = None
    codes: tuple[MaskCode, ...] = ()
    confidence: Strings | None = None

    def __post_init__(self) -> None:
        assert self.image.ndim == 1
        columns = (self.mask, self.code, self.confidence)
        assert all(column is None or column.shape == self.image.shape for column in columns)

    @classmethod
    def of(cls, root: Path | str, images: Iterable[str], masks: Iterable[str] | None = None) -> Self:
        """Builds a pool from paths relative to `root`; without `masks` no row has one."""
        image = np.fromiter(images, StringDType())
        mask = np.zeros(len(image), StringDType()) if masks is None else np.fromiter(masks, StringDType())
        return cls(str(root), image, mask)

    def __len__(self) -> int:
        return len(self.image)

    @overload
    def __getitem__(self, key: int | np.integer[Any]) -> Row: ...
    @overload
    def __getitem__(self, key: slice | NDArray[Any] | list[int]) -> Self: ...
    def __getitem__(self, key: int | np.integer[Any] | slice | NDArray[Any] | list[int]) -> Row | Self:
        """A number gives that Row; a slice, an index array or a boolean array gives the chosen Rows in that order."""
        if isinstance(key, (int, np.integer)):
            name, mask = self.image[key], self.mask[key]
            number = 0 if self.code is None else int(self.code[key])
            own = self.codes[number - 1] if number else None
            sure = "" if self.confidence is None else self.confidence[key]
            files = (Path(self.root, file) if file else None for file in (mask, sure))
            return Row(Path(self.root, name), next(files), name, own, next(files))
        index = np.array(key, np.intp) if isinstance(key, list) else key
        code, confidence = (None if column is None else column[index] for column in (self.code, self.confidence))
        return type(self)(self.root, self.image[index], self.mask[index], code, self.codes, confidence)

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))

    def __add__(self, other: "Rows") -> "Rows":
        """One pool after the other; where the roots differ, the columns become absolute paths and the root ""."""
        if self.root != other.root:
            return self._absolute() + other._absolute()
        image, mask = (np.concatenate(pair) for pair in ((self.image, other.image), (self.mask, other.mask)))
        codes = (*self.codes, *(code for code in other.codes if code not in self.codes))
        numbers = np.array([0, *(codes.index(code) + 1 for code in other.codes)], np.uint8)
        code = self._joined(other, self.code, None if other.code is None else numbers[other.code], np.uint8)
        confidence = self._joined(other, self.confidence, other.confidence, StringDType())
        return Rows(self.root, image, mask, code, codes, confidence)

    def _joined(
        self, other: "Rows", own: NDArray[Any] | None, its: NDArray[Any] | None, kind: Any
    ) -> NDArray[Any] | None:
        """A column that may be missing, of both pools."""
        if own is None and its is None:
            return None
        columns = ((self, own), (other, its))
        return np.concatenate([np.zeros(len(rows), kind) if some is None else some for rows, some in columns])

    @property
    def names(self) -> Strings:
        """(n,) StringDType, what identifies a row: the image column."""
        return self.image

    @property
    def masked(self) -> NDArray[np.bool_]:
        """(n,) bool, True where the row has a mask."""
        return np.not_equal(self.mask, "")

    def without_masks(self) -> "Rows":
        """The same images with no mask, so that none can be opened."""
        return Rows(self.root, self.image, np.zeros(len(self), StringDType()))

    def with_masks(self, masks: Iterable[Path], code: MaskCode, confidences: Iterable[Path] | None = None) -> "Rows":
        """The same images with other masks, one absolute path a row, read by `code`, and maps of their confidence."""
        rows = Rows.of("", (Path(self.root, p).as_posix() for p in self.image), (p.as_posix() for p in masks))
        sure = None if confidences is None else np.fromiter((p.as_posix() for p in confidences), StringDType())
        return replace(rows, confidence=sure).read_by(code)

    def read_by(self, code: MaskCode) -> "Rows":
        """The same rows, with masks that are read by `code`."""
        return replace(self, code=np.ones(len(self), np.uint8), codes=(code,))

    def _absolute(self) -> "Rows":
        if self.root == "":
            return self
        image, mask = ([Path(self.root, p).as_posix() if p else "" for p in c] for c in (self.image, self.mask))
        return replace(Rows.of("", image, mask), code=self.code, codes=self.codes, confidence=self.confidence)
