"""Contrast: a pixel's feature is drawn to its class's and away from those of pixels that are surely of another class.

Source: Wang et al., "Semi-Supervised Semantic Segmentation Using Unreliable Pseudo-Labels" (U2PL), CVPR 2022. Classes
are a dimension here, never a loop; chance comes in as uniform numbers u in [0, 1).

    P  pixels of all images, labelled and unlabelled      M  anchors a class
    D  width of a feature                                 R  keys a class from which negatives are drawn
    Q  keys a class and push                              N  negatives an anchor
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from semiseg.types import IGNORE


def candidates(
    label: Tensor, probs: Tensor, trusted: Tensor, masked: Tensor, keyed: Tensor, least: float, ranks: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Which pixels stand for a class, and which tell what the class is not.

    label (P,) class ids or IGNORE, a mask's or a pseudo-label; probs (P, C), the teacher's; trusted (P,) bool: labels
    to learn from, masks and reliable pseudo-labels; masked (P,) bool: the label is a mask's; keyed (P,) bool:
    unlabelled pixels that may become negatives, in the paper the unreliable ones.

    `least`: an anchor's class has a higher probability. `ranks` (low, high): a class's rank in a pixel is how many
    classes are more probable there. An unlabelled pixel is a negative of the classes of rank low..high-1: it may be of
    those before, and those behind nobody would take it for. A labelled pixel is a negative of the classes of rank below
    low that are not its own: the teacher was tempted.

    Returns (anchors, negatives), each (P, C) bool.
    """
    own = label.unsqueeze(1) == torch.arange(probs.shape[1], device=label.device)  # IGNORE equals no class
    anchors = own & trusted.unsqueeze(1) & (probs > least)
    low, high = (_before(probs, rank) for rank in ranks)
    tempting = (masked & (label != IGNORE)).unsqueeze(1) & ~own & low
    negatives = keyed.unsqueeze(1) & ~low & high
    return anchors, tempting | negatives


def _before(probs: Tensor, rank: int) -> Tensor:
    """(P, C) bool: the class's rank is less than `rank`."""
    behind = probs.shape[1] - rank
    if behind <= 0:
        return torch.ones_like(probs, dtype=torch.bool)
    # The class of rank - 1, the rank-th from above, by whichever way is shorter.
    if rank <= behind:
        return probs >= probs.topk(rank, dim=1, sorted=False).values.amin(1, keepdim=True)
    return probs >= probs.topk(behind + 1, dim=1, largest=False, sorted=False).values.amax(1, keepdim=True)


def class_sums(anchors: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the keys (B, D, h, w) of every class's anchors (P, C), (C, D), and how many they are, (C,)."""
    shares = anchors.view(len(keys), -1, anchors.shape[1]).to(keys.dtype)
    return (keys.flatten(2) @ shares).sum(0).T, anchors.sum(0).to(keys.dtype)


def at(maps: Tensor, pixels: Tensor) -> Tensor:
    """What maps (B, D, h, w) hold at pixels (C, M), numbered over images, rows and columns -> (C, M, D)."""
    # Rows of the maps: no copy where channels are last in memory. Not maps[b, :, y, x]: on several threads of a CPU
    # its gradient adds up in an order of its own, and no run could be repeated bit for bit.
    found = maps.movedim(1, -1).flatten(0, 2).index_select(0, pixels.flatten())
    return found.view(*pixels.shape, maps.shape[1])


def draw_anchors(anchors: Tensor, label: Tensor, u: Tensor) -> Tensor:
    """Anchors of every class with replacement: anchors (P, C) bool, of class label (P,); u (C, M) -> (C, M) pixels.

    A class without an anchor gets any pixels.
    """
    pixels, classes = anchors.shape
    order = label.masked_fill(~anchors.any(1), classes).argsort(stable=True)  # class after class, then the others
    count = anchors.sum(0)
    first = count.cumsum(0) - count
    inside = (u * count.unsqueeze(1)).long().minimum((count.unsqueeze(1) - 1).clamp(min=0))
    return order[(first.unsqueeze(1) + inside).clamp(max=pixels - 1)]


def draw_keys(negatives: Tensor, u: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """At most `most` negatives of every class, without replacement: negatives (P, C) bool; u (C, P).

    Returns (pixels (C, Q), good (C, Q) bool), Q = min(most, P): where not good, there were fewer.
    """
    value, pixels = u.masked_fill(~negatives.T, -1).topk(min(most, len(negatives)), dim=1)
    return pixels, value >= 0


def contrast(
    anchors: Tensor, positive: Tensor, pool: Tensor, picks: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """InfoNCE on cosines: -ln of the positive's share among it and the negatives.

    anchors (C, M, D), with gradient; positive (C, D) and pool (C, R, D), without; picks (C, M, N) int64, which of the
    pool are an anchor's negatives. Returns nats (C, M), and nearest (C, M) bool: the positive is nearer than them all.
    """
    a, p, k = F.normalize(anchors, dim=-1), F.normalize(positive.detach(), dim=-1), F.normalize(pool.detach(), dim=-1)
    near = (a * p.unsqueeze(1)).sum(-1)
    far = (a @ k.transpose(1, 2)).gather(2, picks)
    both = torch.cat([near.unsqueeze(2), far], 2) / temperature
    return both.logsumexp(2) - both[..., 0], near.detach() > far.detach().amax(2)
