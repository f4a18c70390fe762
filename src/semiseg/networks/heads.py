"""Heads beside the classifier: what a method has to learn besides the classes, and throws away in the end.

Source: the heads of U2PL's network (Wang et al., CVPR 2022).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semiseg.networks.net import SegNet, autocast, full

FINEST = 4
"""px of the image a side of a feature's: a finer map is averaged to it, as there are more features than one can use."""


class Head(nn.Module):
    """3x3 convolutions with batch norm, ReLU and dropout of whole channels, then a 1x1 convolution with a bias."""

    def __init__(self, inputs: int, width: int, outputs: int, layers: int, precision: torch.dtype | None) -> None:
        """`layers` 3x3 convolutions of `width` channels; `precision` as in SegNet."""
        super().__init__()
        self.precision = precision
        parts: list[nn.Module] = []
        for before in (inputs, *[width] * (layers - 1)):
            parts += [nn.Conv2d(before, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            parts += [nn.Dropout2d(0.1)]
        self.layers = nn.Sequential(*parts, nn.Conv2d(width, outputs, 1))

    def forward(self, maps: Tensor) -> Tensor:
        """(B, inputs, h, w) -> (B, outputs, h, w) in full precision."""
        with autocast(maps, self.precision):
            return full(self.layers(maps))


@dataclass(frozen=True)
class Views:
    """What a `Projected` network sees in images: logits (B, C, H, W), the same at the features' size (B, C, h, w),
    features (B, D, h, w), and the auxiliary logits (B, C, H, W); None where there is no such head."""

    logits: Tensor
    small: Tensor
    features: Tensor | None
    auxiliary: Tensor | None


class Projected(nn.Module):
    """A SegNet, and if wanted a head that projects its fused map to features, and an auxiliary classifier.

    stride  px of the image a side of one feature, 4 or the network's
    """

    def __init__(self, net: SegNet, projection: Head | None, auxiliary: Head | None = None) -> None:
        """`auxiliary` classifies the encoder's last map but one."""
        super().__init__()
        self.net, self.projection, self.auxiliary = net, projection, auxiliary
        self.pooled = max(1, FINEST // net.stride)
        self.stride = net.stride * self.pooled

    def forward(self, image: Tensor, large: slice = slice(None)) -> Views:
        """Images (B, N, H, W) as SegNet takes them. `large`: the images of which logits at their size are wanted."""
        size = (image.shape[2], image.shape[3])
        maps = self.net.encode(image)
        fused = self.net.fuse(maps)
        logits = self.net.classify(fused)
        small, fine = (F.avg_pool2d(t, self.pooled) if self.pooled > 1 else t for t in (logits, fused))
        features = None if self.projection is None else self.projection(fine)
        auxiliary = None
        if self.auxiliary is not None:
            auxiliary = self.net.enlarge(self.auxiliary(maps[-2])[large], size, self.net.strides[-2])
        return Views(self.net.enlarge(logits[large], size, self.net.stride), small, features, auxiliary)

    def pick(self, pixels: Tensor, like: Tensor, outside: float) -> Tensor:
        """The pixel in the middle of every feature: (B, H, W) -> (B, h, w), `outside` where features see padding."""
        height, width = like.shape[2] * self.stride, like.shape[3] * self.stride
        # With aligned corners the map begins on the image's first pixel, and nothing is padded.
        first = 0 if self.net.align_corners else self.stride // 2
        more = (0, max(0, width - pixels.shape[2]), 0, max(0, height - pixels.shape[1]))
        whole = F.pad(pixels, more, value=outside)
        return whole[:, first :: self.stride, first :: self.stride][:, : like.shape[2], : like.shape[3]]
