"""Labels from logits."""

import torch
from torch import Tensor

from semiseg.types import IGNORE


def winner(scores: Tensor) -> Tensor:
    """The class of the highest score, (B, C, ...) -> (B, ...) int64."""
    # Not argmax: on a CPU it takes ten times as long where classes are not the last dimension.
    return scores.detach().max(1).indices


@torch.no_grad()
def pseudo_label(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The most probable class of each pixel and its probability, without gradient.

    logits (B, C, H, W) -> label (B, H, W) int64, confidence (B, H, W) in 0..1, float32 (float64 for float64 logits).
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    confidence, label = wide.softmax(1).max(1)
    return label, confidence


def one_hot(mask: Tensor, classes: int, smoothing: float = 0.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """A mask as a map of probabilities, (B, H, W) uint8 or int64 -> (B, classes, H, W); zeros at IGNORE.

    `smoothing` is the share of the probability that is spread over the other classes.
    """
    ids = torch.arange(classes, device=mask.device).view(1, -1, 1, 1)
    own = (mask.unsqueeze(1) == ids).to(dtype)
    if smoothing == 0:
        return own
    known = (mask != IGNORE).unsqueeze(1)
    return (own * (1 - smoothing) + (1 - own) * (smoothing / max(1, classes - 1))) * known
