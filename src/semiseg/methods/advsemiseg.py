"""AdvSemiSeg: a critic learns to tell predictions from masks; the network learns to deceive it, and what it believes.

Hung, Tsai, Liou, Lin and Yang, "Adversarial Learning for Semi-Supervised Semantic Segmentation", BMVC 2018.

    L = L_ce + lambda_adv L_adv(labelled) + lambda_adv_unlabelled L_adv(unlabelled) + lambda_semi L_semi

Deliberate differences from the released code:

- four branches in DeepLab-v2's head as in the paper (released: it returns from inside the loop, and two remain);
- the critic learns from predictions on labelled images, as the paper says; `critic_unlabelled` is the released code;
- an iteration that selects no pixel keeps its adversarial loss (released: it is dropped with L_semi);
- padding of unlabelled images counts nowhere (released: everywhere);
- masks that the critic sees may hold padding, zeros that do not count (released: drawn anew until there is none);
- starts are shares of the run (5,000 of 20,000 steps = 0.25), so that a shorter run keeps the paper's proportions;
- bilinear resizing with align_corners=False, also of the critic's map.

What stays per process where there are several: batch norm's statistics on CPUs; and dice, of which the mean is taken.
"""

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from semiseg.data.sampling import Phase, Stream
from semiseg.data.splits import Data
from semiseg.methods.base import StepMethod
from semiseg.methods.labelled import LabelledLoss, LossConfig
from semiseg.networks.critic import Kind
from semiseg.networks.factory import Build
from semiseg.ops.losses import binary_cross_entropy, cross_entropy
from semiseg.ops.pseudo import one_hot, winner
from semiseg.types import IGNORE, Clock, InputError, Labelled, Options, Portion, Share, Unlabelled

Weight = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]

PREDICTION, MASK = 0.0, 1.0
"""The critic's answers."""


