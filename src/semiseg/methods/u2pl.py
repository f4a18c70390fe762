"""U2PL: reliable predictions are labels, and unreliable ones still tell which classes a pixel does not have.

Wang, Wang, Shen, Fei, Li, Jin, Wu, Zhao and Le, "Semi-Supervised Semantic Segmentation Using Unreliable Pseudo-Labels",
CVPR 2022.

    L = L_s + L_u + weight L_c

A teacher, the student's average, labels the unlabelled images. The share alpha of their pixels with the highest entropy
is unreliable: it leaves L_u, and its pixels become, for the classes that the teacher ranks neither first nor last,
negatives of a contrastive loss L_c on the features of a second head.

Deliberate differences from the released code:

- every class has its own anchors, positive and queue (released: lists by position among the classes that are present
  meet queues by class, so that with classes 0, 5 and 7 in a batch the last two are never learned);
- negatives as the paper defines them (released: also of the pseudo-label's own class, and none from labelled images);
- unlabelled anchors are the reliable pixels (released: those of the alpha lowest entropies, none in the end);
- entropy, ranks and keys come from the forward that gives the labels, teacher in eval mode, and are mixed with them, so
  that a pixel has one prediction (released: a second forward, in training mode, of the mixed images);
- alpha falls with every step, not epoch (their values agree at the beginning of each);
- the teacher is copied once, buffers too, and averaged from the next step on (released: one memory for an epoch);
- 0.1 weighs L_c, the paper's value (released: 1 over the number of processes);
- padding is no class and counts nowhere (released: it is class 0);
- CutMix draws for each image whether it is mixed, not for the batch, and never with itself;
- a push takes at most `push` keys a class, drawn evenly, and an anchor's negatives come from 1024 drawn keys a class;
- bilinear resizing with align_corners=False.

What stays per process where there are several: batch norm's statistics on CPUs; dice, of which the mean is taken; and
which anchors and keys are drawn, for each process draws its part from its own images.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from semiseg import parallel
from semiseg.data.sampling import Phase, Stream
from semiseg.data.splits import Data
from semiseg.methods.base import StepMethod
from semiseg.methods.labelled import LabelledLoss, LossConfig
from semiseg.networks.factory import Build
from semiseg.networks.heads import Views
from semiseg.ops.bank import Bank
from semiseg.ops.colour import to_float
from semiseg.ops.contrast import at, candidates, class_sums, contrast, draw_anchors, draw_keys
from semiseg.ops.ema import ema_update, make_teacher
from semiseg.ops.losses import cross_entropy
from semiseg.ops.mix import class_region, half_box, mix
from semiseg.ops.partition import entropy, histogram, quantile, threshold
from semiseg.ops.pseudo import winner
from semiseg.types import IGNORE, Clock, InputError, Labelled, Options, Portion, Share, Unlabelled

Weight = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(gt=0)]

POOL = 1024
"""Keys a class and step from which anchors draw their negatives: one product of matrices instead of a gather each."""


Term = tuple[str, float, Share]
"""Of a loss: what it is called in logs, if it is there by itself; weight; total and count."""


@dataclass(frozen=True)
class Taught:
    """The unlabelled images as the student sees them, and the teacher's word on each of their pixels, mixed alike.

    image (B, N, H, W); label, nats (its entropy) and valid (B, H, W). And of all images, the labelled ones first, at
    the features' size: class probabilities probs (2B, C, h, w), and keys (2B, D, h, w).
    """

    image: Tensor
    label: Tensor
    nats: Tensor
    valid: Tensor
    probs: Tensor
    keys: Tensor | None


class U2PL(StepMethod):
    """Cross-entropy on masks and on reliable pseudo-labels; unreliable ones are negatives of a contrastive loss."""

    class Config(Options):
        """Options of `method: {name: u2pl}`."""

        loss: LossConfig = LossConfig()
        auxiliary: Weight = 0.0
        """Weight of the same loss on a classifier of the encoder's last map but one; 0: there is none."""
        ema: Annotated[float, Field(ge=0, lt=1)] = 0.99
        """Decay of the teacher."""
        warm_up: Annotated[float, Field(ge=0, lt=1)] = 0.0125
        """Share of the run with labelled images alone: 1 of 80 epochs."""
        alpha: Annotated[float, Field(ge=0, le=100)] = 20.0
        """Percent of the pixels that are unreliable at the start; it falls to 0 evenly. 0: all are reliable."""
        quantile: Literal["histogram", "exact"] = "histogram"
        """The limit between them, to about a thousandth over all processes at once, or exactly, which sorts."""
        adaptive: bool = True
        """L_u weighs all pixels over the reliable ones."""
        mix: Literal["cutmix", "classmix", "cutout", "none"] = "cutmix"
        """What is done to unlabelled images: half the area, or half the classes, of another; or a box is taken out."""
        mix_share: Portion = 0.5
        """Share of the unlabelled images to which it is done."""
        weight: Weight = 0.1
        """Of the contrastive loss; 0: there is none."""
        width: Count = 256
        """D, numbers a feature."""
        temperature: Annotated[float, Field(gt=0)] = 0.5
        """What cosines are divided by; lower: the nearest negatives matter more."""
        least: Portion = 0.3
        """Least probability of an anchor's class, by the teacher."""
        rank_low: Count | None = None
        """A pixel is a negative of the classes of this rank and of lower ones, 0 the most probable; none: 3, less where
        there are fewer than 12 classes."""
        rank_high: Count | None = None
        """But not of those of this rank and beyond; none: 20, or all there are."""
        negatives: Literal["unreliable", "reliable", "all"] = "unreliable"
        """Which unlabelled pixels give negatives: the paper's, or others to compare with."""
        anchors: Count = 256
        """A class and step, over all processes."""
        keys: Count = 50
        """Negatives an anchor."""
        queue: Count = 30_000
        """Keys that are kept of a class."""
        queue_first: Count = 50_000
        """The same of class 0, the background in Pascal VOC."""
        push: Count = 1024
        """Most new keys a class and step, over all processes."""

    paper = "Wang et al., CVPR 2022"

    def __init__(self, config: Config, build: Build) -> None:
        super().__init__()
        self.config, self.build = config, build
        if config.weight:
            self.ranks = ranks_of(config, build.classes)
            _check_sizes(config, build)
        self.student = build.projected(config.width, config.weight > 0, config.auxiliary > 0)
        self.teacher = make_teacher(self.student)
        self.loss = LabelledLoss(config.loss, build)
        heads = [part for part in (self.student.projection, self.student.auxiliary) if part is not None]
        self.optimizers = {"student": build.optimizer(self.student.net, heads)}
        if config.weight:
            capacities = [config.queue_first, *[config.queue] * (build.classes - 1)]
            self.bank = Bank(capacities, config.width).to(build.device)

    def streams(self, data: Data, batch: int, crop: tuple[int, int]) -> dict[str, Stream]:
        if min(crop) < 3 and self.config.mix in ("cutmix", "cutout"):
            raise InputError(f"train.crop: {list(crop)} has no box of half its area: take 3 px or more.")
        phases = (Phase(crop, batch),)
        return {"labelled": Stream(data.labelled, phases), "unlabelled": Stream(data.unlabelled, phases, strong=1)}

    def step(self, clock: Clock, labelled: Labelled, unlabelled: Unlabelled) -> dict[str, Tensor]:  # type: ignore[override]
        c, count = self.config, len(labelled.image)
        begin = math.ceil(c.warm_up * clock.total)
        if clock.step < begin:
            return self._warm_up(labelled)

        with torch.no_grad():
            both = torch.cat([to_float(labelled.image), to_float(unlabelled.image)])
            t = self._mix(unlabelled, self.teacher(both, large=slice(count, None)), count)
            share = 1 - c.alpha / 100 * (1 - clock.progress)
            limit = self._limit(t.nats, t.valid, share)
            reliable, unreliable = t.valid & (t.nats < limit), t.valid & (t.nats >= limit)

        seen = self.student(torch.cat([to_float(labelled.image), t.image]))
        terms = self._supervised(seen, labelled.mask)
        learned = cross_entropy(seen.logits[count:], t.label.masked_fill(~reliable, IGNORE))
        learned = self._adapted(learned, t.valid, reliable, share) if c.adaptive else learned
        terms.append(("loss_unlabelled", 1.0, learned))
        scalars = {"reliable": reliable.sum() / t.valid.sum(), "limit": limit}
        scalars |= self._judged(t.probs[:count], labelled.mask, limit)
        if c.weight:
            keyed = {"unreliable": unreliable, "reliable": reliable, "all": t.valid}[c.negatives]
            contrastive, told = self._contrast(labelled.mask, t, reliable, keyed, seen.features)
            terms.append(("loss_contrastive", c.weight, contrastive))
            scalars |= told
        return self._update(terms, clock.step - begin) | scalars

    def _warm_up(self, labelled: Labelled) -> dict[str, Tensor]:
        """Labelled images alone; the teacher is the student, to be evaluated."""
        seen = self.student(labelled.image)
        terms = self._supervised(seen, labelled.mask)
        if seen.features is not None:  # no gradient at all is another case for optimisers than one of zero
            terms.append(("", 0.0, Share(seen.features.sum(), seen.features.new_ones(()))))
        return self._update(terms, 0)

    def _update(self, terms: Sequence[Term], averaged: int) -> dict[str, Tensor]:
        """One step of student and teacher, averaged so many times before; the values of the terms by name."""
        values = self.update("student", *((weight, share) for _, weight, share in terms))
        ema_update(self.teacher, self.student, averaged, self.config.ema)
        return {name: value for (name, _, _), value in zip(terms, values, strict=True) if name}

    def _supervised(self, seen: Views, mask: Tensor) -> list[Term]:
        terms = _named("loss", self.loss(seen.logits[: len(mask)], mask))
        if seen.auxiliary is not None:
            terms += _named("loss_auxiliary", self.loss(seen.auxiliary[: len(mask)], mask, self.config.auxiliary))
        return terms

    def _mix(self, unlabelled: Unlabelled, views: Views, count: int) -> Taught:
        """`views` of the teacher on the labelled images, `count` of them, and these; its logits of these alone."""
        c, u, partner = self.config, unlabelled.view(0), unlabelled.partner
        image, valid = to_float(unlabelled.image), unlabelled.valid
        probs = views.logits.softmax(1)
        label, nats = winner(probs), entropy(probs)
        small, keys = views.small.softmax(1), views.features
        if c.mix == "none":
            return Taught(image, label, nats, valid, small, keys)
        if c.mix == "classmix":
            region = class_region(u, label.masked_fill(~valid, IGNORE)[partner], self.build.classes, c.mix_share)
        else:
            region = half_box(u, (image.shape[2], image.shape[3]), c.mix_share)
        if c.mix == "cutout":
            mean = self.student.net.normalise.mean.to(image.dtype)
            image = torch.where(region.unsqueeze(1), mean, image)
            return Taught(image, label, nats, valid & ~region, small, keys)
        coarse = self.student.pick(region, small, False)
        small = torch.cat([small[:count], *mix(coarse, partner, small[count:])])
        keys = None if keys is None else torch.cat([keys[:count], *mix(coarse, partner, keys[count:])])
        image, label, nats, valid = mix(region, partner, image, label, nats, valid)
        return Taught(image, label, nats, valid, small, keys)

    def _adapted(self, learned: Share, valid: Tensor, reliable: Tensor, share: float) -> Share:
        """The mean over the reliable pixels times N/n.

        N/n is about 1/share. It is bounded by twice that, for where many entropies are equal, as at the very start of a
        run, the limit misses its share, and a few pixels would outweigh all labelled ones.
        """
        pixels, trusted = parallel.shared_sum([valid.sum().double(), reliable.sum().double()])
        over = pixels.minimum(2 * trusted / max(share, 1e-9)) / parallel.world()
        return Share(learned.total, learned.count, over)

    def _limit(self, nats: Tensor, valid: Tensor, share: float) -> Tensor:
        """The entropy below which `share` of the valid pixels of all processes lie.

        Infinite for a share of 1; where no pixel is valid NaN, on no side of which anything lies.
        """
        if share == 1:
            return nats.new_full((), torch.inf)
        if self.config.quantile == "exact":
            return quantile(parallel.joined(nats), parallel.joined(valid), share)
        classes = self.build.classes
        return threshold(parallel.added(histogram(nats, valid, classes)), share, classes)

    def _contrast(
        self, mask: Tensor, t: Taught, reliable: Tensor, keyed: Tensor, features: Tensor
    ) -> tuple[Share, dict[str, Tensor]]:
        """L_c, and what is to be known of it.

        mask of the labelled images; reliable, and keyed, which may be negatives, of the mixed ones, each (B, H, W);
        features of all, the student's (2B, D, h, w).
        """
        c, pick, keys = self.config, self.student.pick, t.keys
        assert keys is not None
        label = pick(torch.cat([mask.long(), t.label]), features, IGNORE).flatten()
        trusted = pick(torch.cat([mask != IGNORE, reliable]), features, False).flatten()
        keyed = pick(torch.cat([torch.zeros_like(keyed), keyed]), features, False).flatten()
        masked = torch.arange(len(label), device=label.device) < len(label) // 2
        probs = t.probs.permute(0, 2, 3, 1).flatten(0, 2)
        pixels, classes = probs.shape
        draw = partial(torch.rand, classes, device=probs.device)

        anchors, negatives = candidates(label, probs, trusted, masked, keyed, c.least, self.ranks)
        sums, count = class_sums(anchors, keys)
        here = count > 0
        parts = parallel.added(torch.cat([sums, count.unsqueeze(1), here.unsqueeze(1).to(sums.dtype)], 1))
        positive, count, processes = parts.split([len(sums[0]), 1, 1], 1)  # a cosine needs no division by the count

        world = parallel.world()
        chosen, good = draw_keys(negatives, draw(pixels), max(1, c.push // world))
        new = F.normalize(at(keys, chosen), dim=-1).to(self.bank.keys.dtype)
        self.bank.push(parallel.joined(new, 1), parallel.joined(good, 1))

        each = max(1, c.anchors // world)
        drawn = at(features, draw_anchors(anchors, label, draw(each)))
        pool = self.bank.draw(draw(POOL, dtype=features.dtype))
        picks = torch.randint(POOL, (classes, each, c.keys), device=probs.device)
        nats, nearest = contrast(drawn, positive, pool, picks, c.temperature)

        present = count.squeeze(1) > 0
        used = present & (self.bank.fill > 0) & (present.sum() > 1)
        weight = (used & here) / (each * processes.squeeze(1).clamp(min=1))
        share = Share((nats.sum(1) * weight).sum(), used.sum().to(nats.dtype) / world)
        told = {"nearest": (nearest.sum(1) * weight).sum() * world / used.sum()}  # the mean over processes is logged
        names = self.build.names or map(str, range(classes))
        return share, told | {f"queue/{name}": fill for name, fill in zip(names, self.bank.fill, strict=True)}

    @torch.no_grad()
    def _judged(self, probs: Tensor, mask: Tensor, limit: Tensor) -> dict[str, Tensor]:
        """How often the teacher is right on either side of the limit, on labelled images, whose masks are known."""
        mask = self.student.pick(mask.long(), probs, IGNORE)
        right, known, low = winner(probs) == mask, mask != IGNORE, entropy(probs) < limit
        return {
            "accuracy_reliable": (right & known & low).sum() / (known & low).sum(),
            "accuracy_unreliable": (right & known & ~low).sum() / (known & ~low).sum(),
        }

    def predictor(self) -> nn.Module:
        return self.teacher.net


def _named(name: str, terms: Sequence[tuple[float, Share]]) -> list[Term]:
    """The first term, the cross-entropy, has the name."""
    return [(name if i == 0 else "", weight, share) for i, (weight, share) in enumerate(terms)]


def ranks_of(config: U2PL.Config, classes: int) -> tuple[int, int]:
    """Ranks (low, high) of the classes of which an unreliable pixel is a negative."""
    if classes < 2:
        raise InputError("method.weight: the contrastive loss needs two classes, the data has one: set it to 0.")
    low = min(3, max(1, classes // 4)) if config.rank_low is None else config.rank_low
    high = min(20, classes) if config.rank_high is None else config.rank_high
    if low >= classes:
        raise InputError(
            f"method.rank_low is {low}, but {classes} classes have ranks 0 to {classes - 1}: set it lower."
        )
    if high <= low:
        name, wanted = ("rank_low", f"below {high}") if config.rank_high is None else ("rank_high", f"above {low}")
        raise InputError(
            f"method.{name}: with ranks {low} to {high} of {classes} classes no pixel is a negative of any: "
            f"set it {wanted}, or leave it out."
        )
    return low, high


def _check_sizes(config: U2PL.Config, build: Build) -> None:
    """Queues and draws that cannot be."""
    for name in ("queue", "queue_first"):
        if getattr(config, name) < config.push:
            raise InputError(
                f"method.{name} is {getattr(config, name)}, smaller than one push: set it to method.push="
                f"{config.push} or more, or push less."
            )
    half = build.memory() / 2
    largest = max(config.queue, config.queue_first)
    key = 2 * build.classes * config.width
    most = int(half / key)
    if key * largest > half:
        raise InputError(
            f"method.queue: {build.classes} queues of up to {largest} keys with method.width={config.width} need "
            f"more than half the memory: "
            + (f"set queue and queue_first to {most} at most." if most >= config.push else "lower method.width.")
        )
    # Similarities and their gradients, the drawn negatives twice with their positions.
    each = 4 * build.classes * (2 * POOL + 2 * config.width + 5 * config.keys)
    if config.anchors * each > half:
        most = int(half / each)
        raise InputError(
            f"method.anchors={config.anchors} a class with method.keys={config.keys} need "
            f"{config.anchors * each / 1e9:.0f} GB, more than half the memory: "
            + (f"set it to 1 to {most}." if most else "lower method.keys.")
        )
