"""Pools of images as columns: a million rows cost some 60 MB, where a list of objects would cost gigabytes."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Self, overload

import numpy as np
from numpy.dtypes import StringDType
from numpy.typing import NDArray

Strings = NDArray[Any]
"""An array whose dtype is StringDType."""


class Row(NamedTuple):
    """One image of a pool. `name` is its entry in the pool's image column; `mask` is None for an unlabelled image.

    `plain`: the mask holds class ids and IGNORE as they are, whatever the code of the data's own masks.
    `confidence`: a map of 0..255 in the mask's size, of a pseudo-label.
    """

    image: Path
    mask: Path | None
    name: str
    plain: bool = False
    confidence: Path | None = None

    @property
    def soft(self) -> Path:
        """The file of a soft pseudo-label's less probable classes: in a folder beside that of the confidence."""
        assert self.confidence is not None, f"{self.name} has no pseudo-label"
        shard = self.confidence.parent
        return shard.parents[1] / "soft" / shard.name / self.confidence.name


@dataclass(frozen=True, eq=False)
class Rows:
    """A pool of images, some or all with masks.

    root: absolute folder, or "" where the columns hold absolute paths; image (n,) and mask (n,) StringDType: paths
    relative to root with forward slashes, mask "" for none; plain (n,) bool and confidence (n,) StringDType as in Row,
    none: of no row.
    """

    root: str
    image: Strings
    mask: Strings
    plain: NDArray[np.bool_] | None = None
    confidence: Strings | None = None

    def __post_init__(self) -> None:
        assert self.image.ndim == 1
        columns = (self.mask, self.plain, self.confidence)
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
            plain = self.plain is not None and bool(self.plain[key])
            sure = "" if self.confidence is None else self.confidence[key]
            files = (Path(self.root, file) if file else None for file in (mask, sure))
            return Row(Path(self.root, name), next(files), name, plain, next(files))
        index = np.array(key, np.intp) if isinstance(key, list) else key
        optional = (None if column is None else column[index] for column in (self.plain, self.confidence))
        return type(self)(self.root, self.image[index], self.mask[index], *optional)

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))

    def __add__(self, other: "Rows") -> "Rows":
        """One pool after the other; where the roots differ, the columns become absolute paths and the root ""."""
        if self.root != other.root:
            return self._absolute() + other._absolute()
        image, mask = (np.concatenate(pair) for pair in ((self.image, other.image), (self.mask, other.mask)))
        plain = self._joined(other, self.plain, other.plain, np.bool_)
        return Rows(
            self.root, image, mask, plain, self._joined(other, self.confidence, other.confidence, StringDType())
        )

    def _joined(self, other: "Rows", own: NDArray[Any] | None, its: NDArray[Any] | None, kind: Any) -> Strings | None:
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

    def with_plain_masks(self, masks: Iterable[Path], confidences: Iterable[Path] | None = None) -> "Rows":
        """The same images with masks of plain class ids, one absolute path a row, and maps of their confidence."""
        columns = [Path(self.root, p).as_posix() for p in self.image], [p.as_posix() for p in masks]
        rows = Rows.of("", *columns)
        sure = None if confidences is None else np.fromiter((p.as_posix() for p in confidences), StringDType())
        return Rows("", rows.image, rows.mask, np.ones(len(self), np.bool_), sure)

    def _absolute(self) -> "Rows":
        if self.root == "":
            return self
        image, mask = ([Path(self.root, p).as_posix() if p else "" for p in c] for c in (self.image, self.mask))
        return replace(Rows.of("", image, mask), plain=self.plain, confidence=self.confidence)
