"""Which predicted pixels can be relied on: a split at a quantile of their entropy (Wang et al., U2PL, CVPR 2022)."""

import math

import torch
from torch import Tensor

BINS = 4096


def entropy(probs: Tensor) -> Tensor:
    """Of class probabilities (B, C, ...) -> (B, ...), in nats, 0..ln C."""
    nats: Tensor = torch.special.entr(probs).sum(1)
    return nats


def histogram(entropy: Tensor, valid: Tensor, classes: int) -> Tensor:
    """How many valid pixels have which entropy: (BINS,) float64, to be added up over processes.

    entropy (B, H, W) in nats; valid (B, H, W) bool. Bins are even in the fourth root: a trained network is sure of
    nearly everything, and its quantiles lie at entropies far below any even bin.
    """
    bins = _root(entropy, classes).mul(BINS).long().clamp(0, BINS - 1)
    cells = bins.masked_fill(~valid, BINS).flatten()
    counts = torch.zeros(BINS + 1, dtype=torch.float64, device=entropy.device)
    return counts.scatter_add_(0, cells, torch.ones_like(cells, dtype=torch.float64))[:BINS]


def threshold(counts: Tensor, share: float, classes: int) -> Tensor:
    """The entropy below which `share` (0..1) of the pixels of a `histogram` lie: a scalar in nats, NaN without a pixel.

    Linear inside the bin: that of `quantile` to about a thousandth of its value, a hundredth where that is below 1e-6.
    """
    upto = counts.cumsum(0)
    rank = share * (upto[-1] - 1)  # as NumPy counts: 0 is the least, 1 the greatest
    place = torch.searchsorted(upto, rank.clamp(min=0).unsqueeze(0), right=True).clamp(max=BINS - 1)
    inside = upto[place] - counts[place]
    root = (place + (rank - inside + 0.5) / counts[place].clamp(min=1)) / BINS
    return (root**4 * math.log(classes)).squeeze(0).masked_fill(upto[-1] == 0, torch.nan)


def quantile(entropy: Tensor, valid: Tensor, share: float) -> Tensor:
    """The same exactly, with NumPy's linear interpolation; a scalar, NaN without a pixel."""
    # Not torch.nanquantile: it refuses more than 2^24 numbers.
    ordered = entropy.masked_fill(~valid, torch.inf).flatten().sort().values
    rank = share * (valid.sum() - 1).clamp(min=0).double()
    below, above = rank.floor().long(), rank.ceil().long()
    ends = ordered.index_select(0, torch.stack([below, above]))  # ordered[below] would wait for the device
    found = torch.lerp(ends[0], ends[1], (rank - below).to(ordered.dtype))
    return found.masked_fill(valid.sum() == 0, torch.nan)


def _root(entropy: Tensor, classes: int) -> Tensor:
    return (entropy / math.log(classes)).clamp(0, 1).sqrt().sqrt()
