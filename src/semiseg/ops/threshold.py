"""Thresholds of confidence that follow what the teacher is sure of.

The overall level is FreeMatch's (Wang et al., ICLR 2023): a moving average of the mean confidence. A class that is
learned less gets a lower threshold, as in FlexMatch (Zhang et al., NeurIPS 2021) and FreeMatch. Both measure that by
how many samples fall to a class, which supposes that classes are equally frequent; pixels are not, so here it is the
mean confidence of the pixels that fall to the class.
"""

import torch
from torch import Tensor, nn


class Thresholds(nn.Module):
    """The threshold of each class. Buffers, and so in every checkpoint: level () and sure (C,), 0..1, float32.

    fixed: the overall threshold; none: it is the level.
    class_wise: times the class's mean confidence over that of the surest class.
    decay: of the moving averages, at most; the first update copies.
    """

    level: Tensor
    sure: Tensor

    def __init__(self, classes: int, fixed: float | None, class_wise: bool, decay: float) -> None:
        super().__init__()
        self.fixed, self.class_wise, self.decay = fixed, class_wise, decay
        self.register_buffer("level", torch.full((), 1 / classes))
        self.register_buffer("sure", torch.full((classes,), 1 / classes))

    @staticmethod
    @torch.no_grad()
    def counts(label: Tensor, confidence: Tensor, valid: Tensor, classes: int) -> Tensor:
        """Of each class the confidences' sum and number, (C, 2) float64, to be added up over processes.

        label (B, H, W) int64; confidence (B, H, W); valid (B, H, W) bool.
        """
        cells = label.masked_fill(~valid, classes).flatten()
        sums = torch.zeros(classes + 1, 2, dtype=torch.float64, device=label.device)
        parts = torch.stack([confidence.double(), torch.ones_like(confidence, dtype=torch.float64)], -1).view(-1, 2)
        return sums.scatter_add_(0, cells.unsqueeze(1).expand(-1, 2), parts)[:classes]

    @torch.no_grad()
    def update(self, counts: Tensor, step: int) -> None:
        """Moves the averages to the batch's means; a class that no pixel falls to stays. `step` counts from 0."""
        d = min(1 - 1 / (step + 1), self.decay)
        total, number = counts.sum(0)
        level = torch.where(number > 0, total / number.clamp(min=1), self.level)
        sure = torch.where(counts[:, 1] > 0, counts[:, 0] / counts[:, 1].clamp(min=1), self.sure)
        self.level.lerp_(level.to(self.level.dtype), 1 - d)
        self.sure.lerp_(sure.to(self.sure.dtype), 1 - d)

    def of_classes(self) -> Tensor:
        """(C,) the threshold of each class."""
        overall = self.level if self.fixed is None else torch.full_like(self.level, self.fixed)
        return overall * (self.sure / self.sure.max() if self.class_wise else torch.ones_like(self.sure))
