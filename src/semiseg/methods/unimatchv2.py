"""UniMatch V2: FixMatch with a teacher, and two strong views whose features lose complementary channels.

Yang, Zhao and Zhao, "UniMatch V2: Pushing the Limit of Semi-Supervised Semantic Segmentation", TPAMI 2025
(arXiv:2410.10777).

    L = 1/2 (L_ce + 1/2 (L_strong1 + L_strong2))

What the first strong view keeps of the encoder's channels the second one loses, in half of the images; so both perturb
the image and its features, and two views do what UniMatch needs three for. The paper's encoders are DINOv2
transformers; any encoder will do here.

Deliberate differences from the released code:

- of an encoder with maps of several widths each map draws its own channels (released: transformers, one draw for all);
- the partner of the boxes is another image, drawn anew in each batch (released: the batch in reverse order);
- counters and other whole numbers of the teacher are copied, not averaged (released: averaged and cut off).
"""

from typing import Annotated

import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn

from semiseg.data.sampling import Phase, Stream
from semiseg.data.splits import Data
from semiseg.methods.base import StepMethod
from semiseg.methods.labelled import LabelledLoss, LossConfig
from semiseg.networks.factory import Build
from semiseg.ops.colour import strong, to_float
from semiseg.ops.dropout import ComplementaryDropout
from semiseg.ops.ema import ema_update, make_teacher
from semiseg.ops.losses import masked_cross_entropy
from semiseg.ops.mix import cutmix_box, mix
from semiseg.ops.pseudo import pseudo_label
from semiseg.types import Clock, Labelled, Options, Portion, Portions, Share, Unlabelled, ascending

Positive = Annotated[float, Field(gt=0)]


class UniMatchV2(StepMethod):
    """Labelled cross-entropy, plus that of two strong views with complementary features to the teacher's labels."""

    class Config(Options):
        """Options of `method: {name: unimatchv2}`."""

        loss: LossConfig = LossConfig()
        threshold: Portion = 0.95
        """Confidence of the teacher from which a pixel has a label."""
        dropout: bool = True
        """The views lose complementary channels of the encoder's maps."""
        ema: Annotated[float, Field(ge=0, lt=1)] = 0.996
        """Decay of the teacher, which begins as a plain mean."""
        jitter: tuple[Portion, Portion, Portion, Annotated[float, Field(ge=0, le=0.5)]] = (0.5, 0.5, 0.5, 0.25)
        """Largest change of brightness, contrast, saturation and hue in the strong views."""
        blur: Portion = 0.5
        """Share of the images that are blurred."""
        sigma: Annotated[tuple[Positive, Positive], AfterValidator(ascending)] = (0.1, 2.0)
        """Range of the blur's standard deviation in px; papers' crops are 321 to 801 px wide, small ones need less."""
        cutmix: Portion = 0.5
        """Share of the images that get a box of another image, in each strong view."""
        cutmix_area: Portions = (0.02, 0.4)
        """Range of the box's share of the image."""

    paper = "Yang et al., TPAMI 2025"

    def __init__(self, config: Config, build: Build) -> None:
        super().__init__()
        self.config, self.build = config, build
        self.student = build.parts()
        self.teacher = make_teacher(self.student)
        self.drop = ComplementaryDropout()
        self.loss = LabelledLoss(config.loss, build)
        self.optimizers = {"student": build.optimizer(self.student)}
        if build.channels != 3:
            build.report.append(f"images have {build.channels} channels, not 3: colours stay, strong views are blurred")

    def streams(self, data: Data, batch: int, crop: tuple[int, int]) -> dict[str, Stream]:
        phases = (Phase(crop, batch),)
        return {"labelled": Stream(data.labelled, phases), "unlabelled": Stream(data.unlabelled, phases, strong=2)}

    def step(self, clock: Clock, labelled: Labelled, unlabelled: Unlabelled) -> dict[str, Tensor]:  # type: ignore[override]
        valid = unlabelled.valid
        with torch.no_grad():
            label, confidence = pseudo_label(self.teacher(unlabelled.image))
            confident = (confidence >= self.config.threshold) & valid
            weak = to_float(unlabelled.image)
            views = [self._view(weak, unlabelled.view(i), unlabelled.partner, label, confident, valid) for i in (0, 1)]

        # Backward before the next forward, which needs the memory.
        values = self.backward("student", *self.loss(self.student(labelled.image), labelled.mask, 0.5))
        logits_strong = self._perturbed(torch.cat([view[0] for view in views])).split([len(weak)] * 2)
        # Divided by the valid pixels, not by the confident ones: the loss grows with the share that is trusted.
        terms: list[tuple[float, Share]] = [
            (0.5 * 0.5, masked_cross_entropy(z, label_mixed, confident_mixed, valid_mixed))
            for z, (_, label_mixed, confident_mixed, valid_mixed) in zip(logits_strong, views, strict=True)
        ]
        values += self.update("student", *terms)
        ema_update(self.teacher, self.student, clock.step, self.config.ema)
        return {
            "loss": values[0],
            "loss_strong": (values[-2] + values[-1]) / 2,
            "confident": confident.sum() / valid.sum(),
        }

    def _perturbed(self, image: Tensor) -> Tensor:
        """Logits of both views, (2B, N, H, W) -> (2B, C, H, W)."""
        if not self.config.dropout:
            logits: Tensor = self.student(image)
            return logits
        net = self.student
        return net.classify(net.fuse(self.drop(net.encode(image))), (image.shape[2], image.shape[3]))

    def _view(
        self, image: Tensor, u: dict[str, Tensor], partner: Tensor, label: Tensor, confident: Tensor, valid: Tensor
    ) -> tuple[Tensor, ...]:
        """A strong view: image, and what of the labels, of the confident and of the valid pixels is where in it."""
        c = self.config
        image = strong(image, u, c.jitter, blur_probability=c.blur, sigma=c.sigma)
        box = cutmix_box(u, (image.shape[2], image.shape[3]), c.cutmix_area, c.cutmix)
        return mix(box, partner, image, label, confident, valid)

    def predictor(self) -> nn.Module:
        return self.teacher
