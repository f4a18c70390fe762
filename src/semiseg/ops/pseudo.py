"""Labels from logits."""

import torch
from torch import Tensor


@torch.no_grad()
def pseudo_label(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The most probable class of each pixel and its probability, without gradient.

    logits (B, C, H, W) -> label (B, H, W) int64, confidence (B, H, W) in 0..1, float32 (float64 for float64 logits).
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    confidence, label = wide.softmax(1).max(1)
    return label, confidence
