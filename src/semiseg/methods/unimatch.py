"""UniMatch: FixMatch with two strong views of each image, and a third whose features are perturbed.

Yang, Qi, Feng, Zhang and Shi, "Revisiting Weak-to-Strong Consistency in Semi-Supervised Semantic Segmentation", CVPR
2023.

    L = 1/2 (L_ce + 1/4 L_strong1 + 1/4 L_strong2 + 1/2 L_features)

The network itself labels the weak view, in training mode. What it says with a confidence of at least `threshold` the
strong views, each with a box of another image, are to say too, and so is the weak view where half of the channels of
each of the encoder's maps are dropped before the decoder.

Deliberate differences from the released code:

- all of the encoder's maps lose channels (released: the first and the last, which are all that its decoder takes);
- the decoder runs on the perturbed maps of unlabelled images alone (released: of labelled ones too, to no end);
- the partner is another image of the batch (released: the same image, of a second crop, labelled in eval mode).
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
from semiseg.ops.losses import masked_cross_entropy
from semiseg.ops.mix import cutmix_box, mix
from semiseg.ops.pseudo import pseudo_label
from semiseg.types import Clock, Labelled, Options, Portion, Portions, Share, Unlabelled, ascending

Positive = Annotated[float, Field(gt=0)]


class UniMatch(StepMethod):
    """Labelled cross-entropy, plus that of two strong views and of perturbed features to the network's own labels."""

    class Config(Options):
        """Options of `method: {name: unimatch}`."""

        loss: LossConfig = LossConfig()
        threshold: Portion = 0.95
        """Confidence from which a pixel has a label; the released recipes for Cityscapes take 0."""
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5
        """Share of the channels that are dropped."""
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

    paper = "Yang et al., CVPR 2023"

    def __init__(self, config: Config, build: Build) -> None:
        super().__init__()
        self.config, self.build = config, build
        self.student = build.parts()
        # A module, so that it is known as something random.
        self.drop = nn.Dropout2d(config.dropout)
        self.loss = LabelledLoss(config.loss, build)
        self.optimizers = {"student": build.optimizer(self.student)}
        if build.channels != 3:
            build.report.append(f"images have {build.channels} channels, not 3: colours stay, strong views are blurred")

    def streams(self, data: Data, batch: int, crop: tuple[int, int]) -> dict[str, Stream]:
        phases = (Phase(crop, batch),)
        return {"labelled": Stream(data.labelled, phases), "unlabelled": Stream(data.unlabelled, phases, strong=2)}

    def step(self, clock: Clock, labelled: Labelled, unlabelled: Unlabelled) -> dict[str, Tensor]:  # type: ignore[override]
        images, valid = len(labelled.image), unlabelled.valid
        weak = to_float(unlabelled.image)
        logits, logits_weak, logits_features = self._weak(torch.cat([to_float(labelled.image), weak]), images)
        label, confidence = pseudo_label(logits_weak)
        confident = (confidence >= self.config.threshold) & valid
        # Divided by the valid pixels, not by the confident ones: the loss grows with the share that is trusted.
        # Backward before the next forward: nearly half the memory.
        features = masked_cross_entropy(logits_features, label, confident, valid)
        values = self.backward("student", *self.loss(logits, labelled.mask, 0.5), (0.5 * 0.5, features))
        views = [self._view(weak, unlabelled.view(i), unlabelled.partner, label, confident, valid) for i in (0, 1)]
        logits_strong = self.student(torch.cat([view[0] for view in views])).split([len(weak)] * 2)

        terms: list[tuple[float, Share]] = [
            (0.5 * 0.25, masked_cross_entropy(z, label_mixed, confident_mixed, valid_mixed))
            for z, (_, label_mixed, confident_mixed, valid_mixed) in zip(logits_strong, views, strict=True)
        ]
        strong_values = self.update("student", *terms)
        return {
            "loss": values[0],
            "loss_strong": (strong_values[0] + strong_values[1]) / 2,
            "loss_features": values[-1],
            "confident": confident.sum() / valid.sum(),
        }

    def _weak(self, image: Tensor, labelled: int) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the labelled images, of the others, and of the others with perturbed features; one pass."""
        net, size = self.student, (image.shape[2], image.shape[3])
        maps = net.encode(image)
        perturbed = [self.drop(m[labelled:]) for m in maps]
        fused = net.fuse([torch.cat(both) for both in zip(maps, perturbed, strict=True)])
        others = len(image) - labelled
        one, two, three = net.classify(fused, size).split([labelled, others, others])
        return one, two, three

    def _view(
        self, image: Tensor, u: dict[str, Tensor], partner: Tensor, label: Tensor, confident: Tensor, valid: Tensor
    ) -> tuple[Tensor, ...]:
        """A strong view: image, and what of the labels, of the confident and of the valid pixels is where in it."""
        c = self.config
        with torch.no_grad():
            image = strong(image, u, c.jitter, blur_probability=c.blur, sigma=c.sigma)
            box = cutmix_box(u, (image.shape[2], image.shape[3]), c.cutmix_area, c.cutmix)
            return mix(box, partner, image, label, confident, valid)

    def predictor(self) -> nn.Module:
        return self.student
