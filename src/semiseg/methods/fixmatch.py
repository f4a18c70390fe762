"""FixMatch for segmentation: confident predictions on a weak view are the labels of a strong view of the same image.

Sohn et al., "FixMatch", NeurIPS 2020, in the form that segmentation papers compare with (UniMatch, Yang et al., CVPR
2023), with a mean teacher (Tarvainen & Valpola, 2017) and CutMix (Yun et al., ICCV 2019).

Deliberate differences from the released UniMatch code:

- the labels come from an EMA teacher in eval mode, not from the student's own training-mode forward;
- the CutMix partner is always another image (released: the same image, differently cropped);
- padding is invalid for unlabelled images by the crop itself, no mask file is opened;
- bilinear resizing with align_corners=False.
"""

from contextlib import nullcontext
from typing import Annotated, Literal, Self

import torch
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor, nn

from semiseg import parallel
from semiseg.data.sampling import Phase, Stream
from semiseg.data.splits import Data
from semiseg.methods.base import StepMethod
from semiseg.methods.labelled import LabelledLoss, LossConfig
from semiseg.networks.factory import Build
from semiseg.ops.colour import strong, to_float
from semiseg.ops.ema import ema_update, make_teacher
from semiseg.ops.losses import masked_cross_entropy
from semiseg.ops.mix import cutmix_box, mix
from semiseg.ops.norm import kept_statistics
from semiseg.ops.pseudo import pseudo_label
from semiseg.ops.threshold import Thresholds
from semiseg.types import Clock, Labelled, Options, Portion, Portions, Unlabelled, ascending

Positive = Annotated[float, Field(gt=0)]


class FixMatch(StepMethod):
    """Labelled cross-entropy, plus cross-entropy of a strong, CutMixed view against the teacher's confident labels."""

    class Config(Options):
        """Options of `method: {name: fixmatch}`."""

        loss: LossConfig = LossConfig()
        threshold: Portion = 0.95
        """Least confidence of a pseudo-label that counts."""
        adaptive: bool = False
        """The threshold is a moving average of the teacher's mean confidence instead."""
        class_wise: bool = False
        """A class of which the teacher is less sure than of the surest one has a threshold as much lower."""
        threshold_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
        """Of the moving averages that adaptive and class_wise need."""
        weight: Annotated[float, Field(ge=0)] = 1.0
        """Weight of the unlabelled loss against the labelled one."""
        ema: Annotated[float, Field(ge=0, lt=1)] = 0.99
        """Decay of the teacher."""
        forward: Literal["apart", "joint"] = "apart"
        """Labelled images and strong views through the student apart or as one batch: what batch norm sees."""
        statistics: Literal["all", "labelled"] = "all"
        """Whose images move batch norm's running statistics, with which the teacher labels and the model is delivered:
        labelled leaves out the strong views, whose colours no real image has (forward: apart only)."""
        jitter: tuple[Portion, Portion, Portion, Annotated[float, Field(ge=0, le=0.5)]] = (0.5, 0.5, 0.5, 0.25)
        """Largest change of brightness, contrast, saturation and hue in the strong view."""
        blur: Portion = 0.5
        """Share of the strong views that are blurred."""
        sigma: Annotated[tuple[Positive, Positive], AfterValidator(ascending)] = (0.1, 2.0)
        """Range of the blur's standard deviation in px; papers' crops are 321 to 801 px wide, small ones need less."""
        cutmix: Portion = 0.5
        """Share of the images that get a box of another image."""
        cutmix_area: Portions = (0.02, 0.4)
        """Range of the box's share of the image."""

        @model_validator(mode="after")
        def _consistent(self) -> Self:
            if self.forward == "joint" and self.statistics == "labelled":
                raise ValueError("statistics: labelled needs forward: apart, for one batch has one set of statistics")
            if self.adaptive and self.threshold != type(self).model_fields["threshold"].default:
                raise ValueError("adaptive finds the threshold itself: leave threshold out, or adaptive")
            return self

    paper = "Sohn et al., NeurIPS 2020; segmentation form of Yang et al., CVPR 2023"

    def __init__(self, config: Config, build: Build) -> None:
        super().__init__()
        self.config, self.build = config, build
        self.student = build.network()
        self.teacher = make_teacher(self.student)
        self.loss = LabelledLoss(config.loss, build)
        self.thresholds: Thresholds | None = None
        if config.adaptive or config.class_wise:
            fixed = None if config.adaptive else config.threshold
            self.thresholds = Thresholds(build.classes, fixed, config.class_wise, config.threshold_decay)
        self.optimizers = {"student": build.optimizer(self.student)}
        if build.channels != 3:
            build.report.append(f"images have {build.channels} channels, not 3: colours stay, strong views are blurred")

    def streams(self, data: Data, batch: int, crop: tuple[int, int]) -> dict[str, Stream]:
        phases = (Phase(crop, batch),)
        return {"labelled": Stream(data.labelled, phases), "unlabelled": Stream(data.unlabelled, phases, strong=1)}

    def step(self, clock: Clock, labelled: Labelled, unlabelled: Unlabelled) -> dict[str, Tensor]:  # type: ignore[override]
        c = self.config
        with torch.no_grad():
            label, confidence = pseudo_label(self.teacher(unlabelled.image))
            confident = (confidence >= self._threshold(label, confidence, unlabelled, clock.step)) & unlabelled.valid
            u = unlabelled.view(0)
            image = strong(to_float(unlabelled.image), u, c.jitter, blur_probability=c.blur, sigma=c.sigma)
            size = (image.shape[2], image.shape[3])
            box = cutmix_box(u, size, c.cutmix_area, c.cutmix)
            image, label, selected, valid = mix(box, unlabelled.partner, image, label, confident, unlabelled.valid)

        if c.forward == "joint":
            both = self.student(torch.cat([to_float(labelled.image), image]))
            logits, logits_strong = both.split([len(labelled.image), len(image)])
        else:
            logits = self.student(labelled.image)
        terms = self.loss(logits, labelled.mask, 0.5)
        values = []
        if c.forward == "apart":
            # Backward before the next forward: half the memory.
            values, terms = self.backward("student", *terms), []
            with kept_statistics(self.student) if c.statistics == "labelled" else nullcontext():
                logits_strong = self.student(image)

        # Divided by the valid pixels, not by the confident ones: the loss grows with the share that is trusted.
        loss_unlabelled = masked_cross_entropy(logits_strong, label, selected, valid)
        values += self.update("student", *terms, (0.5 * c.weight, loss_unlabelled))
        ema_update(self.teacher, self.student, clock.step, c.ema)
        scalars = {
            "loss": values[0],
            "loss_unlabelled": values[-1],
            "confident": confident.sum() / unlabelled.valid.sum(),
        }
        if self.thresholds is not None:
            names = self.build.names or map(str, range(self.build.classes))
            scalars |= {f"threshold/{n}": limit for n, limit in zip(names, self.thresholds.of_classes(), strict=True)}
        return scalars

    def _threshold(self, label: Tensor, confidence: Tensor, unlabelled: Unlabelled, step: int) -> Tensor | float:
        """Of each pixel, (B, H, W), or of all."""
        if self.thresholds is None:
            return self.config.threshold
        counts = self.thresholds.counts(label, confidence, unlabelled.valid, self.build.classes)
        self.thresholds.update(parallel.added(counts), step)
        return self.thresholds.of_classes()[label]

    def predictor(self) -> nn.Module:
        return self.teacher
