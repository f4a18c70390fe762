"""The contract between a method and the engine, as tests that anybody can run on a method of their own.

Each `check_...` raises an AssertionError that says in a sentence what is wrong; `check` runs them all:

    from semiseg import testing

    def test_my_method(tmp_path):
        testing.check_method(testing.Case("my_file.py:MyMethod", tmp_path))

A run takes about a second: 4 labelled and 8 unlabelled images of 40x48 px, a small network, one thread of the CPU.
"""

import contextlib
import csv
import io
import json
import os
import pickle
import random
import secrets
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from semiseg import methods, parallel
from semiseg.config import Recipe, build_of, override, parse
from semiseg.data.formats import write_mask
from semiseg.data.sampling import Stream
from semiseg.data.splits import Data, DataConfig, load_data
from semiseg.engine.log import Log
from semiseg.engine.session import Session, Trainable
from semiseg.methods import StepMethod
from semiseg.methods.labelled import LossConfig
from semiseg.types import IGNORE, Clock, InputError, Labelled, Options, Unlabelled

Scalars = dict[str, Tensor]

CLASSES = ("ground", "thing", "rare")
PALETTE = ((120, 110, 90), (60, 140, 60), (200, 60, 50))
NETWORK = {
    "name": "deeplabv3plus",
    "encoder": "test_resnet",
    "weights": "random",
    "options": {"encoder_depth": 3, "decoder_channels": 16},
}
TRAIN = {
    "steps": 12,
    "batch": 4,
    "crop": [32, 32],
    "threads": 1,
    "workers": 0,
    "device": "cpu",
    "log_every": 2,
    "evaluations": 2,
    "save_every": 3,
}
KILLS = (1, 4, 8, 11)
"""Steps at which `check_resume` ends a stage: before its first checkpoint, between others, and at its last step."""


@dataclass(frozen=True)
class Case:
    """A method to be tested.

    method   a name, or an import string as in `method.name`
    folder   an empty folder for the runs
    options  of the method by dotted name (`loss.kind`): set what the defaults would leave asleep in so short a run
    base     the folder of an import string's file; none: the working folder
    network  as in a recipe
    """

    method: str
    folder: Path
    options: Mapping[str, Any] = field(default_factory=dict)
    base: Path | None = None
    network: Mapping[str, Any] = field(default_factory=lambda: NETWORK)

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", self.folder.absolute())  # paths in a recipe are relative to `base`

    def with_options(self, options: Mapping[str, Any]) -> "Case":
        return replace(self, options={**self.options, **options})

    def recipe(self, **train: Any) -> Recipe:
        """The recipe of a tiny run; `train` changes options of that section."""
        plain = {
            "data": {"root": str(self.folder / "data"), "format": "splits", "labelled": 4, "cache": False},
            "network": self.network,
            "method": {"name": self.method},
            "optim": {"lr": 0.03},
            "train": {**TRAIN, **train},
            "baseline": False,
        }
        texts = [f"method.{name}={json.dumps(value)}" for name, value in self.options.items()]
        return parse(override(plain, texts), "semiseg.testing", self.base)

    def data(self, scale: tuple[float, float] = (0.5, 2.0)) -> Data:
        """The tiny data, written at the first call: every training image has a mask on the disk, 4 are labelled."""
        if not (self.folder / "data").exists():
            write_data(self.folder / "data")
        return load_data(self.recipe().data.model_copy(update={"scale": scale}))


@dataclass(frozen=True)
class Move:
    """Another value of an option, and the values of others beside which it matters."""

    value: Any
    beside: Mapping[str, Any] = field(default_factory=dict)


def write_data(folder: Path, train: int = 12, val: int = 2) -> None:
    """Blocks of 8 px of three classes and of IGNORE, in noise, from whole numbers alone: the same on every machine."""
    rng = np.random.default_rng(0)
    colours = np.array([*PALETTE, (90, 90, 200)])
    for split, count in (("train", train), ("val", val)):
        (folder / "images" / split).mkdir(parents=True)
        (folder / "masks" / split).mkdir(parents=True)
        for i in range(count):
            block = rng.choice(4, (5, 6), p=(0.4, 0.3, 0.2, 0.1)).repeat(8, 0).repeat(8, 1)
            image = colours[block] + rng.integers(-30, 31, (40, 48, 3)) + rng.integers(-25, 26, 3)
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / "images" / split / f"{i}.png")
            mask = np.where(block == 3, IGNORE, block).astype(np.uint8)
            write_mask(folder / "masks" / split / f"{i}.png", mask, PALETTE)
    (folder / "classes.json").write_text(json.dumps({"classes": CLASSES, "palette": PALETTE}), encoding="utf-8")


