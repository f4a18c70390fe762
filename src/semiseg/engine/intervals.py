"""95 % intervals of a difference in mIoU: over trainings, and over images by resampling (whose neighbours are alike).

Künsch 1989 (block bootstrap); Hall, Horowitz and Jing 1995 (length of blocks); Hesterberg 2015 (percentiles of few).
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from semiseg.data.splits import looks_like_sequences, prefixes
from semiseg.engine.evaluate import Scores

RESAMPLES = 2000

Floats = NDArray[np.float64]
Interval = tuple[float, float]


def over_training(changes: Floats) -> Interval | None:
    """95 % t-interval of the mean of paired differences (n,); none for fewer than two."""
    if len(changes) < 2:
        return None
    half = float(stats.t.ppf(0.975, len(changes) - 1) * changes.std(ddof=1) / math.sqrt(len(changes)))
    return float(changes.mean()) - half, float(changes.mean()) + half


def over_images(a: Scores, b: Scores) -> Interval | None:
    """95 % interval of the difference in mIoU (per cent) when the images are drawn again, the same for both.

    Neighbours in a sequence are alike, so that blocks of them are drawn. None where there are fewer than five blocks.
    """
    changes, shown = _drawn_again(a, b)
    known = ~np.isnan(changes)  # the references are the same, and so is which classes a draw has
    counts = known.sum(1)
    means = np.where(known, changes, 0).sum(1)[counts > 0] / counts[counts > 0]
    return _limits(means, len(shown))


def classes_over_images(a: Scores, b: Scores) -> list[Interval | None]:
    """Likewise of each class's IoU; none where fewer than five blocks show it."""
    changes, shown = _drawn_again(a, b)
    of_classes = zip(changes.T, shown.sum(0).tolist(), strict=True)
    return [_limits(values[~np.isnan(values)], count) for values, count in of_classes]


def _drawn_again(a: Scores, b: Scores) -> tuple[Floats, NDArray[np.bool_]]:
    """Differences (RESAMPLES, C) of the classes' IoU, NaN where no image drawn has the class; whether a block has it,
    (blocks, C)."""
    block = blocks(a.names)
    count = int(block.max()) + 1
    weights = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=RESAMPLES).astype(float)
    ours, theirs = (_areas(scores, block, count) for scores in (a, b))
    changes = _ious(*(weights @ area for area in ours)) - _ious(*(weights @ area for area in theirs))
    return 100 * changes, ours[1] > 0


def _areas(scores: Scores, block: NDArray[np.intp], count: int) -> tuple[Floats, Floats, Floats]:
    """Of each block and class (count, C) the pixels that are right, the reference's, and the prediction's."""
    pixels = scores.confusions
    found = []
    for area in (pixels.diagonal(axis1=1, axis2=2), pixels.sum(2), pixels.sum(1)):
        sums = np.zeros((count, area.shape[1]))
        np.add.at(sums, block, area)
        found.append(sums)
    return found[0], found[1], found[2]


def _ious(both: Floats, reference: Floats, predicted: Floats) -> Floats:
    # As in ops.metrics.iou, from three numbers a class: confusion matrices would take gigabytes.
    absent = np.full_like(both, np.nan)
    return np.divide(both, reference + predicted - both, out=absent, where=reference > 0)


def _limits(changes: Floats, count: int) -> Interval | None:
    """95 % interval of a difference from what it is when `count` blocks are drawn again."""
    if count < 5 or not len(changes):
        return None
    # Percentiles of resampled means are too narrow where there are few: as far out as a t-interval would go.
    outside = 100 * stats.norm.cdf(stats.t.ppf(0.025, count - 1) * math.sqrt(count / (count - 1)))
    low, high = np.percentile(changes, [outside, 100 - outside])
    return float(low), float(high)


def block_length(names: Sequence[str]) -> int:
    """How many neighbours are drawn together: 1, or where names look like sequences the cube root of their number."""
    return max(1, round(len(names) ** (1 / 3))) if looks_like_sequences(names, 1) else 1


def blocks(names: Sequence[str]) -> NDArray[np.intp]:
    """The number of the block (n,) of each image; a block is of one sequence."""
    length = block_length(names)
    if length == 1:
        return np.arange(len(names))
    numbers = np.empty(len(names), dtype=np.intp)
    _, sequence = np.unique(np.array(prefixes(names), dtype=np.dtypes.StringDType()), return_inverse=True)
    first = 0
    for s in range(sequence.max() + 1):
        frames = np.flatnonzero(sequence == s)
        frames = frames[np.argsort([_last_number(names[int(i)]) for i in frames], kind="stable")]
        count = math.ceil(len(frames) / length)
        numbers[frames] = first + np.arange(len(frames)) * count // len(frames)
        first += count
    return numbers


def _last_number(name: str) -> int:
    """The number a name ends with, by which frames follow one another."""
    bare = name.rpartition(".")[0] or name
    digits = bare[len(bare.rstrip("0123456789")) :]
    return int(digits or 0)
