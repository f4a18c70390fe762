"""What travels between the layers: batches, the clock, losses before division, and options that several layers read.

Shape legend, used in every docstring:

    B  images in a batch        N  channels of an image      H, W  height and width in px
    C  classes                  D  width of the fused map    h, w  height and width of a feature map
    S  strong views a sample    K  uniform numbers a view (len(VIEW))
"""

from __future__ import annotations

import difflib
import math
import signal
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import to_jsonable_python

if TYPE_CHECKING:  # the command line imports this file first, and torch takes seconds
    import torch
    from torch import Tensor

IGNORE = 255
"""The mask value of a pixel that has no label."""


class InputError(ValueError):
    """The user's input is wrong. The message is one sentence that names the file or option and says what to change."""


class Changed(InputError):
    """A file with many images is another one than the run looked at: no image in it is passed over as a damaged one."""


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM; no Exception, as those are caught where damaged files are read. `code` is 130 or 143."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code

    @staticmethod
    def by(number: int, text: str) -> Interrupted:
        """The exception for a signal."""
        return (KeyboardInterrupted if number == signal.SIGINT else Interrupted)(128 + number, text)


class KeyboardInterrupted(Interrupted, KeyboardInterrupt):
    """Ctrl-C, as a script in Python expects it."""


def nearest(name: str, names: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: the names it may have meant, else the known ones."""
    known = {item.lower(): item for item in sorted(names)}
    near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(known[item] for item in near)}?"
    return (
        f"known: {', '.join(known.values())}."
        if len(known) <= 20
        else f"no name like it is among the {len(known)} known."
    )


def some(items: Iterable[object], most: int = 3) -> str:
    """The first items of a list in a sentence: `a, b, c and 4 more`."""
    texts = [str(item) for item in items]
    rest = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + rest


def white(image: Tensor) -> float:
    """What stands for 1 in an image: 255 in uint8, 65535 in uint16, 1 in floats."""
    import torch  # see above

    return 1.0 if image.is_floating_point() else {torch.uint8: 255.0, torch.uint16: 65535.0}[image.dtype]


VIEW = (
    "jitter", "brightness", "contrast", "saturation", "hue", "grey", "blur", "sigma",
    "mix", "area", "ratio", "top", "left",
)  # fmt: skip
"""Names of the uniform numbers in [0, 1) that belong to one strong view of one sample: the columns of `table`."""


class _Batch:
    """Moves all tensors of a dataclass at once; a DataLoader silently leaves one without `pin_memory` unpinned."""

    table: Tensor

    def _map(self, change) -> Self:  # type: ignore[no-untyped-def]
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        return replace(self, **{n: value if value is None else change(value) for n, value in values.items()})  # type: ignore[type-var]

    def pin_memory(self) -> Self:
        return self._map(lambda t: t.pin_memory())

    def to(self, device: torch.device) -> Self:
        return self._map(lambda t: t.to(device, non_blocking=True))

    def view(self, index: int) -> dict[str, Tensor]:
        """The uniform numbers of strong view `index`, by name, each (B,) float32."""
        return dict(zip(VIEW, self.table[:, index].unbind(1), strict=True))


@dataclass(frozen=True)
class Labelled(_Batch):
    """One batch of images with masks.

    image (B, N, H, W) uint8 or uint16, the file's depth; mask (B, H, W) uint8 class ids or IGNORE;
    valid (B, H, W) bool, False in padding; table (B, S, K) float32 uniforms in [0, 1), columns VIEW;
    row (B,) int64, the row in the stream's pool; soft (B, 2k - 1, H, W) uint8, where the stream asks for k > 1 classes
    a pixel: the probabilities of k classes, 255 for 1, of which the mask has the first, and the ids of the others.
    """

    image: Tensor
    mask: Tensor
    valid: Tensor
    table: Tensor
    row: Tensor
    soft: Tensor | None = None


@dataclass(frozen=True)
class Unlabelled(_Batch):
    """One batch of images without masks.

    image (B, N, H, W) uint8 or uint16; valid (B, H, W) bool; table (B, S, K) float32 uniforms in [0, 1), columns VIEW;
    partner (B,) int64, the slot whose image is mixed into this one: another row where the pool has two (unless a file
    could not be read and its neighbour stands in);
    row (B,) int64.
    """

    image: Tensor
    valid: Tensor
    table: Tensor
    partner: Tensor
    row: Tensor


@dataclass(frozen=True)
class Clock:
    """Where a run is: `step` of `total`, counted from 0; `share` of its samples are done, if steps differ in size."""

    step: int
    total: int
    share: float | None = None

    @property
    def progress(self) -> float:
        return self.step / self.total if self.share is None else self.share


@dataclass(frozen=True)
class Share:
    """A loss before it is divided, so that the counts of several processes can be added first.

    value = total / count, times over / count where `over` is given; 0 where the count is 0.
    `total` is a scalar in nats that carries the graph also where nothing was selected.
    """

    total: Tensor
    count: Tensor
    over: Tensor | None = None


class Options(BaseModel):
    """Base of every group of options: frozen, and an unknown name is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


def as_text(value: object) -> str:
    """An option's value as it stands in an override."""
    import yaml  # not above, as torch is not

    text = yaml.safe_dump(to_jsonable_python(value), default_flow_style=True, width=math.inf)
    return text.strip().removesuffix("\n...")


def described(options: type[Options], before: str = "", default: Options | None = None) -> dict[str, tuple[str, str]]:
    """Every option with its default and its meaning; a group's options are joined to its name by a dot."""
    found: dict[str, tuple[str, str]] = {}
    for name, field in options.model_fields.items():
        value = field.get_default(call_default_factory=True) if default is None else getattr(default, name)
        group = type(value) if isinstance(value, Options) else field.annotation
        if isinstance(group, type) and issubclass(group, Options):
            found |= described(group, f"{before}{name}.", value if isinstance(value, Options) else None)
        else:
            text = "(must be given)" if default is None and field.is_required() else as_text(value)
            found[before + name] = (text, " ".join((field.description or "").split()))
    return found


def flat(options: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Options in groups by one name each: {"train": {"seed": 0}} is {"train.seed": 0}."""
    result: dict[str, Any] = {}
    for key, value in options.items():
        result |= flat(value, f"{before}{key}.") if isinstance(value, Mapping) else {f"{before}{key}": value}
    return result


Side = Annotated[int, Field(gt=0)]


def ascending(limits: tuple[float, float]) -> tuple[float, float]:
    """The range, for pydantic; ValueError where it goes down."""
    if limits[0] > limits[1]:
        raise ValueError(f"goes from {limits[0]:g} down to {limits[1]:g}: put the smaller number first")
    return limits


Portion = Annotated[float, Field(ge=0, le=1)]
"""A share, 0..1."""
Portions = Annotated[tuple[Portion, Portion], AfterValidator(ascending)]
"""A range of shares, smallest and largest."""


class InferenceConfig(Options):
    """How an image is turned into a mask, in evaluation and in prediction."""

    window: tuple[Side, Side] | None = None
    """(H, W) in px of a sliding window; none: the whole image at once."""
    stride: Annotated[float, Field(gt=0, le=1)] = 2 / 3
    """Step of the window as a share of its side; the last window is shifted back inside."""
    flip: bool = False
    """Average with the mirrored image."""
    scales: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] = (1.0,)
    """Average over the image resized by these factors."""


Schedule = Literal["baseline", "coarse2fine", "coarse2fine+", "fine2coarse", "fine2coarse+", "alternate"]


class TrainConfig(Options):
    """Length, size and bookkeeping of a run."""

    steps: Side = 20_000
    """Of the baseline schedule: the run has `steps` times `batch` samples of each stream."""
    batch: Side = 8
    """Images a step and stream, over all processes."""
    crop: tuple[Side, Side] = (320, 320)
    """(H, W) in px."""
    schedule: Schedule = "baseline"
    """How the crop's size changes. coarse2fine: small crops first. fine2coarse: last. alternate: every other epoch, but
    not in the last tenth. With + as many more small images a step as fit into the same memory, at a higher rate."""
    small: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Side of a small crop over that of `crop`."""
    small_share: Annotated[float, Field(gt=0, lt=1)] = 0.6
    """Share of the run's samples with small crops (coarse2fine, fine2coarse)."""
    small_batch: Annotated[int, Field(ge=1)] = 4
    """At most so many times `batch` in a step with small crops, with +; as many as have no more px than whole ones."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the draws of images and crops, and of weights that start at random."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto, cpu or cuda; auto takes a GPU where there is one."""
    precision: Literal["bf16", "fp32"] = "fp32"
    """fp32, or bf16: networks compute in 16 bit, weights and losses stay in 32."""
    channels_last: bool = True
    """Memory layout of the convolutions: the faster one, or torch's usual one."""
    compile: bool = False
    """Through torch.compile: the first step takes minutes, and so does the first of each other size of crops."""
    threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads of torch; 0: physical cores. They change the last bits of a run, so its recipe.yaml keeps them."""
    workers: Annotated[int, Field(ge=0)] = 1
    """Processes that read images."""
    log_every: Side = 10
    """Steps between the rows of metrics.csv."""
    evaluations: Side = 5
    """How often val is evaluated, evenly spaced and at the end; the best of these is delivered."""
    save_every: Side = 200
    """Steps between checkpoints, from which an interrupted run goes on."""
    keep: tuple[Annotated[float, Field(gt=0, le=1)], ...] = ()
    """Shares of the run at which the model is stored under `kept/`, to look at how it came about."""
