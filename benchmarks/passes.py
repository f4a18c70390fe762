"""A method with a batch in hand: its whole step, and the least passes that the step cannot do without."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from common import build_method
from torch import Tensor, nn

from semiseg.config import Recipe
from semiseg.data.formats import MaskCode
from semiseg.data.rows import Rows
from semiseg.data.sampling import Stream
from semiseg.data.splits import Data, default_palette
from semiseg.methods import (
    CPS,
    U2PL,
    AdvSemiSeg,
    CutMixSeg,
    FixMatch,
    MeanTeacher,
    StepMethod,
    Supervised,
    UniMatch,
    UniMatchV2,
)
from semiseg.ops.colour import to_float
from semiseg.types import VIEW, Clock, InputError, Labelled, Unlabelled

CLASSES = 11
"""Where the recipe lists none: those of CamVid."""
Batches = dict[str, Labelled | Unlabelled]
Passes = Callable[[], None]


def _there_and_back(
    net: nn.Module,
    inputs: Sequence[Tensor],
    of_inputs: bool = False,
    of: Callable[[Tensor], list[Tensor]] | None = None,
) -> Passes:
    """Forwards of the inputs, then one backward from given gradients, to the weights or to the inputs.

    `of` names the network's outputs for an input, where they are not one tensor.
    """
    gradients: list[Tensor] = []

    def passes() -> None:
        outputs = [output for x in inputs for output in (of(x) if of else [net(x)])]
        if not gradients:
            gradients.extend(torch.randn_like(output) * 1e-6 for output in outputs)
        torch.autograd.backward(outputs, gradients, inputs=list(inputs) if of_inputs else None)
        net.zero_grad(set_to_none=True)
        for x in inputs:
            x.grad = None

    return passes


def least_supervised(method: Supervised, labelled: Labelled) -> list[Passes]:
    """Student forward and backward on B."""
    return [_there_and_back(method.student, [labelled.image])]


def least_fixmatch(method: FixMatch, labelled: Labelled, unlabelled: Unlabelled) -> list[Passes]:
    """Student forward and backward on 2B, in the forwards that the method uses; teacher's forward on B."""
    weak, strong = labelled.image, to_float(unlabelled.image)
    images = [torch.cat([to_float(weak), strong])] if method.config.forward == "joint" else [weak, strong]
    teacher = torch.no_grad()(lambda: method.teacher(unlabelled.image))
    return [teacher, *(_there_and_back(method.student, [image]) for image in images)]


def least_advsemiseg(
    method: AdvSemiSeg, labelled: Labelled, real: Labelled, unlabelled: Unlabelled | None = None
) -> list[Passes]:
    """Student forward and backward on 2B; critic forward and backward to its input on 2B, to its weights on 2B.

    With `critic_unlabelled` the latter on 3B; without unlabelled images B, B and 2B.
    """
    images = [labelled.image] if unlabelled is None else [labelled.image, unlabelled.image]
    more = 1 if unlabelled is None or not method.config.critic_unlabelled else 2
    batch, classes, size = len(labelled.image), method.build.classes, labelled.image.shape[2:]

    def maps(count: int) -> Tensor:
        return torch.rand(count * batch, classes, *size, device=labelled.image.device)

    deceived = [maps(1).requires_grad_() for _ in images]
    return [
        *(_there_and_back(method.student, [image]) for image in images),
        *(_there_and_back(method.critic, [probs], of_inputs=True) for probs in deceived),
        _there_and_back(method.critic, [maps(more + 1)]),
    ]


def least_meanteacher(method: MeanTeacher, labelled: Labelled, unlabelled: Unlabelled) -> list[Passes]:
    """Student forward and backward on 2B at once; teacher's forward on 2B: the loss is on labelled images too."""
    images = torch.cat([to_float(labelled.image), to_float(unlabelled.image)])
    return [torch.no_grad()(lambda: method.teacher(images)), _there_and_back(method.student, [images])]


def least_cutmixseg(method: CutMixSeg, labelled: Labelled, unlabelled: Unlabelled) -> list[Passes]:
    """Student forward and backward on 2B, apart; teacher's forward on B."""
    images = [labelled.image, to_float(unlabelled.image)]
    students = [_there_and_back(method.student, [image]) for image in images]
    return [torch.no_grad()(lambda: method.teacher(unlabelled.image)), *students]


def least_u2pl(method: U2PL, labelled: Labelled, unlabelled: Unlabelled) -> list[Passes]:
    """Student forward and backward on 2B with its heads; teacher's forward on 2B."""
    images = torch.cat([to_float(labelled.image), to_float(unlabelled.image)])

    half = slice(len(labelled.image), None)
    teacher = torch.no_grad()(lambda: method.teacher(images, half))

    def student(image: Tensor) -> list[Tensor]:
        views = method.student(image)
        return [views.logits, views.features, *([] if views.auxiliary is None else [views.auxiliary])]

    return [teacher, _there_and_back(method.student, [images], of=student)]


