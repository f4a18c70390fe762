"""95 % intervals of a difference in mIoU: over trainings, and over images by resampling (whose neighbours are alike).

Künsch 1989 (block bootstrap); Hall, Horowitz and Jing 1995 (length of blocks); Hesterberg 2015 (percentiles of few).
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from semiseg.data.splits import looks_like_sequences, prefixes
from semiseg.engine.evaluate import Scores
from semiseg.ops.metrics import miou

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
    block = blocks(a.names)
    count = int(block.max()) + 1 if len(block) else 0
    if count < 5:
        return None
    weights = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=RESAMPLES).astype(float)
    changes = 100 * (_mious(_by_block(a, block), weights) - _mious(_by_block(b, block), weights))
    # Percentiles of resampled means are too narrow where there are few: as far out as a t-interval would go.
    outside = 100 * stats.norm.cdf(stats.t.ppf(0.025, count - 1) * math.sqrt(count / (count - 1)))
    low, high = np.nanpercentile(changes, [outside, 100 - outside])
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


def _by_block(scores: Scores, block: NDArray[np.intp]) -> Floats:
    sums = np.zeros((block.max() + 1, *scores.confusions.shape[1:]))
    np.add.at(sums, block, scores.confusions)
    return sums


def _mious(confusions: Floats, weights: Floats) -> Floats:
    # Pixels below 2^53 are exact as floats, whose products are many times as fast as those of whole numbers.
    classes = confusions.shape[1]
    totals = (weights @ confusions.reshape(len(confusions), -1)).reshape(len(weights), classes, classes)
    values: Floats = miou(torch.from_numpy(totals)).numpy()
    return values
