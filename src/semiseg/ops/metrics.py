"""The confusion matrix and what is read from it."""

import torch
from torch import Tensor

from semiseg.types import IGNORE


def confusion(label: Tensor, mask: Tensor, classes: int) -> Tensor:
    """Pixels by reference class (rows) and predicted class (columns), IGNORE in the reference left out.

    label (..., H, W) integers in 0..classes-1; mask (..., H, W) uint8 or int64, class ids or IGNORE.
    Returns (classes, classes) int64 on the tensors' device.
    """
    cells = classes * classes
    # ignored pixels fall into one cell more, which is dropped: selecting the others would wait for the device
    cell = (mask.long() * classes + label.long()).masked_fill(mask == IGNORE, cells).flatten()
    counts = torch.zeros(cells + 1, dtype=torch.int64, device=mask.device)
    return counts.scatter_add_(0, cell, torch.ones_like(cell))[:cells].view(classes, classes)


def iou(confusion: Tensor) -> Tensor:
    """Intersection over union of each class, in 0..1; NaN where the reference does not hold the class.

    confusion (..., C, C) -> (..., C) float64.
    """
    pixels = confusion.double()
    both = pixels.diagonal(dim1=-2, dim2=-1)
    reference, predicted = pixels.sum(-1), pixels.sum(-2)
    return (both / (reference + predicted - both)).masked_fill(reference == 0, torch.nan)


def miou(confusion: Tensor) -> Tensor:
    """Mean IoU over the classes that the reference holds, in 0..1; NaN where it holds none.

    confusion (..., C, C) -> (...) float64.
    """
    return iou(confusion).nanmean(-1)


def agreement(confusion: Tensor) -> Tensor:
    """Mean IoU of two maps over the classes that either of them holds, in 0..1; 1 where none holds any.

    confusion (..., C, C) -> (...) float64. Of a reference and a prediction `miou` is the measure: it leaves out classes
    that the reference lacks, and here no map is the reference.
    """
    pixels = confusion.double()
    both = pixels.diagonal(dim1=-2, dim2=-1)
    either = pixels.sum(-1) + pixels.sum(-2) - both
    return (both / either).nanmean(-1).nan_to_num(1.0)  # 0 / 0 is NaN: a class that neither holds
