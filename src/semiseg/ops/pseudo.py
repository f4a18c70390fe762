"""Labels from logits and from probabilities."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

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


@dataclass(frozen=True)
class Merge:
    """What two teachers say of an image, in the classes of the second: the first knows those of another data set.

    The second decides where it sees a new class, one that the first cannot mean; elsewhere the first does. A pixel
    where neither may is IGNORE.

    to: the place of each of the first teacher's classes among the second's, or IGNORE; least, least_new: confidence
    that the first needs, and the second for a new class; doubt: largest probability of all new classes together, by
    the second, at which the first may decide: a new class looks like something to it too.
    """

    to: tuple[int, ...]
    least: float = 0.0
    least_new: float = 0.0
    doubt: float = 1.0

    @torch.no_grad()
    def __call__(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities (len(to), H, W) and (C, H, W) -> label (H, W) int64, a class or IGNORE, and its confidence.

        Of a pixel without a label it is the larger of the two.
        """
        classes = len(second)
        place = torch.tensor([classes if t == IGNORE else t for t in self.to], device=first.device)
        known = first.new_zeros((classes + 1, *first.shape[1:])).index_add_(0, place, first)
        is_new = torch.ones(classes, dtype=torch.bool, device=first.device)
        is_new[place[place < classes]] = False
        sure, label = known.max(0)
        sure_new, label_new = second.max(0)
        new = is_new[label_new] & (sure_new >= self.least_new)
        old = (label < classes) & (sure >= self.least) & (second[is_new].sum(0) <= self.doubt)
        merged = torch.where(new, label_new, label.masked_fill(~old, IGNORE))
        confidence = torch.where(new, sure_new, torch.where(old, sure, torch.maximum(sure, sure_new)))
        return merged, confidence


class Pair(nn.Module):
    """Two teachers that label together by `merge`: `first` of other classes than the data's, `second` of its own.

    It has no output of its own: who labels asks both networks.
    """

    def __init__(self, first: nn.Module, second: nn.Module, merge: Merge) -> None:
        super().__init__()
        self.first, self.second, self.merge = first, second, merge


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
