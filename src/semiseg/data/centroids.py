"""Where classes are in masks, so that a share of the crops can be drawn around each of them alike.

Source: the uniform sampling of Zhu et al. 2019 (arXiv:1812.01593), which their self-training (arXiv:2004.14960) uses.
"""

import contextlib
import zipfile
from dataclasses import dataclass
from hashlib import blake2b
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from semiseg import parallel
from semiseg.data.cache import cache_dir, open_confidence, open_mask
from semiseg.data.formats import mask_file
from semiseg.data.rows import Rows
from semiseg.data.splits import Data
from semiseg.files import replacing
from semiseg.types import IGNORE, InputError

Mask = NDArray[np.uint8]
LEAST = 64
"""px of a class in a tile that count as presence: single stray ones are noise, in pseudo-labels above all."""
SURE = 0.5
"""Confidence from which a pseudo-label's pixel counts for places."""
VERSION = 2
"""Of how places are found: kept ones of another are found anew."""


@dataclass(frozen=True, eq=False)
class Centroids:
    """One place a class and tile of every mask, class after class.

    row, y, x (n,) int32: row number in the pool, and px in the mask at the size that training works on; the place is of
    its class. first (C + 1,): class c has the places first[c] to first[c + 1].
    """

    row: NDArray[np.int32]
    y: NDArray[np.int32]
    x: NDArray[np.int32]
    first: NDArray[np.int64]

    @property
    def counts(self) -> NDArray[np.int64]:
        """(C,) places of each class."""
        return np.diff(self.first)


def places(mask: Mask, classes: int, tile: tuple[int, int], least: int = LEAST) -> NDArray[np.int64]:
    """The places of one mask (H, W): (n, 3) of class, y, x, one for each class that a tile (h, w) has `least` px of.

    The place is the centre of mass; where that is of another class, the nearest pixel of the class in the tile, in the
    nearest row that has one. Tiles at the right and bottom border may be smaller.
    """
    height, width = mask.shape
    kinds = classes + 1  # IGNORE is the class behind the last
    label = np.minimum(mask, classes)
    y, x = np.arange(height), np.arange(width)
    tile_y, tile_x = y // tile[0], x // tile[1]
    down, across = int(tile_y[-1]) + 1, int(tile_x[-1]) + 1
    # Histograms of rows and of columns, from which the sums of a tile follow: one with weights takes far longer.
    key = label + tile_x * kinds
    key += (y * across * kinds)[:, None]
    rows = np.bincount(key.ravel(), minlength=height * across * kinds).reshape(height, across * kinds)
    key += (x * down - tile_x) * kinds
    key += ((tile_y - y * across) * kinds)[:, None]
    columns = np.bincount(key.ravel(), minlength=width * down * kinds).reshape(width, down, kinds)
    count = np.add.reduceat(rows, y[:: tile[0]]).reshape(down, across, kinds)
    some = np.maximum(count, 1)
    middle_y = np.add.reduceat(rows * y[:, None], y[:: tile[0]]).reshape(some.shape) / some
    middle_x = np.add.reduceat(columns * x[:, None, None], x[:: tile[1]]).swapaxes(0, 1) / some

    wanted = count >= least
    wanted[..., classes] = False
    at_y, at_x = middle_y.astype(np.int64), middle_x.astype(np.int64)
    lost = wanted & (label[at_y, at_x] != np.arange(kinds))
    if lost.any():
        # In the row of the class that is nearest to the middle, its pixel that is nearest to the middle.
        at, place_x, own = np.nonzero(lost)
        there = rows[:, place_x * kinds + own].T > 0
        apart = np.abs(y - middle_y[lost][:, None])
        apart[~there | (tile_y != at[:, None])] = np.inf
        at_y[lost] = apart.argmin(1)
        apart = np.abs(x - middle_x[lost][:, None])
        apart[(label[at_y[lost]] != own[:, None]) | (tile_x != place_x[:, None])] = np.inf
        at_x[lost] = apart.argmin(1)
    chosen = np.nonzero(wanted)
    return np.stack([chosen[2], at_y[chosen], at_x[chosen]], 1)


