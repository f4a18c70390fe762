"""Mean Teacher: the network agrees with the average of its own past, on labelled and unlabelled images.

Tarvainen and Valpola, "Mean Teachers Are Better Role Models", NeurIPS 2017, in the form that segmentation papers
compare with (TorchSemiSeg's; U2PL, Wang et al., CVPR 2022).

    L = L_ce + weight MSE(softmax student, softmax teacher)

Deliberate differences from that code:

- the teacher is in eval mode (there: training mode, so that it sees the batch's statistics), its floating-point buffers
  are averaged too, and averaging comes after the update;
- averaging begins as a plain mean of the steps, until that reaches the decay;
- the teacher is delivered (there: the student);
- padding of unlabelled images counts nowhere.
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
from semiseg.ops.ema import ema_update, make_teacher, ramped
from semiseg.ops.losses import squared_difference
from semiseg.types import Clock, Labelled, Options, Unlabelled


class MeanTeacher(StepMethod):
    """Labelled cross-entropy, plus the mean squared difference of the student's and its average's probabilities."""

    class Config(Options):
        """Options of `method: {name: meanteacher}`."""

        loss: LossConfig = LossConfig()
        weight: Annotated[float, Field(ge=0)] = 100.0
        """Of the consistency, a mean over pixels and classes."""
        ramp: Annotated[float, Field(ge=0, le=1)] = 0.0
        """Share of the run in which the weight rises, by exp(-5 (1 - t)^2); 0: it is there from the start."""
        ema: Annotated[float, Field(ge=0, lt=1)] = 0.99
        """Decay of the teacher."""

    paper = "Tarvainen & Valpola, NeurIPS 2017"

    def __init__(self, config: Config, build: Build) -> None:
        super().__init__()
        self.config, self.build = config, build
        self.student = build.network()
        self.teacher = make_teacher(self.student)
        self.loss = LabelledLoss(config.loss, build)
        self.optimizers = {"student": build.optimizer(self.student)}

    def streams(self, data: Data, batch: int, crop: tuple[int, int]) -> dict[str, Stream]:
        phases = (Phase(crop, batch),)
        return {"labelled": Stream(data.labelled, phases), "unlabelled": Stream(data.unlabelled, phases)}

    def step(self, clock: Clock, labelled: Labelled, unlabelled: Unlabelled) -> dict[str, Tensor]:  # type: ignore[override]
        c, count = self.config, len(labelled.image)
        images = torch.cat([to_float(labelled.image), to_float(unlabelled.image)])
        valid = torch.cat([labelled.valid, unlabelled.valid])
        with torch.no_grad():
            probs = self.teacher(images).softmax(1)
        logits = self.student(images)
        weight = c.weight * ramped(clock.progress, c.ramp) / self.build.classes  # the mean over the classes
        consistency = squared_difference(logits, probs, valid)
        values = self.update("student", *self.loss(logits[:count], labelled.mask), (weight, consistency))
        ema_update(self.teacher, self.student, clock.step, c.ema)
        return {"loss": values[0], "loss_consistency": values[-1] / self.build.classes}

    def predictor(self) -> nn.Module:
        return self.teacher