def least_cps(method: CPS, labelled: Labelled, unlabelled: Unlabelled) -> list[Passes]:
    """Both students forward and backward on 2B, apart; with CutMix both forward on B before."""
    images = [labelled.image, to_float(unlabelled.image)]
    nets = (method.first, method.second)
    labels = [torch.no_grad()(lambda net=net: net(images[1])) for net in nets] if method.config.cutmix else []
    return [*labels, *(_there_and_back(net, images) for net in nets)]


def least_unimatch(method: UniMatch, labelled: Labelled, unlabelled: Unlabelled) -> list[Passes]:
    """Student's encoder forward and backward on 2B, its decoder on 3B; both on 2B again."""
    weak = torch.cat([to_float(labelled.image), to_float(unlabelled.image)])
    count, net = len(labelled.image), method.student

    def thrice(image: Tensor) -> list[Tensor]:
        maps = [torch.cat([m, m[count:]]) for m in net.encode(image)]
        return [net.classify(net.fuse(maps), (image.shape[2], image.shape[3]))]

    views = torch.cat([to_float(unlabelled.image)] * 2)
    return [_there_and_back(net, [weak], of=thrice), _there_and_back(net, [views])]


def least_unimatchv2(method: UniMatchV2, labelled: Labelled, unlabelled: Unlabelled) -> list[Passes]:
    """Student forward and backward on B and on 2B; teacher's forward on B."""
    images = [labelled.image, torch.cat([to_float(unlabelled.image)] * 2)]
    students = [_there_and_back(method.student, [image]) for image in images]
    return [torch.no_grad()(lambda: method.teacher(unlabelled.image)), *students]


LEAST: dict[str, Callable[..., list[Passes]]] = {
    "supervised": least_supervised,
    "fixmatch": least_fixmatch,
    "advsemiseg": least_advsemiseg,
    "meanteacher": least_meanteacher,
    "cutmixseg": least_cutmixseg,
    "u2pl": least_u2pl,
    "cps": least_cps,
    "unimatch": least_unimatch,
    "unimatchv2": least_unimatchv2,
}


@dataclass(frozen=True)
class Bench:
    """A method and one batch on the CPU, as a loader would hand it over."""

    recipe: Recipe
    method: StepMethod
    batches: Batches
    device: torch.device

    @property
    def images(self) -> int:
        """Of a step, as a run counts them: streams of masks alone have none."""
        return sum(len(batch.row) for batch in self.batches.values() if batch.image.shape[1])

    def whole(self) -> None:
        """One step as the session runs it."""
        total = self.recipe.train.steps
        self.method.step(Clock(total // 2, total), **{name: b.to(self.device) for name, b in self.batches.items()})

    def least(self) -> Passes:
        """The passes alone; their inputs are on the device before."""
        name = self.recipe.method.name
        if name not in LEAST:
            raise InputError(f"the least passes of {name} are not written down: add them to LEAST in {__file__}.")
        on_device = {name: b.to(self.device) for name, b in self.batches.items()}
        parts = LEAST[name](self.method, **on_device)

        def passes() -> None:
            for part in parts:
                part()

        return passes

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def random_data(recipe: Recipe) -> Data:
    """What a method asks of data before it has seen any."""
    names = recipe.data.classes or tuple(f"class_{i}" for i in range(CLASSES))
    one, none = Rows.of("", ["image"]), Rows.of("", ())
    code = MaskCode(len(names), None, None)
    return Data(
        "random", names, default_palette(len(names)), code, recipe.data, Rows.of("", ["image"], ["mask"]), one, none,
        none, "random images",
    )  # fmt: skip


def prepare(recipe: Recipe, device: torch.device, base: Path) -> Bench:
    """A bench with random images and masks in the recipe's shapes."""
    data = random_data(recipe)
    method = build_method(recipe, data, device, base)
    if recipe.train.compile:
        method.compile()
    streams = method.streams(data, recipe.train.batch, recipe.train.crop)
    return Bench(recipe, method, batches_of(streams, recipe, len(data.classes), device), device)


def batches_of(streams: Mapping[str, Stream], recipe: Recipe, classes: int, device: torch.device) -> Batches:
    """Random batches in the shapes of the streams' first phases, on the CPU."""
    drawn = {name: _batch(stream, recipe.data.channels, classes) for name, stream in streams.items()}
    return {name: b.pin_memory() if device.type == "cuda" else b for name, b in drawn.items()}


def _batch(stream: Stream, channels: int, classes: int) -> Labelled | Unlabelled:
    phase = stream.phases[0]
    shape = (phase.batch, *phase.crop)
    image = torch.randint(256, (phase.batch, channels, *phase.crop), dtype=torch.uint8)
    valid, row = torch.ones(shape, dtype=torch.bool), torch.arange(phase.batch)
    table = torch.rand(phase.batch, stream.strong, len(VIEW))
    if stream.labelled:
        return Labelled(image, torch.randint(classes, shape, dtype=torch.uint8), valid, table, row)
    return Unlabelled(image, valid, table, row.roll(1), row)
