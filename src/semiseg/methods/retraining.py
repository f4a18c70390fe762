"""Training on real and pseudo-labelled images with a strong view of the pseudo-labelled ones: what ST and ST++ share.

Yang, Zhuo, Qi, Shi and Gao, "ST++: Make Self-training Work Better for Semi-supervised Semantic Segmentation", CVPR
2022. Their finding: a student that sees its teacher's labels beside the image that the teacher saw learns the teacher's
mistakes too; colours, blur and holes that the teacher did not see keep it from that.
"""

import math
from typing import Annotated

import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn

from semiseg.data.rows import Rows
from semiseg.data.sampling import Mixture, Part, Phase, Stream
from semiseg.data.splits import Data
from semiseg.methods.base import StepMethod
from semiseg.methods.labelled import LabelledLoss, LossConfig
from semiseg.networks.factory import Build
from semiseg.ops.colour import strong, to_float
from semiseg.ops.mix import cutmix_box
from semiseg.types import IGNORE, Clock, InputError, Labelled, Options, Portion, Portions, ascending

Positive = Annotated[float, Field(gt=0)]


class StrongConfig(Options):
    """The strong view: colours, blur, and a hole."""

    jitter: tuple[Portion, Portion, Portion, Annotated[float, Field(ge=0, le=0.5)]] = (0.5, 0.5, 0.5, 0.25)
    """Largest change of brightness, contrast, saturation and hue."""
    blur: Portion = 0.5
    """Share of the images that are blurred."""
    sigma: Annotated[tuple[Positive, Positive], AfterValidator(ascending)] = (0.1, 2.0)
    """Range of the blur's standard deviation in px; papers' crops are 321 to 801 px wide, small ones need less."""
    cutout: Portion = 0.5
    """Share of the images out of which a box is taken: mean colour in the image, no label in the mask."""
    cutout_area: Portions = (0.02, 0.4)
    """Range of the box's share of the image."""


class Retraining(StepMethod):
    """One loss on real and pseudo-labelled images; an epoch has the real ones as often as it takes to be as many.

    loss, view: options; build: of this network; real, pseudo: images with masks, and with pseudo-labels as masks.

    Raises:
        InputError: there is no pseudo-labelled image.
    """

    def __init__(self, loss: LossConfig, view: StrongConfig, build: Build, real: Rows, pseudo: Rows) -> None:
        super().__init__()
        if not len(pseudo):
            raise InputError("No unlabelled image can be read, and the method learns from them: repair or change them.")
        self.view, self.build = view, build
        self.rows, self.real = real + pseudo, len(real)
        self.student = build.network()
        self.loss = LabelledLoss(loss, build)
        self.optimizers = {"student": build.optimizer(self.student)}
        self.to(build.device)

    def streams(self, data: Data, batch: int, crop: tuple[int, int]) -> dict[str, Stream]:
        real, pseudo = self.real, len(self.rows) - self.real
        epoch = Mixture((Part(0, real, real * math.ceil(pseudo / real)), Part(real, pseudo, pseudo)))
        return {"labelled": Stream(self.rows, (Phase(crop, batch),), strong=1, mixture=epoch)}

    def step(self, clock: Clock, labelled: Labelled) -> dict[str, Tensor]:  # type: ignore[override]
        image, mask = self.views(labelled)
        values = self.update("student", *self.loss(self.student(image), mask))
        return {"loss": values[0]}

    def views(self, labelled: Labelled) -> tuple[Tensor, Tensor]:
        """What is learned from: image (B, N, H, W) float in 0..1 and mask (B, H, W), real ones as they are."""
        c, u = self.view, labelled.view(0)
        pseudo = (labelled.row >= self.real).view(-1, 1, 1)
        image = to_float(labelled.image)
        hole = cutmix_box(u, (image.shape[2], image.shape[3]), c.cutout_area, c.cutout)
        mean = self.student.normalise.mean.to(image.dtype)
        seen = torch.where(hole.unsqueeze(1), mean, strong(image, u, c.jitter, blur_probability=c.blur, sigma=c.sigma))
        return torch.where(pseudo.unsqueeze(1), seen, image), labelled.mask.masked_fill(pseudo & hole, IGNORE)

    def predictor(self) -> nn.Module:
        return self.student


def tell_of_colours(build: Build) -> None:
    """Reports that images with other than three channels keep their colours."""
    if build.channels != 3:
        build.report.append(f"images have {build.channels} channels, not 3: colours stay, strong views are blurred")
