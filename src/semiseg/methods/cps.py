"""CPS: two networks that start differently, each of which learns the other's labels.

Chen, Yuan, Zeng and Wang, "Semi-Supervised Semantic Segmentation with Cross Pseudo Supervision", CVPR 2021.

    L = L_ce(z1, y) + L_ce(z2, y) + weight (CE(z1, label2) + CE(z2, label1))

With CutMix the labels are those of the unmixed images, mixed like them; without, the cross term is on labelled images
too, as in the paper. Every pixel counts, however unsure its label is.

Deliberate differences from the released code:

- one box a sample (released: three, of a quarter to a half of the image together, inside or outside);
- the partner is another image of the same batch (released: of a second one, often the same image, for which both
  networks run again);
- rates are what the recipe says (released: gradients are divided by the number of processes, and the rate multiplied).
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from semiseg.data.sampling import Phase, Stream
from semiseg.data.splits import Data
from semiseg.methods.base import StepMethod
from semiseg.methods.labelled import LabelledLoss, LossConfig
from semiseg.networks.factory import Build
from semiseg.ops.colour import to_float
from semiseg.ops.losses import masked_cross_entropy
from semiseg.ops.mix import cutmix_box, mix
from semiseg.ops.pseudo import winner
from semiseg.types import Clock, Labelled, Options, Portions, Share, Unlabelled

SALT = 3
"""Of the second network: the same initial encoder where it is pretrained, and another decoder."""


class CPS(StepMethod):
    """Labelled cross-entropy for two networks, and each one's labels for the other; the first is delivered."""

    class Config(Options):
        """Options of `method: {name: cps}`."""

        loss: LossConfig = LossConfig()
        weight: Annotated[float, Field(ge=0)] = 1.0
        """Of the cross term. With CutMix 1 for VOC and 5 for Cityscapes, without 1.5 and 6."""
        cutmix: bool = True
        """The cross term is on mixed unlabelled images; else on all images as they are."""
        area: Portions = (0.25, 0.5)
        """Range of the box's share of the image."""

    paper = "Chen et al., CVPR 2021"

    def __init__(self, config: Config, build: Build) -> None:
        super().__init__()
        self.config, self.build = config, build
        self.first, self.second = build.network(), build.network(SALT, whole=False)
        self.loss = LabelledLoss(config.loss, build)
        self.optimizers = {name: build.optimizer(getattr(self, name)) for name in ("first", "second")}

    def streams(self, data: Data, batch: int, crop: tuple[int, int]) -> dict[str, Stream]:
        phases = (Phase(crop, batch),)
        return {"labelled": Stream(data.labelled, phases), "unlabelled": Stream(data.unlabelled, phases, strong=1)}

    def step(self, clock: Clock, labelled: Labelled, unlabelled: Unlabelled) -> dict[str, Tensor]:  # type: ignore[override]
        c, nets = self.config, {"first": self.first, "second": self.second}
        image, valid = to_float(unlabelled.image), unlabelled.valid
        losses: list[Tensor] = []
        crossed: list[Tensor] = []
        if c.cutmix:
            with torch.no_grad():
                u = unlabelled.view(0)
                box = cutmix_box(u, (image.shape[2], image.shape[3]), c.area, 1.0)
                labels = [winner(net(image)) for net in nets.values()]
                image, valid, *labels = mix(box, unlabelled.partner, image, valid, *labels)
            # Backward of each forward before the next one, so that memory holds one at a time.
            for name, net in nets.items():
                losses += self.backward(name, *self.loss(net(labelled.image), labelled.mask))[:1]
            for (name, net), label in zip(nets.items(), reversed(labels), strict=True):
                crossed += self.update(name, (c.weight, _cross(net(image), label, valid)))
        else:
            logits = [net(labelled.image) for net in nets.values()]
            both = [torch.cat([z, net(image)]) for z, net in zip(logits, nets.values(), strict=True)]
            valid = torch.cat([labelled.valid, valid])
            labels = [winner(z) for z in both]
            for name, z, every, label in zip(nets, logits, both, reversed(labels), strict=True):
                terms = [*self.loss(z, labelled.mask), (c.weight, _cross(every, label, valid))]
                loss, *_, cross = self.update(name, *terms)
                losses.append(loss)
                crossed.append(cross)
        return {
            "loss": losses[0],
            "loss_second": losses[1],
            "loss_cross": crossed[0] + crossed[1],
            "agreement": ((labels[0] == labels[1]) & valid).sum() / valid.sum(),
        }

    def predictor(self) -> nn.Module:
        return self.first


def _cross(logits: Tensor, label: Tensor, valid: Tensor) -> Share:
    return masked_cross_entropy(logits, label, valid, valid)