def class_centroids(rows: Rows, data: Data, tile: tuple[int, int], least: int = LEAST, workers: int = 0) -> Centroids:
    """The places of all classes in the masks of a pool, at the size that training works on.

    Found once, by the first of several processes, which tells the others. They are kept with the resized images, known
    by the masks' files, the size, the tile and `least`. Of pseudo-labels only px of a confidence of SURE count.

    Args:
        rows: the pool; every row has a mask.
        data: classes, code and size of the masks.
        tile: (h, w) in px; the crop's size gives a place for each crop's worth of image.
        least: px of a class in a tile that count as presence.
        workers: processes that read masks.

    Raises:
        InputError: a mask cannot be read.
    """
    found = _found_or_kept(rows, data, tile, least, workers) if parallel.rank() == 0 else None
    found = parallel.first(found)
    assert found is not None
    return found


def _found_or_kept(rows: Rows, data: Data, tile: tuple[int, int], least: int, workers: int) -> Centroids:
    kept = _kept(rows, data, tile, least)
    if (found := _load(kept)) is None:
        found = _find(rows, data, tile, least, workers)
        file = BytesIO()
        np.savez(file, row=found.row, y=found.y, x=found.x, first=found.first)
        with contextlib.suppress(InputError), replacing(kept) as part:  # a full disk costs time, not the run
            part.write_bytes(file.getvalue())
    return found


def _load(kept: Path) -> Centroids | None:
    try:
        # From memory: of a damaged file np.load would leave the handle open.
        with np.load(BytesIO(kept.read_bytes()), allow_pickle=False) as file:
            return Centroids(file["row"], file["y"], file["x"], file["first"])
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return None  # not there yet, or damaged: found anew


def _find(rows: Rows, data: Data, tile: tuple[int, int], least: int, workers: int) -> Centroids:
    found = []
    quiet = parallel.quiet_worker if workers else None
    masks = _Masks(rows, data, tile, least)
    for number, item in enumerate(DataLoader(masks, batch_size=None, num_workers=workers, worker_init_fn=quiet)):
        if isinstance(item, InputError):
            raise item
        found.append(np.insert(item.numpy(), 0, number, axis=1))
    table = np.concatenate([np.zeros((0, 4), dtype=np.int64), *found])
    row, label, y, x = table[np.argsort(table[:, 1], kind="stable")].T
    first = np.concatenate([[0], np.bincount(label, minlength=len(data.classes)).cumsum()])
    return Centroids(row.astype(np.int32), y.astype(np.int32), x.astype(np.int32), first)


class _Masks(Dataset[Any]):
    """Item i holds the places of row i's mask, or what is wrong with the file."""

    def __init__(self, rows: Rows, data: Data, tile: tuple[int, int], least: int) -> None:
        self.rows, self.data, self.tile, self.least = rows, data, tile, least

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Tensor | InputError:
        d, row = self.data, self.rows[i]
        try:
            mask = open_mask(row, d.code, d.config.size, d.config.cache)
            if row.confidence is not None:
                mask[open_confidence(row, d.config.size) < 255 * SURE] = IGNORE
        except InputError as error:
            return error
        return torch.from_numpy(places(mask, len(d.classes), self.tile, self.least))


def _kept(rows: Rows, data: Data, tile: tuple[int, int], least: int) -> Path:
    """The file of these places, another one whenever a mask changes."""
    key = blake2b(repr((VERSION, data.code, data.config.size, tile, least)).encode(), digest_size=16)
    for row in rows:
        assert row.mask is not None, f"{row.name} has no mask"
        for path in (row.mask, row.confidence) if row.confidence is not None else (row.mask,):
            try:
                stat = mask_file(path).stat()
            except OSError as error:
                raise InputError(f"{path} cannot be read ({error.strerror}): restore it.") from error
            key.update(repr((str(path.absolute()), stat.st_mtime_ns, stat.st_size, row.code)).encode())
    return cache_dir() / "centroids" / f"{key.hexdigest()}.npz"
