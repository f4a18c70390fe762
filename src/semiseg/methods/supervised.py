"""Labelled-only training: the baseline beside every claim.

Differences from the papers' baselines: the number of steps is the semi-supervised run's, and the labelled batch is not
doubled (UniMatch doubles it, ST++ repeats short lists).
"""

import torch
from torch import Tensor, nn

from semiseg.data.sampling import Phase, Stream
from semiseg.data.splits import Data
from semiseg.methods.base import StepMethod
from semiseg.methods.labelled import LabelledLoss, LossConfig
from semiseg.networks.factory import Build
from semiseg.types import Clock, Labelled, Options


class Supervised(StepMethod):
    """Cross-entropy on the labelled images, nothing else."""

    class Config(Options):
        """Options of `method: {name: supervised}`."""

        loss: LossConfig = LossConfig()

    paper = "labelled images only; the baseline"

    def __init__(self, config: Config, build: Build) -> None:
        super().__init__()
        self.config, self.build = config, build
        self.student = build.network()
        self.loss = LabelledLoss(config.loss, build)
        self.optimizers = {"student": build.optimizer(self.student)}
        self.pseudo: tuple[int, float] | None = None

    @classmethod
    def of(cls, loss: LossConfig, build: Build, pseudo: tuple[int, float] | None = None) -> "Supervised":
        """A stage of a method of several, on the device.

        pseudo: the first row that has a pseudo-label, and what the pixels of these rows count; None: all count 1.
        """
        stage = cls(cls.Config(loss=loss), build).to(build.device)
        stage.pseudo = pseudo
        return stage

    def streams(self, data: Data, batch: int, crop: tuple[int, int]) -> dict[str, Stream]:
        return {"labelled": Stream(data.labelled, (Phase(crop, batch),))}

    def step(self, clock: Clock, labelled: Labelled) -> dict[str, Tensor]:  # type: ignore[override]
        logits = self.student(labelled.image)
        of_image = None
        if self.pseudo is not None:
            first, weight = self.pseudo
            of_image = torch.where(labelled.row >= first, weight, 1.0)
        values = self.update("student", *self.loss(logits, labelled.mask, soft=labelled.soft, of_image=of_image))
        return {"loss": values[0]}

    def predictor(self) -> nn.Module:
        return self.student
