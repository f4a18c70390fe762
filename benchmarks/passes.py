"""A method with a batch in hand: its whole step, and the least passes that the step cannot do without."""

from collections.abc import Callable
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
from semiseg.methods import FixMatch, StepMethod, Supervised
from semiseg.ops.colour import to_float
from semiseg.types import VIEW, Clock, InputError, Labelled, Unlabelled

CLASSES = 11
"""Where the recipe lists none: those of CamVid."""
Batches = dict[str, Labelled | Unlabelled]
Passes = tuple[nn.Module, list[Tensor], nn.Module | None, Tensor | None]


def least_supervised(method: Supervised, labelled: Labelled) -> Passes:
    """Student forward and backward on B."""
    return method.student, [labelled.image], None, None


def least_fixmatch(method: FixMatch, labelled: Labelled, unlabelled: Unlabelled) -> Passes:
    """Student forward and backward on 2B, in the forwards that the method uses; teacher's forward on B."""
    weak, strong = labelled.image, to_float(unlabelled.image)
    images = [torch.cat([to_float(weak), strong])] if method.config.forward == "joint" else [weak, strong]
    return method.student, images, method.teacher, unlabelled.image


LEAST: dict[str, Callable[..., Passes]] = {"supervised": least_supervised, "fixmatch": least_fixmatch}


@dataclass(frozen=True)
class Bench:
    """A method and one batch on the CPU, as a loader would hand it over."""

    recipe: Recipe
    method: StepMethod
    batches: Batches
    device: torch.device

    @property
    def images(self) -> int:
        return sum(len(batch.row) for batch in self.batches.values())

    def whole(self) -> None:
        """One step as the session runs it."""
        total = self.recipe.train.steps
        self.method.step(Clock(total // 2, total), **{name: b.to(self.device) for name, b in self.batches.items()})

    def least(self) -> Callable[[], None]:
        """The passes alone; their inputs are on the device before."""
        name = self.recipe.method.name
        if name not in LEAST:
            raise InputError(f"the least passes of {name} are not written down: add them to LEAST in {__file__}.")
        on_device = {name: b.to(self.device) for name, b in self.batches.items()}
        student, images, teacher, weak = LEAST[name](self.method, **on_device)
        classes = self.method.build.classes
        gradients = [torch.randn(len(i), classes, *i.shape[2:], device=self.device) * 1e-6 for i in images]

        def passes() -> None:
            if teacher is not None:
                with torch.no_grad():
                    teacher(weak)
            torch.autograd.backward([student(image) for image in images], gradients)
            student.zero_grad(set_to_none=True)

        return passes

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def prepare(recipe: Recipe, device: torch.device, base: Path) -> Bench:
    """A bench with random images and masks in the recipe's shapes."""
    names = recipe.data.classes or tuple(f"class_{i}" for i in range(CLASSES))
    one, none = Rows.of("", ["image"]), Rows.of("", ())
    code = MaskCode(len(names), None, None)
    data = Data(
        "random", names, default_palette(len(names)), code, recipe.data, Rows.of("", ["image"], ["mask"]), one, none,
        none, "random images",
    )  # fmt: skip
    method = build_method(recipe, data, device, base)
    streams = method.streams(data, recipe.train.batch, recipe.train.crop)
    drawn = {name: _batch(stream, recipe.data.channels, len(names)) for name, stream in streams.items()}
    batches = {name: b.pin_memory() if device.type == "cuda" else b for name, b in drawn.items()}
    return Bench(recipe, method, batches, device)


def _batch(stream: Stream, channels: int, classes: int) -> Labelled | Unlabelled:
    phase = stream.phases[0]
    shape = (phase.batch, *phase.crop)
    image = torch.randint(256, (phase.batch, channels, *phase.crop), dtype=torch.uint8)
    valid, row = torch.ones(shape, dtype=torch.bool), torch.arange(phase.batch)
    if stream.labelled:
        return Labelled(image, torch.randint(classes, shape, dtype=torch.uint8), valid, row)
    return Unlabelled(image, valid, torch.rand(phase.batch, stream.strong, len(VIEW)), row.roll(1), row)