# ---- running -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moment:
    """One step of a stage, about to be run by `go`."""

    stage: Path
    method: StepMethod
    clock: Clock
    batches: Mapping[str, Labelled | Unlabelled]
    step: Callable[..., Scalars]

    def go(self) -> Scalars:
        return self.step(self.clock, **self.batches)


Around = Callable[[Moment], Scalars]


@dataclass(frozen=True)
class Result:
    """The delivered network's tensors, and the folder of the run."""

    net: dict[str, Tensor]
    folder: Path

    def checkpoints(self) -> dict[str, Tensor]:
        """Every tensor of every stage's last checkpoint, methods and optimisers."""
        found: dict[str, Tensor] = {}
        for path in sorted(self.folder.rglob("last.pt")):
            state = torch.load(path, weights_only=True)
            stage = path.relative_to(self.folder).as_posix()
            found |= _flat(f"{stage}:method", state["method"]) | _flat(f"{stage}:optimizers", state["optimizers"])
        return found

    def metrics(self) -> dict[str, list[dict[str, str]]]:
        """The rows of every stage's metrics.csv without the speed."""
        found = {}
        for path in sorted(self.folder.rglob("metrics.csv")):
            with path.open(encoding="utf-8", newline="") as file:
                rows = [
                    {k: v for k, v in row.items() if v and k not in ("images_per_second", "waiting")}
                    for row in csv.DictReader(file)
                ]
            found[path.relative_to(self.folder).as_posix()] = rows
        return found


def run(case: Case, name: str, around: Around = Moment.go, data: Data | None = None, **train: Any) -> Result:
    """Trains the case in the folder `name`, or goes on there; `around` stands in the place of every stage's every step.

    The random state of the process is another at every call, so that nothing can depend on it.
    """
    recipe, data = case.recipe(**train), data or case.data()
    folder = case.folder / name
    torch.manual_seed(secrets.randbits(32))
    np.random.seed(secrets.randbits(32))  # noqa: NPY002 - for methods that should not use it
    random.seed(secrets.randbits(32))
    with _quiet():
        build = build_of(recipe, data, torch.device("cpu"), case.base)
        method = methods.find(case.method, case.base)(recipe.method.options, build)
        session = _Watched(folder, recipe.train, recipe.evaluate, torch.device("cpu"), around)
        net = method.fit(session, data)
    return Result({name: tensor.clone() for name, tensor in net.state_dict().items()}, folder)


