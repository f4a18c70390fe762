"""Losses as `Share(total, count)`: sums and counts, divided only after the counts of all processes are added.

Every total keeps its graph where no pixel was selected: it is 0 and its gradient is 0. Half-precision logits are
reduced in float32, float64 stays float64. Counts have the total's dtype and carry no gradient.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from semiseg.types import IGNORE, Share


def cross_entropy(logits: Tensor, mask: Tensor, weight: Tensor | None = None, of_image: Tensor | None = None) -> Share:
    """Cross-entropy over the pixels that are not IGNORE, in nats.

    logits (B, C, H, W); mask (B, H, W) uint8 or int64, class ids or IGNORE; weight (C,) of the classes; of_image (B,)
    of the images. With weights w, of a pixel the product of both, total = sum w ce and count = sum w.
    """
    target = mask.long()
    valid = target != IGNORE
    if weight is None and of_image is None:
        return Share(_nats(logits, target).sum(), valid.sum().to(_wide(logits).dtype))
    shares = _shares(target.masked_fill(~valid, 0), valid, weight, of_image, _wide(logits).dtype)
    return Share((_nats(logits, target) * shares).sum(), shares.sum())


def _shares(first: Tensor, valid: Tensor, weight: Tensor | None, of_image: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What each pixel counts, (B, H, W); 0 where it is not valid."""
    shares = valid.to(dtype) if weight is None else weight.to(dtype)[first] * valid
    return shares if of_image is None else shares * of_image.to(dtype).view(-1, 1, 1)


def soft_cross_entropy(
    logits: Tensor, mask: Tensor, soft: Tensor, weight: Tensor | None = None, of_image: Tensor | None = None
) -> Share:
    """Cross-entropy -sum_c q_c ln p_c with k classes a pixel, over the pixels that are not IGNORE, in nats.

    logits (B, C, H, W); mask (B, H, W) uint8, the first of the classes; soft (B, 2k - 1, H, W) uint8: k probabilities,
    255 for 1, then the ids of the others. q is divided by the sum of the k. weight (C,): of the first class; of_image
    (B,): as above.
    """
    k = (soft.shape[1] + 1) // 2
    valid = mask != IGNORE
    first = mask.long().masked_fill(~valid, 0)
    probs = _wide(logits).log_softmax(1)
    ids = torch.cat([first[:, None], soft[:, k:].long().clamp(max=logits.shape[1] - 1)], 1)
    q = soft[:, :k].to(probs.dtype)
    nats = -(q * probs.gather(1, ids)).sum(1) / q.sum(1).clamp(min=1)
    shares = _shares(first, valid, weight, of_image, probs.dtype)
    return Share((nats * shares).sum(), shares.sum())


def ohem(logits: Tensor, mask: Tensor, threshold: float = 0.7, min_kept: int = 100_000) -> Share:
    """Cross-entropy over the hard pixels only, in nats (online hard example mining; Shrivastava et al. 2016).

    logits (B, C, H, W); mask (B, H, W) uint8 or int64. A pixel is kept where the probability of its true class is at
    most `threshold`, or at most the `min_kept`-th smallest of the batch if that is larger (ties are kept); all valid
    pixels are kept where there are fewer than `min_kept` (>= 1). The limit is that of one process' batch, so with
    several processes the kept pixels are not those of one process.
    """
    target = mask.long()
    valid = target != IGNORE
    nats = _nats(logits, target)
    true = torch.exp(-nats.detach())  # 1 at IGNORE, so that those pixels are the last to be picked
    smallest = true.flatten().topk(min(min_kept, true.numel()), largest=False, sorted=False).values
    limit = smallest.amax().clamp(min=threshold)
    kept = valid & (true <= limit.masked_fill(valid.sum() < min_kept, 2))
    return Share((nats * kept).sum(), kept.sum().to(nats.dtype))


def dice(logits: Tensor, mask: Tensor) -> Share:
    """Soft Dice loss: 1 - the mean Dice of the classes that the batch's masks hold, in 0..1 (Milletari et al. 2016).

    logits (B, C, H, W); mask (B, H, W) uint8 or int64. count = 1 where any pixel is valid, else 0.
    A ratio of sums cannot be shared exactly: with several processes the value is the mean of the processes' values.
    """
    classes = torch.arange(logits.shape[1], device=logits.device).view(1, -1, 1, 1)
    reference = mask.unsqueeze(1) == classes  # IGNORE equals no class
    probs = _wide(logits).softmax(1) * (mask != IGNORE).unsqueeze(1)
    pixels = reference.sum((0, 2, 3))
    overlap = 2 * (probs * reference).sum((0, 2, 3)) / (probs.sum((0, 2, 3)) + pixels).clamp(min=1)
    present = pixels > 0
    total = ((1 - overlap) * present).sum() / present.sum().clamp(min=1)
    return Share(total, present.any().to(total.dtype))


def masked_cross_entropy(logits: Tensor, label: Tensor, selected: Tensor, counted: Tensor) -> Share:
    """Cross-entropy of the selected pixels over the number of counted ones, in nats (FixMatch: Sohn et al. 2020).

    logits (B, C, H, W); label (B, H, W) int64, class ids or IGNORE; selected, counted (B, H, W) bool. A pixel adds to
    the total where both hold, and to the count where `counted` holds: few selected pixels make a small loss.
    """
    target = label.masked_fill(~(selected & counted), IGNORE)
    return Share(_nats(logits, target).sum(), counted.sum().to(_wide(logits).dtype))


def binary_cross_entropy(logits: Tensor, target: float, counted: Tensor) -> Share:
    """Cross-entropy of the counted pixels against one answer for all, in nats.

    logits (B, 1, H, W), of being true; target 0 or 1; counted (B, H, W) bool.
    """
    wide = _wide(logits).squeeze(1)
    nats = F.binary_cross_entropy_with_logits(wide, torch.full_like(wide, target), reduction="none")
    return Share((nats * counted).sum(), counted.sum().to(nats.dtype))


def squared_difference(logits: Tensor, probs: Tensor, counted: Tensor) -> Share:
    """Squared distance of two distributions, 0..2 a pixel: the consistency loss of a mean teacher.

    logits (B, C, H, W), of the student; probs (B, C, H, W), the teacher's; counted (B, H, W) bool. The sum over the
    classes, as CutMix-Seg has it (French et al., BMVC 2020); Tarvainen & Valpola's mean over them is that over C.
    """
    wide = _wide(logits)
    distance = (wide.softmax(1) - probs.detach().to(wide.dtype)).square().sum(1)
    return Share((distance * counted).sum(), counted.sum().to(wide.dtype))


def class_weights(counts: Tensor) -> Tensor:
    """Weights that lift rare classes: 1 / sqrt(count), scaled to a mean of 1 over the classes that occur.

    counts (C,) pixels a class -> (C,) float32. A class without a pixel gets 0: its frequency is unknown, and a weight
    from a guess would outweigh all others.
    """
    present = counts > 0
    weight = counts.double().clamp(min=1) ** -0.5 * present
    return (weight * present.sum() / weight.sum().clamp(min=torch.finfo(torch.float64).tiny)).float()


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _nats(logits: Tensor, target: Tensor) -> Tensor:
    """(B, H, W) cross-entropy of each pixel, 0 at IGNORE."""
    return F.cross_entropy(_wide(logits), target, reduction="none", ignore_index=IGNORE)
