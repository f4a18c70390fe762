"""From a network to class probabilities of an image, and to the scores of a split."""

import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from semiseg import parallel
from semiseg.data.cache import open_pair
from semiseg.data.rows import Rows
from semiseg.data.splits import Data
from semiseg.engine.memory import memory_errors
from semiseg.files import replacing
from semiseg.ops.colour import to_float
from semiseg.ops.metrics import confusion, iou, miou
from semiseg.ops.pseudo import winner
from semiseg.ops.resize import resize
from semiseg.types import InferenceConfig, InputError

T = TypeVar("T")
R = TypeVar("R")
Network = Callable[[Tensor], Tensor]
"""image (B, N, H, W) -> logits (B, C, H, W)."""


TOGETHER = 64
"""Confusion matrices that leave the device at once: each copy waits for it, and thousands of them are its memory."""


@dataclass(frozen=True)
class Scores:
    """A confusion matrix an image, (images, C, C) int64 with the reference in the rows, and the images' names."""

    confusions: NDArray[np.int64]
    names: tuple[str, ...]
    classes: tuple[str, ...]
    split: str = ""
    """What was scored, where one split of several was chosen: train, val or test, or all of an undivided folder."""

    def of_same_masks(self, other: "Scores") -> bool:
        """Whether both were scored on the same images and masks, as far as names and every class's pixels tell."""
        same = self.names == other.names and self.classes == other.classes
        return same and np.array_equal(self.confusions.sum(2), other.confusions.sum(2))

    @property
    def per_class(self) -> dict[str, float]:
        """IoU of each class over all pixels of the split; NaN where the reference has none of it."""
        total = torch.from_numpy(self.confusions.sum(0))
        return dict(zip(self.classes, iou(total).tolist(), strict=True))

    @property
    def miou(self) -> float:
        """Mean over the classes that the reference has, 0..1; NaN where it has none."""
        return float(miou(torch.from_numpy(self.confusions.sum(0))))

    @property
    def absent(self) -> tuple[str, ...]:
        """Classes that are left out of the mean, because the reference has none of them."""
        return tuple(name for name, value in self.per_class.items() if np.isnan(value))


def evaluate(net: nn.Module, rows: Rows, data: Data, config: InferenceConfig, device: torch.device) -> Scores:
    """Scores a network at the masks' own sizes, and leaves every part of it in the mode it was in.

    Each of several processes takes a part of the images, and has the scores of all in the end.
    """
    d, modes = data.config, [(part, part.training) for part in net.modules()]
    net.eval()

    def read(i: int) -> tuple[Tensor, Tensor]:
        image, mask = open_pair(rows[i], d.channels, data.code, d.size, d.cache, whole_mask=True)
        return to_tensor(image), torch.from_numpy(mask)

    confusions = [np.zeros((0, len(data.classes), len(data.classes)), dtype=np.int64)]
    waiting: list[Tensor] = []
    for image, mask in ahead(read, range(parallel.rank(), len(rows), parallel.world())):
        probs = probabilities(net, image.to(device), config)
        label = winner(resize(probs, (mask.shape[0], mask.shape[1])))
        waiting.append(confusion(label, mask[None].to(device), len(data.classes)))
        if len(waiting) == TOGETHER:
            confusions.append(torch.stack(waiting).cpu().numpy())
            waiting.clear()
    if waiting:
        confusions.append(torch.stack(waiting).cpu().numpy())
    for part, training in modes:  # a method may keep batch norms in eval mode inside a network that trains
        part.training = training
    shares = parallel.gather(np.concatenate(confusions))
    whole = np.empty((len(rows), *shares[0].shape[1:]), dtype=np.int64)
    for i, share in enumerate(shares):
        whole[i :: len(shares)] = share
    return Scores(whole, tuple(rows.names), data.classes)


