"""The critic of adversarial training: is this map of class probabilities a prediction or a mask?

Source: Hung et al., "Adversarial Learning for Semi-Supervised Semantic Segmentation", BMVC 2018.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semiseg.networks.net import autocast, full
from semiseg.types import InputError

Kind = Literal["pixel", "image"]
"""pixel: fully convolutional, an answer a region. image: one answer an image, as in other GANs; an ablation."""

WIDTHS = (64, 128, 256, 512)


class Critic(nn.Module):
    """Five 4x4 convolutions of stride 2 without normalisation; 2,783,169 weights at 21 classes.

    A region of the answer sees 94 px of the map that it is given.
    """

    def __init__(
        self, classes: int, kind: Kind = "pixel", scale: float = 1.0, precision: torch.dtype | None = None
    ) -> None:
        """`scale` enlarges the maps before the first convolution, where crops are small; `precision` as in SegNet."""
        super().__init__()
        self.classes, self.kind, self.scale, self.precision = classes, kind, scale, precision
        layers: list[nn.Module] = []
        for before, after in zip((classes, *WIDTHS), WIDTHS, strict=False):
            layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.LeakyReLU(0.2, inplace=True)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(WIDTHS[-1], 1, 4, stride=2, padding=1))

    def forward(self, probs: Tensor) -> Tensor:
        """Class probabilities (B, C, H, W) -> logits (B, 1, H, W) of being a mask, bilinear between regions.

        Raises:
            InputError: the maps have other classes than the data, or are, enlarged, smaller than 32 px, which five
                halvings need.
        """
        if probs.shape[1] != self.classes:
            raise InputError(
                f"The network gives {probs.shape[1]} classes where the data, and so the critic, has {self.classes}: "
                "correct the one that network.name names."
            )
        size = (probs.shape[2], probs.shape[3])
        seen = (round(size[0] * self.scale), round(size[1] * self.scale))
        least = 2 ** (len(WIDTHS) + 1)
        if min(seen) < least:
            raise InputError(
                f"train.crop: {size[0]}x{size[1]} px, times method.critic_scale={self.scale:g}, are less than the "
                f"{least} px that the critic needs: take larger crops, or method.critic_scale={-(-least // min(size))}."
            )
        if seen != size:
            probs = F.interpolate(probs, size=seen, mode="bilinear", align_corners=False)
        with autocast(probs, self.precision):
            answer = full(self.layers(probs))
        if self.kind == "image":
            return answer.mean((2, 3), keepdim=True).expand(-1, -1, *size)
        return F.interpolate(answer, size=size, mode="bilinear", align_corners=False)