@dataclass(frozen=True)
class _Watched(Session):
    around: Around

    def train(
        self,
        method: Trainable,
        data: Data,
        streams: Mapping[str, Stream] | None = None,
        keep: Sequence[float] = (),
    ) -> nn.Module:
        assert isinstance(method, StepMethod), (
            f"{type(method).__name__} is no StepMethod: the session runs nothing else."
        )
        step = method.step

        def watched(clock: Clock, **batches: Any) -> Scalars:
            return self.around(Moment(self.folder, method, clock, batches, step))

        method.step = watched  # type: ignore[method-assign]
        return super().train(method, data, streams, keep)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """One thread, nothing printed, no curves drawn."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with contextlib.redirect_stdout(io.StringIO()), mock.patch.object(Log, "curves"):
            yield
    finally:
        torch.set_num_threads(threads)


def _flat(name: str, state: object) -> dict[str, Tensor]:
    match state:
        case Tensor():
            return {name: state}
        case dict():
            return {k: v for key, value in state.items() for k, v in _flat(f"{name}.{key}", value).items()}
        case list() | tuple():
            return {k: v for i, value in enumerate(state) for k, v in _flat(f"{name}.{i}", value).items()}
    return {}


def _different(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> str:
    """The first tensor that is not equal bit for bit, and by how much; empty where all are."""
    if one.keys() != other.keys():
        return f"{min(one.keys() ^ other.keys())} is in one of them only"
    for name, a in one.items():
        b = other[name]
        if a.dtype != b.dtype or not torch.equal(a, b):
            return f"{name} differs by up to {(a.double() - b.double()).abs().max():.3g}"
    return ""


# ---- the checks --------------------------------------------------------------------------------------------------


def check_method(
    case: Case,
    moves: Mapping[str, Sequence[Move]] | None = None,
    idle: Mapping[str, str] | None = None,
    unlabelled: bool = True,
) -> None:
    """All checks.

    Args:
        case: the method.
        moves: see `check_options`.
        idle: see `check_options`.
        unlabelled: False for a method that is not to look at unlabelled images.

    Raises:
        AssertionError: the method breaks the contract.
    """
    check_resume(case)
    check_workers(case)
    check_seed(case)
    check_observers(case)
    check_gradients(case)
    check_ignored(case)
    check_masks(case)
    check_unlabelled(case, unlabelled)
    check_processes(case)
    check_options(case, moves or {}, idle or {})


class _Killed(BaseException):
    """Ends a run at once, like a kill: no handler for errors sees it."""


def check_resume(case: Case) -> None:
    """A run that is killed, again and again, ends like one that was not: weights, checkpoints and metrics.csv.

    Every stage is killed at the steps KILLS, before or after its update. A second run dies as it writes its first file,
    goes on, dies at its second, and so on: so it meets files in every state in between.
    """
    whole = run(case, "whole")
    killed: set[tuple[Path, int]] = set()

    def at_steps(moment: Moment) -> Scalars:
        here = (moment.stage, moment.clock.step)
        if moment.clock.step not in KILLS or here in killed:
            return moment.go()
        killed.add(here)
        if len(killed) % 2:
            moment.go()
        raise _Killed

    def attempt(name: str, around: Around = Moment.go) -> Result | None:
        try:
            return run(case, name, around)
        except _Killed:
            return None

    _same_end(whole, _repeated(lambda i: attempt("killed at steps", at_steps)), "killed between checkpoints")

    def at_writes(i: int) -> Result | None:
        with _killed_at_write(i):
            return attempt("killed at writes")

    _same_end(whole, _repeated(at_writes), "killed while it wrote its files")


def _repeated(attempt: Callable[[int], Result | None]) -> Result:
    for i in range(200):
        if (result := attempt(i)) is not None:
            return result
    raise AssertionError("A run that is killed and started again makes no progress.")


@contextlib.contextmanager
def _killed_at_write(number: int) -> Iterator[None]:
    """Kills the run as its file `number` takes its place: just before it does, or just after."""
    move, count = os.replace, 0

    def replace_or_die(*args: Any, **options: Any) -> None:
        nonlocal count
        count += 1
        if count > number and number % 2:
            raise _Killed
        move(*args, **options)
        if count > number:
            raise _Killed

    with mock.patch("os.replace", replace_or_die):
        yield


def _same_end(whole: Result, resumed: Result, how: str) -> None:
    hint = "what must survive is a parameter, a buffer or in `optimizers`, and chance comes from the step's generators"
    lost = _different(whole.checkpoints(), resumed.checkpoints())
    assert not lost, f"A run that was {how} ends in another checkpoint than one that was not ({lost}): {hint}."
    lost = _different(whole.net, resumed.net)
    assert not lost, f"A run that was {how} delivers other weights than one that was not ({lost}): {hint}."
    assert whole.metrics() == resumed.metrics(), f"A run that was {how} has another metrics.csv than one that was not."


def check_workers(case: Case) -> None:
    """0, 1 and 3 processes that read images give the same weights, and so does the same run twice."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")  # torch's advice where there are fewer cores
        results = [run(case, f"{n} workers", workers=n, steps=5, evaluations=1) for n in (0, 1, 3)]
    for workers, result in zip((1, 3), results[1:], strict=True):
        other = _different(results[0].checkpoints(), result.checkpoints())
        assert not other, (
            f"train.workers={workers} gives other weights than train.workers=0 ({other}): some chance comes neither "
            "from the batch nor from the step's generators."
        )


def check_seed(case: Case) -> None:
    """Another seed gives other weights."""
    one, other = (run(case, f"seed {seed}", steps=2, evaluations=1, seed=seed) for seed in (0, 1))
    assert _different(one.checkpoints(), other.checkpoints()), "train.seed changes nothing."


