"""CutMix-Seg: what the teacher sees in two images is what the student is to see in the mixture of both.

French, Laine, Aila, Mackiewicz and Finlayson, "Semi-Supervised Semantic Segmentation Needs Strong, Varied
Perturbations", BMVC 2020.

    L = L_ce + weight kappa mean ||softmax student - softmax teacher||^2      kappa: the share of confident pixels

Deliberate differences from the released code:

- the partner is another image of the same batch (released: of a second one, for which the teacher runs once more);
- the teacher is in eval mode (released: training mode, but its published runs freeze batch norm);
- averaging begins as a plain mean of the steps, until that reaches the decay;
- the teacher's probabilities are mixed (released: its logits; the boxes have hard borders, so these are equal);
- bilinear resizing with align_corners=False.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from semiseg.data.sampling import Phase, Stream
from semiseg.data.splits import Data
from semiseg.methods.base import StepMethod
from semiseg.methods.labelled import LabelledLoss, LossConfig
from semiseg.networks.factory import Build
from semiseg.ops.colour import strong, to_float
from semiseg.ops.ema import ema_update, make_teacher, ramped
from semiseg.ops.losses import squared_difference
from semiseg.ops.mix import cutmix_box, mix
from semiseg.types import Clock, Labelled, Options, Portion, Portions, Share, Unlabelled


class CutMixSeg(StepMethod):
    """Labelled cross-entropy, plus the squared difference of the student on mixed images and the teacher's mixture."""

    class Config(Options):
        """Options of `method: {name: cutmixseg}`."""

        loss: LossConfig = LossConfig()
        weight: Annotated[float, Field(ge=0)] = 1.0
        """Of the consistency, summed over classes and averaged over pixels."""
        threshold: Portion = 0.97
        """Least probability of the teacher's class in a confident pixel."""
        confidence: Literal["batch", "pixel", "none"] = "batch"
        """The share of confident pixels weighs the whole batch; or only they count; or all do."""
        ramp: Portion = 0.0
        """Share of the run in which the weight rises, by exp(-5 (1 - t)^2); 0: it is there from the start."""
        mask: Literal["cutmix", "cutout"] = "cutmix"
        """A box of another image; or a box is taken out, and the loss is outside it."""
        area: Portions = (0.5, 0.5)
        """Range of the box's share of the image."""
        jitter: bool = False
        """Colours of the student's view vary (0.4, 0.4, 0.4, 0.1; grey in a fifth), those of the teacher's do not."""
        ema: Annotated[float, Field(ge=0, lt=1)] = 0.99
        """Decay of the teacher."""

    paper = "French et al., BMVC 2020"

    def __init__(self, config: Config, build: Build) -> None:
        super().__init__()
        self.config, self.build = config, build
        self.student = build.network()
        self.teacher = make_teacher(self.student)
        self.loss = LabelledLoss(config.loss, build)
        self.optimizers = {"student": build.optimizer(self.student)}

    def streams(self, data: Data, batch: int, crop: tuple[int, int]) -> dict[str, Stream]:
        phases = (Phase(crop, batch),)
        return {"labelled": Stream(data.labelled, phases), "unlabelled": Stream(data.unlabelled, phases, strong=1)}

    def step(self, clock: Clock, labelled: Labelled, unlabelled: Unlabelled) -> dict[str, Tensor]:  # type: ignore[override]
        c, u = self.config, unlabelled.view(0)
        with torch.no_grad():
            image, valid = to_float(unlabelled.image), unlabelled.valid
            probs = self.teacher(image).softmax(1)
            if c.jitter:
                image = strong(image, u, (0.4, 0.4, 0.4, 0.1), blur_probability=0.0)
            box = cutmix_box(u, (image.shape[2], image.shape[3]), c.area, 1.0)
            if c.mask == "cutmix":
                image, probs, valid = mix(box, unlabelled.partner, image, probs, valid)
                pixels = valid
            else:
                mean = self.student.normalise.mean.to(image.dtype)
                image, valid, pixels = torch.where(box.unsqueeze(1), mean, image), valid & ~box, valid
            confident = pixels & (probs.amax(1) >= c.threshold)

        # Backward before the next forward: half the memory.
        values = self.backward("student", *self.loss(self.student(labelled.image), labelled.mask))
        distance = squared_difference(
            self.student(image), probs, confident & valid if c.confidence == "pixel" else valid
        )
        # Over all pixels, those that do not count too: few confident ones make a small loss.
        count, over = pixels.sum().to(distance.total.dtype), confident.sum() if c.confidence == "batch" else None
        distance = Share(distance.total, count, over)
        values += self.update("student", (c.weight * ramped(clock.progress, c.ramp), distance))
        ema_update(self.teacher, self.student, clock.step, c.ema)
        return {
            "loss": values[0],
            "loss_consistency": values[-1],
            "confident": confident.sum() / pixels.sum(),
        }

    def predictor(self) -> nn.Module:
        return self.teacher