def to_tensor(image: NDArray[np.generic]) -> Tensor:
    """(H, W, N) file depth -> (1, N, H, W)."""
    return torch.from_numpy(image).permute(2, 0, 1)[None]


@torch.no_grad()
def probabilities(net: Network, image: Tensor, config: InferenceConfig) -> Tensor:
    """Class probabilities (1, C, H, W) of one image (1, N, H, W), averaged over scales, mirror images and windows.

    Raises:
        InputError: the memory does not suffice.
    """
    height, width = image.shape[2:]
    side = max(32, min(config.window or (height, width)) // 2 // 32 * 32)
    advice = f"evaluate.window=[{side},{side}] in a recipe, or --window {side} of evaluate and predict"
    with memory_errors(f"on an image of {width}x{height} px: let it be seen in parts by {advice}"):
        return _probabilities(net, image, config)


def _probabilities(net: Network, image: Tensor, config: InferenceConfig) -> Tensor:
    size = (image.shape[2], image.shape[3])
    views = []
    for scale in config.scales:
        view = image
        if scale != 1:
            view = resize(to_float(image), (max(1, round(size[0] * scale)), max(1, round(size[1] * scale))))
        views.append(_windows(net, view, config))
        if config.flip:
            views.append(_windows(net, view.flip(3), config).flip(3))
    return torch.stack([resize(view, size) for view in views]).mean(0) if len(views) > 1 else resize(views[0], size)


def _windows(net: Network, image: Tensor, config: InferenceConfig) -> Tensor:
    height, width = image.shape[2:]
    if config.window is None or (height <= config.window[0] and width <= config.window[1]):
        return net(image).softmax(1)
    total: Tensor | None = None
    seen = image.new_zeros((1, 1, height, width), dtype=torch.float32)
    for top in window_starts(height, config.window[0], config.stride):
        for left in window_starts(width, config.window[1], config.stride):
            place = (..., slice(top, top + config.window[0]), slice(left, left + config.window[1]))
            probs = net(image[place]).softmax(1)
            if total is None:
                total = probs.new_zeros((1, probs.shape[1], height, width))
            total[place] += probs
            seen[place] += 1
    assert total is not None
    return total / seen


def window_starts(side: int, window: int, stride: float) -> list[int]:
    """Where windows start along a side, in px: every `stride` of a window, the last one shifted back inside."""
    if side <= window:
        return [0]
    starts = range(0, side - window, max(1, round(window * stride)))
    return [*starts, side - window]


def ahead(function: Callable[[T], R], items: Iterable[T], threads: int = 2, depth: int = 4) -> Iterator[R]:
    """Maps in order, a few results ahead: reading goes on while the network runs, and memory stays small."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[R]] = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def joined(scores: Sequence[Scores]) -> Scores:
    """The scores of several parts of the images as one."""
    confusions = np.concatenate([part.confusions for part in scores])
    return Scores(confusions, tuple(name for part in scores for name in part.names), scores[0].classes, scores[0].split)


def save_scores(path: Path, scores: Scores) -> None:
    """Writes the confusion matrices, from which every later interval is computed, as `results.npz`."""
    names, classes = np.array(scores.names), np.array(scores.classes)
    with replacing(path) as part:
        np.savez_compressed(part, confusions=scores.confusions, names=names, classes=classes)


def load_scores(path: Path) -> Scores:
    """Reads `results.npz`.

    Raises:
        InputError: there is none, or it is damaged.
    """
    if not path.is_file():
        raise InputError(
            f"{path} is missing: finish the run (the same `semiseg train` command goes on where it was), or, where it "
            "is finished, remove its results.json first, so that it is scored again."
        )
    try:
        with np.load(path, allow_pickle=False) as file:
            return Scores(file["confusions"], tuple(file["names"].tolist()), tuple(file["classes"].tolist()))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(
            f"{path} is damaged ({error}): remove it and results.json beside it, and the same `semiseg train` command "
            "scores the run again."
        ) from error