def check_observers(case: Case) -> None:
    """Logging, evaluating and saving more often leaves the run as it is; only the delivered step may be another.

    Of several stages evaluations are varied for the first alone: the next one builds on what it delivers.
    """
    stages: list[Path] = []

    def note(moment: Moment) -> Scalars:
        stages.append(moment.stage)
        return moment.go()

    seldom = run(case, "observed seldom", note, steps=6, evaluations=1, log_every=100, save_every=100)
    often = run(case, "observed often", steps=6, evaluations=1, log_every=1, save_every=1, keep=(0.5, 1.0))
    other = _different(seldom.checkpoints(), often.checkpoints())
    assert not other, f"Logging and saving more often changes the run ({other})."
    evaluated = run(case, "evaluated often", steps=6, evaluations=3, log_every=100, save_every=100)
    first = (stages[0] / "checkpoints").relative_to(seldom.folder).as_posix()
    one, two = ({k: v for k, v in r.checkpoints().items() if k.startswith(first)} for r in (seldom, evaluated))
    other = _different(one, two)
    assert one, "no checkpoint of the first stage"
    assert not other, f"Evaluating more often changes the run ({other})."


def check_gradients(case: Case) -> None:
    """A network that no optimiser moves is a teacher: in eval mode, without gradient, in its own memory, moved by EMA.

    And the update of one optimiser leaves no gradient on the weights of another.

    "By EMA alone" is tested where the method's file imports `ema_update`.
    """
    at_first: dict[Path, dict[str, Tensor]] = {}

    def watch(moment: Moment) -> Scalars:
        method = moment.method
        teachers = _teachers(method)
        names = ", ".join(teachers)
        file = sys.modules[type(method).__module__]
        ema = mock.patch.object(file, "ema_update") if hasattr(file, "ema_update") else None
        if moment.stage not in at_first:
            at_first[moment.stage] = {k: v.clone() for t in teachers.values() for k, v in t.state_dict().items()}
        with _teachers_watched(teachers), _updates_watched(method), ema or contextlib.nullcontext():
            scalars = moment.go()
        _no_gradient(method)
        _own_memory(method, teachers)
        if ema is not None:
            now = {k: v for t in teachers.values() for k, v in t.state_dict().items()}
            moved = _different(at_first[moment.stage], now)
            assert not moved, f"{names} moves in a step without EMA ({moved})."
        return scalars

    run(case, "gradients", watch, steps=4, evaluations=1)


def _teachers(method: StepMethod) -> dict[str, nn.Module]:
    """The method's networks of which no optimiser has a weight."""
    moved = _optimised(method)
    return {
        name: child
        for name, child in method.named_children()
        if list(child.parameters()) and not any(id(weight) in moved for weight in child.parameters())
    }


def _optimised(method: StepMethod) -> dict[int, str]:
    """The optimiser of each weight, by the weight's id."""
    groups = ((name, group) for name, optimizer in method.optimizers.items() for group in optimizer.param_groups)
    return {id(weight): name for name, group in groups for weight in group["params"]}