class AdvSemiSeg(StepMethod):
    """Cross-entropy, deceiving a critic, and cross-entropy on the unlabelled pixels that the critic takes for real."""

    class Config(Options):
        """Options of `method: {name: advsemiseg}`."""

        loss: LossConfig = LossConfig()
        lambda_adv: Weight = 0.01
        """Weight of deceiving the critic on labelled images."""
        lambda_adv_unlabelled: Weight | None = None
        """The same on unlabelled images; none: 0.001 where there are any."""
        lambda_semi: Weight | None = None
        """Weight of the cross-entropy on selected unlabelled pixels; none: 0.1 where there are any."""
        threshold: Portion = 0.2
        """T_semi: least confidence, by the critic, of an unlabelled pixel whose predicted class is learned."""
        adv_start: Annotated[float, Field(ge=0, lt=1)] = 0.0
        """Share of the run before unlabelled images are to deceive the critic."""
        semi_start: Annotated[float, Field(ge=0, lt=1)] = 0.25
        """Share of the run before selected pixels are learned: the critic has to know something first."""
        critic: Kind = "pixel"
        """pixel: a map of answers. image: one answer an image, the paper's ablation."""
        critic_scale: Annotated[float, Field(gt=0, le=16)] = 1.0
        """Factor on the side of what the critic sees: its map has 1/32 of the crop's side, few px on small crops."""
        critic_lr: Positive = 1e-4
        """Peak rate of the critic's Adam."""
        critic_unlabelled: bool = False
        """The critic learns from predictions on unlabelled images too, as in the released code."""
        real_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
        """Share of the probability that masks spread over the other classes before the critic sees them."""

    paper = "Hung et al., BMVC 2018"

    def __init__(self, config: Config, build: Build) -> None:
        super().__init__()
        self.config, self.build = config, build
        self.student = build.network()
        self.critic = build.critic(config.critic, config.critic_scale)
        self.loss = LabelledLoss(config.loss, build)
        group = {"params": list(self.critic.parameters()), "lr": config.critic_lr, "peak_lr": config.critic_lr}
        self.optimizers = {
            "student": build.optimizer(self.student),
            "critic": torch.optim.Adam([group], betas=(0.9, 0.99), fused=True),
        }

    def streams(self, data: Data, batch: int, crop: tuple[int, int]) -> dict[str, Stream]:
        phases = (Phase(crop, batch),)
        # The masks that the critic sees are drawn apart from the images whose predictions it sees.
        streams = {"labelled": Stream(data.labelled, phases), "real": Stream(data.labelled, phases, images=False)}
        if data.config.unlabelled == "none":
            for name in ("lambda_semi", "lambda_adv_unlabelled", "critic_unlabelled"):
                if getattr(self.config, name):
                    raise InputError(
                        f"method.{name} is given, but data.unlabelled is none: remove the one or the other."
                    )
            return streams
        return streams | {"unlabelled": Stream(data.unlabelled, phases)}

    def step(  # type: ignore[override]
        self, clock: Clock, labelled: Labelled, real: Labelled, unlabelled: Unlabelled | None = None
    ) -> dict[str, Tensor]:
        c = self.config
        logits = self.student(labelled.image)
        probs, known = logits.softmax(1), labelled.mask != IGNORE
        answer = self.critic(probs)
        adversarial = binary_cross_entropy(answer, MASK, known)
        # Backward before the next forward: half the memory.
        values = self.backward("student", *self.loss(logits, labelled.mask), (c.lambda_adv, adversarial))
        losses = {"loss": values[0], "loss_adv": values[-1]}
        terms: dict[str, tuple[float, Share]] = {}
        scalars = _judged(labelled.mask, probs, self._believed(answer), known)
        predictions, seen = [probs.detach()], [known]

        if unlabelled is not None:
            logits_u = self.student(unlabelled.image)
            probs_u = logits_u.softmax(1)
            answer_u = self.critic(probs_u)
            selected = self._believed(answer_u) & unlabelled.valid
            label = winner(probs_u).masked_fill(~selected, IGNORE)
            weight = _or(c.lambda_adv_unlabelled, 0.001) * (clock.progress >= c.adv_start)
            semi = _or(c.lambda_semi, 0.1) * (clock.progress >= c.semi_start)
            terms["loss_adv_unlabelled"] = (weight, binary_cross_entropy(answer_u, MASK, unlabelled.valid))
            terms["loss_semi"] = (semi, cross_entropy(logits_u, label))
            scalars["selected"] = selected.sum() / unlabelled.valid.sum()
            if c.critic_unlabelled:
                predictions.append(probs_u.detach())
                seen.append(unlabelled.valid)

        losses |= dict(zip(terms, self.update("student", *terms.values()), strict=True))
        # The critic learns from what the network predicted before this update.
        return losses | self._teach_critic(torch.cat(predictions), torch.cat(seen), real.mask) | scalars

    def _believed(self, answer: Tensor) -> Tensor:
        """(B, H, W) bool, where the critic's confidence reaches T_semi; at 1, none."""
        # As logits: in float32 the sigmoid of 17 is 1.
        t = self.config.threshold
        least = math.log(t / (1 - t)) if 0 < t < 1 else math.inf * (2 * t - 1)
        return answer.detach().squeeze(1) >= least

    def _teach_critic(self, predictions: Tensor, seen: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """One update of the critic. predictions (n, C, H, W), their pixels that count (n, H, W), masks (B, H, W)."""
        known = mask != IGNORE
        masks = one_hot(mask, predictions.shape[1], self.config.real_smoothing, predictions.dtype)
        answer_p, answer_m = self.critic(torch.cat([predictions, masks])).split([len(predictions), len(masks)])
        values = self.update(
            "critic",
            (0.5, binary_cross_entropy(answer_p, PREDICTION, seen)),
            (0.5, binary_cross_entropy(answer_m, MASK, known)),
        )
        right = ((answer_p.detach().squeeze(1) < 0) & seen).sum() + ((answer_m.detach().squeeze(1) >= 0) & known).sum()
        return {"loss_critic": torch.stack(values).mean(), "critic_accuracy": right / (seen.sum() + known.sum())}

    def predictor(self) -> nn.Module:
        return self.student


def _or(weight: float | None, default: float) -> float:
    return default if weight is None else weight


def _judged(mask: Tensor, probs: Tensor, believed: Tensor, known: Tensor) -> dict[str, Tensor]:
    """How often the network is right where the critic believes it, and where not; NaN where there is no such pixel.

    On labelled images, whose masks are known: a critic that tells nothing gives two equal numbers.
    """
    right = winner(probs) == mask
    believed, doubted = believed & known, ~believed & known
    return {
        "accuracy_selected": (right & believed).sum() / believed.sum(),
        "accuracy_rejected": (right & doubted).sum() / doubted.sum(),
    }