@contextlib.contextmanager
def _teachers_watched(teachers: Mapping[str, nn.Module]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for name, teacher in teachers.items():
            for part in teacher.modules():
                if not list(part.children()):
                    hook = part.register_forward_hook(_watch_teacher(name))
                    stack.callback(hook.remove)
        yield


def _watch_teacher(name: str) -> Callable[[nn.Module, object, object], None]:
    def hook(part: nn.Module, _: object, output: object) -> None:
        kind = type(part).__name__
        assert not part.training, (
            f"{name} is used in training mode ({kind}): no optimiser moves it, so call eval() on it."
        )
        graph = isinstance(output, Tensor) and output.requires_grad
        assert not graph, f"{name} is used with gradients ({kind}): no optimiser moves it, so use torch.no_grad()."

    return hook


@contextlib.contextmanager
def _updates_watched(method: StepMethod) -> Iterator[None]:
    """Asserts that `backward` of one optimiser leaves the gradients of the others' weights as they were."""
    owner, backward = _optimised(method), method.backward

    def gradients(name: str) -> dict[str, Tensor]:
        others = ((n, w) for n, w in method.named_parameters() if id(w) in owner and owner[id(w)] != name)
        return {n: w.grad.clone() for n, w in others if w.grad is not None}

    def watched(name: str, *terms: Any) -> list[Tensor]:
        before = gradients(name)
        values = backward(name, *terms)
        touched = _different(before, gradients(name))
        assert not touched, f"The update of {name} leaves gradients on weights of another optimiser ({touched})."
        return values

    with mock.patch.object(method, "backward", watched):
        yield


def _no_gradient(method: StepMethod) -> None:
    owner = _optimised(method)
    for name, weight in method.named_parameters():
        if id(weight) not in owner:
            assert not weight.requires_grad, f"{name} is in no optimiser: set requires_grad_(False), or move it."
            assert weight.grad is None, f"{name} is in no optimiser and gets a gradient."


def _own_memory(method: StepMethod, teachers: Mapping[str, nn.Module]) -> None:
    tensors = method.state_dict(keep_vars=True)
    theirs = {tensor.data_ptr(): name for name, tensor in tensors.items() if name.partition(".")[0] in teachers}
    for name, tensor in tensors.items():
        if name.partition(".")[0] not in teachers and tensor.numel():
            other = theirs[tensor.data_ptr()] if tensor.data_ptr() in theirs else ""
            assert not other, f"{other} and {name} are one tensor: a teacher needs a copy of its own."


def check_ignored(case: Case) -> None:
    """A batch whose masks are all IGNORE, and one that is all padding, give finite losses, and training goes on."""
    weights: dict[Path, dict[str, Tensor]] = {}

    def blank(moment: Moment) -> Scalars:
        step, batches = moment.clock.step, dict(moment.batches)
        for name, batch in batches.items():
            if step in (1, 2) and isinstance(batch, Labelled):
                batches[name] = batch = replace(batch, mask=torch.full_like(batch.mask, IGNORE))
            if step == 2:
                batches[name] = replace(batch, valid=torch.zeros_like(batch.valid))
        scalars = replace(moment, batches=batches).go()
        for name, value in scalars.items():
            what = {1: "all masks are IGNORE", 2: "nothing is valid"}
            finite = step not in what or not name.startswith("loss") or bool(value.isfinite())
            assert finite, f"{name} is {float(value)} for a batch where {what[step]}: divide by counts through Share."
        now = {name: weight.detach().clone() for name, weight in moment.method.named_parameters()}
        bad = [name for name, weight in now.items() if not weight.isfinite().all()]
        assert not bad, f"{bad[0]} is not finite after step {step} of a run in which a batch was ignored."
        if step == 4:
            assert _different(weights[moment.stage], now), "No weight moves any more after a batch that was ignored."
        weights[moment.stage] = now
        return scalars

    run(case, "ignored", blank, steps=5, evaluations=1)


def check_masks(case: Case) -> None:
    """No mask is opened but those of the labelled images and val: without the others' files the run is the same."""
    data = case.data()
    before = run(case, "with masks", data=data, steps=5, evaluations=1)
    wanted = {row.mask for rows in (data.labelled, data.val) for row in rows}
    hidden = [path for path in (case.folder / "data" / "masks").rglob("*.png") if path not in wanted]
    assert hidden
    for path in hidden:
        path.rename(path.with_suffix(".hidden"))
    try:
        after = run(case, "without masks", data=data, steps=5, evaluations=1)
    finally:
        for path in hidden:
            path.with_suffix(".hidden").rename(path)
    other = _different(before.checkpoints(), after.checkpoints())
    assert not other, f"The run depends on masks of images that are not labelled ({other})."


def check_unlabelled(case: Case, used: bool = True) -> None:
    """The unlabelled images matter: in another order they give other weights. With used=False: they do not."""
    data = case.data()
    turned = replace(data, unlabelled=data.unlabelled[::-1])
    one = run(case, "unlabelled images", data=data, steps=5, evaluations=1)
    other = run(case, "unlabelled images turned", data=turned, steps=5, evaluations=1)
    changed = _different(one.checkpoints(), other.checkpoints())
    if used:
        assert changed, "Another order of the unlabelled images gives the same weights: they have no effect."
    else:
        assert not changed, f"The unlabelled images change the run ({changed})."


def check_processes(case: Case, shares: Sequence[str] = (), close: float = 1e-9) -> None:
    """Two processes with half a batch each end like one with the whole, though their pixels count unequally.

    In float64, without dropout layers, which each process draws for itself, and with frozen batch norm, which on CPUs
    sees the images of its own process.

    Args:
        case: the method, with options by which pixels are selected in its first steps: some, not all.
        shares: the names of what its step returns about that; each must be between 0 and 1.
        close: the largest difference of a number in the last checkpoints.
    """
    one = _three_steps(case, "one process")
    for name in shares:
        found = [float(row[name]) for rows in one.metrics().values() for row in rows]
        assert any(0 < value < 1 for value in found), (
            f"{name} is {found}: the case needs options by which it is between."
        )
    with contextlib.ExitStack() as stack:
        for process in [_launch(case, rank, port) for port in [_free_port()] for rank in (0, 1)]:
            stack.callback(process.kill)
            said, _ = process.communicate(timeout=300)
            assert process.returncode == 0, f"One of two processes fails: {said.decode().strip()[-2000:]}"
    before, after = one.checkpoints(), Result({}, case.folder / "two processes").checkpoints()
    assert before.keys() == after.keys(), f"{min(before.keys() ^ after.keys())} is in one checkpoint of two only."
    for name, tensor in before.items():
        off = float((tensor.double() - after[name].double()).abs().max()) if tensor.numel() else 0.0
        assert off <= close, (
            f"Two processes end {off:.3g} off one ({name}): losses are Shares, whose counts are added up before they "
            "divide, and what else crosses images must cross processes too."
        )


def _uneven(moment: Moment) -> Scalars:
    """A step in float64 in which the first image of a batch counts less than the others."""
    batches = {}
    for stream, batch in moment.batches.items():
        batch = replace(batch, image=batch.image.double() / 255)
        if parallel.rank() == 0 and isinstance(batch, Labelled):
            mask = batch.mask.clone()
            mask[0, :24] = IGNORE
            batch = replace(batch, mask=mask)
        elif parallel.rank() == 0:
            valid = batch.valid.clone()
            valid[0, :, 20:] = False
            batch = replace(batch, valid=valid)
        batches[stream] = batch
    for optimizer in moment.method.optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = 1e-4  # a random network without normalisation: large steps would blow up the last bits
    for part in moment.method.modules():
        if isinstance(part, _DropoutNd):
            part.p = 0.0
        elif isinstance(part, _BatchNorm):
            part.eval()
    return replace(moment, batches=batches).go()


def _three_steps(case: Case, name: str, around: Around = _uneven, **train: Any) -> Result:
    """A run of three steps, or of others, in as many processes as there are."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        parallel.start(torch.device("cpu"))
        data = case.data(scale=(1.0, 1.0))
        train = {"steps": 3, "save_every": 3, "batch": 8, **train}
        return run(case, name, around, replace(data, val=data.val[:0]), **train)
    finally:
        torch.set_default_dtype(before)


def _launch(case: Case, rank: int, port: int) -> "subprocess.Popen[bytes]":
    launched = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    code = "import pickle, sys; from semiseg import testing; testing._three_steps(*pickle.load(sys.stdin.buffer))"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | launched | meeting,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.stdin is not None
    process.stdin.write(pickle.dumps((case, "two processes")))
    process.stdin.close()
    process.stdin = None
    return process


def _free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port: int = place.getsockname()[1]
        return port


# ---- losses and options ------------------------------------------------------------------------------------------


def losses(case: Case, steps: int = 20) -> list[dict[str, float]]:
    """What the steps of all stages return, to be kept and compared with a relative 1e-7.

    Networks and images are in float64, and images are cut at their own size: what is resized or computed in float32
    differs between processors, and by more than 1e-7 after some steps.
    """
    found: list[dict[str, float]] = []

    def record(moment: Moment) -> Scalars:
        batches = {name: replace(batch, image=batch.image.double() / 255) for name, batch in moment.batches.items()}
        scalars = replace(moment, batches=batches).go()
        found.append({name: float(value) for name, value in scalars.items()})
        return scalars

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        # Dropout draws in the order of memory: with another layout the same seed drops other features.
        train = {"steps": steps, "save_every": steps, "channels_last": False}
        _train_unseen(case, "losses", record, case.data(scale=(1.0, 1.0)), **train)
    finally:
        torch.set_default_dtype(before)
    return found


def _train_unseen(case: Case, name: str, around: Around, data: Data, **train: Any) -> None:
    """A run without val: nothing is evaluated."""
    run(case, name, around, replace(data, val=data.val[:0]), **train)


_LOSS: Mapping[str, Sequence[Move]] = {
    # As a rule all pixels of so few are kept, and OHEM is the plain cross-entropy.
    "kind": (Move("ohem", {"ohem_kept": 16, "ohem_threshold": 0.01}), Move("ce+dice")),
    "ohem_threshold": (Move(0.01, {"kind": "ohem", "ohem_kept": 16}),),
    "ohem_kept": (Move(16, {"kind": "ohem", "ohem_threshold": 0.01}),),
    "dice_weight": (Move(0.0, {"kind": "ce+dice"}), Move(0.5, {"kind": "ce+dice"})),
}


def check_options(
    case: Case, moves: Mapping[str, Sequence[Move]] | None = None, idle: Mapping[str, str] | None = None
) -> None:
    """Every option of the method is alive: another value changes the losses. Numbers are set to 0 too where valid.

    Args:
        case: the method.
        moves: by dotted name, the values to try where those that are made up here (0, half, the other words of a
            choice) will not do, or where the option matters beside certain others only. Each must change the losses.
        idle: by dotted name, the reason why an option changes no loss.

    Raises:
        AssertionError: an option changes nothing, or is of a kind for which `moves` must name a value.
    """
    moves, idle = moves or {}, idle or {}
    known = dict(_options(case.recipe().method.options))
    unknown = sorted((moves.keys() | idle.keys()) - known.keys())
    assert not unknown, f"{unknown[0]} is no option of {case.method}: remove it from `moves` or `idle`."
    recorded: dict[str, list[dict[str, float]]] = {}

    def losses_with(options: Mapping[str, Any], steps: int | None) -> list[dict[str, float]]:
        key = json.dumps([sorted(options.items()), steps])
        if key not in recorded:
            recorded[key] = _losses(case.with_options(options), f"options {len(recorded)}", steps)
        return recorded[key]

    for name, (value, own) in known.items():
        if name in idle:
            continue
        for move in moves[name] if name in moves else own or _made_up(case, name, value):
            moved = {**move.beside, name: move.value}
            # Most options show in the first steps; the whole run only where they do not.
            changed = any(losses_with(move.beside, steps) != losses_with(moved, steps) for steps in (2, None))
            beside = "".join(f", beside {n}={v}" for n, v in move.beside.items())
            assert changed, (
                f"method.{name}={move.value} gives the same losses as {value}{beside}: the option is dead, or `moves` "
                "must name a value (or options beside it) that matters, or `idle` a reason."
            )


def _options(config: Options, before: str = "") -> Iterator[tuple[str, tuple[Any, Sequence[Move]]]]:
    """Every option by dotted name: its value, and the moves that are known here."""
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, Options) and not isinstance(value, DataConfig):
            yield from _options(value, f"{before}{name}.")
        elif isinstance(config, LossConfig) and name in _LOSS:
            own = [Move(m.value, {before + k: v for k, v in m.beside.items()}) for m in _LOSS[name]]
            yield before + name, (value, own)
        else:
            yield before + name, (value, ())


def _made_up(case: Case, name: str, value: Any) -> list[Move]:
    """Other values of an option that are valid."""
    match value:
        case bool():
            candidates: list[Any] = [not value]
        case float():
            candidates = [0.0, value / 2] if value else [1.0]
        case int():
            candidates = [value // 2 if value > 1 else value + 1]
        case str():
            candidates = [word for word in get_args(_annotation(case, name)) if word != value]
        case tuple() if all(isinstance(item, float) for item in value):
            candidates = [[item / 2 for item in value]]
        case _:
            candidates = []
    valid = []
    for candidate in candidates:
        with contextlib.suppress(InputError):
            case.with_options({name: candidate}).recipe()
            valid.append(Move(candidate))
    assert valid, f"method.{name}={value}: name another value in `moves`, none can be made up."
    return valid


def _annotation(case: Case, name: str) -> Any:
    *groups, last = name.split(".")
    config = case.recipe().method.options
    for group in groups:
        config = getattr(config, group)
    return type(config).model_fields[last].annotation


def _losses(case: Case, name: str, steps: int | None) -> list[dict[str, float]]:
    """The losses of a run without val, of its first steps or of all."""
    found: list[dict[str, float]] = []

    def record(moment: Moment) -> Scalars:
        scalars = moment.go()
        found.append({name: float(value) for name, value in scalars.items() if name.startswith("loss")})
        if len(found) == steps:
            raise _Killed
        return scalars

    with contextlib.suppress(_Killed):
        _train_unseen(case, name, record, case.data())
    return found
