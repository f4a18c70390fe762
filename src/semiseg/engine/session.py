"""The loop: batches in, one `method.step` each, and at their intervals the log, the evaluation and the checkpoint.

It knows no method. Everything that a step may depend on is a function of the step's number or stands in the checkpoint,
so a run that was killed ends with the same weights, bit for bit.
"""

import copy
import math
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from semiseg import parallel
from semiseg.data.loader import Item, Steps, steps
from semiseg.data.rows import Rows
from semiseg.data.sampling import Phase, Stream, Timetable, draws, mix_group
from semiseg.data.splits import Data
from semiseg.engine import checkpoint
from semiseg.engine.evaluate import evaluate
from semiseg.engine.log import Log, peak_memory
from semiseg.engine.memory import memory_errors, smaller
from semiseg.engine.pseudo import Report, pseudo_label
from semiseg.engine.reliability import Ranking, reliability
from semiseg.engine.schedule import power_of, scheduled
from semiseg.files import replacing, write_json
from semiseg.types import Clock, InferenceConfig, InputError, Interrupted, TrainConfig


class Schedule(Protocol):
    def rate(self, progress: float) -> float: ...


class Trainable(Protocol):
    """What the loop asks of a method (methods/base.StepMethod)."""

    optimizers: dict[str, torch.optim.Optimizer]

    @property
    def schedule(self) -> Schedule: ...
    def streams(self, data: Data, batch: int, crop: tuple[int, int]) -> dict[str, Stream]: ...
    def step(self, clock: Clock, **batches: object) -> dict[str, Tensor]: ...
    def predictor(self) -> nn.Module: ...
    def compile(self) -> None: ...
    def modules(self) -> Iterator[nn.Module]: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> object: ...


@dataclass
class Progress:
    """What a stage has to show so far; it travels in the checkpoint."""

    best: dict[str, float] | None = None
    """step and miou of the best evaluation on val."""
    last: dict[str, float] | None = None
    seconds: float = 0.0
    peak_gb: float = 0.0
    skipped: dict[str, str] = field(default_factory=dict)
    pools: dict[str, str] = field(default_factory=dict)
    """What tells the images of each stream from others (`Rows.digest`)."""

    def lacks(self, step: int, evaluations: set[int]) -> bool:
        """Whether the evaluation that is due at `step` was interrupted."""
        return step in evaluations and (self.last is None or self.last["step"] != step)


class _Scalars:
    """What the steps since the last interval returned, on the device until it is read."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, list[str], Tensor]] = []

    def add(self, step: int, scalars: Mapping[str, Tensor]) -> None:
        values = torch.stack([value.detach().float() for value in scalars.values()])
        self.steps.append((step, list(scalars), values))

    def read(self) -> tuple[int, dict[str, tuple[float, int]]]:
        """The first step with a loss that is not finite, or -1, and the sum and number of the finite values by name."""
        values = iter(torch.cat([values for _, _, values in self.steps]).tolist())
        bad, sums = -1, dict[str, tuple[float, int]]()
        for step, names, _ in self.steps:
            for name in names:
                value = next(values)
                total, count = sums[name] if name in sums else (0.0, 0)
                if math.isfinite(value):
                    total, count = total + value, count + 1
                elif name.startswith("loss") and bad < 0:
                    bad = step
                sums[name] = total, count
        self.steps.clear()
        return bad, sums


class _Waiting(Iterator[Item]):
    """Items, and the seconds that it took to get them."""

    def __init__(self, items: Iterable[Item]) -> None:
        self.items, self.seconds = iter(items), 0.0

    def __next__(self) -> Item:
        begun = time.perf_counter()
        try:
            return next(self.items)
        finally:
            self.seconds += time.perf_counter() - begun


@dataclass(frozen=True)
class _Told:
    """What a process tells the others at an interval."""

    bad: int
    sums: dict[str, tuple[float, int]]
    skipped: dict[str, str]
    signal: int | None

    @classmethod
    def by_all(cls, scalars: _Scalars, skipped: dict[str, str], signal: int | None) -> "_Told":
        """Of all processes together: the first bad step, sums, skipped files, and a signal if there was one."""
        told = parallel.gather(cls(*scalars.read(), skipped, signal))
        sums = dict[str, tuple[float, int]]()
        for name, (total, count) in ((n, s) for t in told for n, s in t.sums.items()):
            before = sums[name] if name in sums else (0.0, 0)
            sums[name] = before[0] + total, before[1] + count
        return cls(
            min((t.bad for t in told if t.bad >= 0), default=-1),
            sums,
            {path: reason for t in told for path, reason in t.skipped.items()},
            next((t.signal for t in told if t.signal is not None), None),
        )

    def means(self) -> dict[str, float]:
        """By name; without those that were finite in no step, such as an accuracy of no pixel."""
        return {name: total / count for name, (total, count) in self.sums.items() if count}


@dataclass(frozen=True)
class Session:
    """One stage of a run in its folder."""

    folder: Path
    config: TrainConfig
    inference: InferenceConfig
    device: torch.device
    name: str = field(default="", kw_only=True)
    """Of a stage of its own."""
    trained: list["Session"] = field(default_factory=list, kw_only=True)
    """The stages that were trained, or found finished, in their order; all stages of a run share the list."""
    prepared: list[Report | Ranking] = field(default_factory=list, kw_only=True)
    """Likewise, how labelling and ranking went."""
    said: list[str] = field(default_factory=list, kw_only=True)
    """Likewise, what `starts_from` has told the user."""

    def stage(self, name: str) -> "Session":
        """A stage of its own: another folder, the same options."""
        return replace(self, folder=self.folder / name, name=name)

    @property
    def weights(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def delivered(self) -> Path:
        return self.weights / "delivered.safetensors"

    def progress(self) -> Progress:
        """What the checkpoints of all stages say: the scores are the last one's."""
        stages = [stage._progress() for stage in self.trained]
        total = replace(stages[-1]) if stages else self._progress()
        for stage in stages[:-1]:
            total.seconds += stage.seconds
            total.peak_gb = max(total.peak_gb, stage.peak_gb)
            total.skipped = stage.skipped | total.skipped
        for report in self.prepared:
            total.seconds += report.seconds
            total.skipped = report.failed | total.skipped
        return total

    def stages(self) -> dict[str, dict[str, float] | None]:
        """Step and mIoU of the best evaluation on val of each stage that was trained, by its name; none without val."""
        return {stage.name: stage._progress().best for stage in self.trained if stage.name}

    def starts_from(self, lines: Iterable[str]) -> None:
        """Tells the user what this stage starts from: once, and not where it goes on, as it is no news then."""
        if parallel.rank() == 0 and not any(self.folder.rglob(checkpoint.LAST)):
            for line in lines:
                if line not in self.said:
                    _say([line])
                    self.said.append(line)

    def _progress(self) -> Progress:
        state = checkpoint.load(self.weights)
        return Progress(**state["progress"]) if state else Progress()

    def pseudo_label(
        self, net: nn.Module, rows: Rows, data: Data, inference: InferenceConfig, least: float = 0.0, top: int = 1
    ) -> Rows:
        """The rows with labels of a network as masks, written to the stage's folder; see `engine.pseudo`."""
        labelled, report = pseudo_label(net, rows, data, self.folder / "pseudo", inference, self.device, least, top)
        self.prepared.append(report)
        _say(report.remarks(least))
        return labelled

    def reliability(
        self, nets: Sequence[nn.Module], rows: Rows, data: Data, inference: InferenceConfig
    ) -> NDArray[np.float64]:
        """How much the networks, snapshots of one, agree on each row (n,), 0..1; NaN where it cannot be read.

        Kept in the stage's folder; see `engine.reliability`.
        """
        ranking = reliability(nets, rows, data, self.folder, inference, self.device)
        self.prepared.append(ranking)
        _say([ranking.remark()])
        return ranking.array()

    def kept(self, share: float, net: nn.Module) -> nn.Module:
        """A copy of the network that `train` returned, in eval mode, with its weights at a share that it was to keep.

        Raises:
            InputError: they are gone.
        """
        path = self._kept(share)
        if not path.exists():
            raise InputError(f"{path} is missing: remove {self.folder} to train that stage anew.")
        snapshot = copy.deepcopy(net).eval()
        checkpoint.load_weights(path, snapshot)
        return snapshot

    def train(
        self,
        method: Trainable,
        data: Data,
        streams: Mapping[str, Stream] | None = None,
        keep: Sequence[float] = (),
    ) -> nn.Module:
        """Runs the steps that are left and returns the delivered network: the best on val, or without val the last.

        Args:
            method: what is trained.
            data: for its streams, and val.
            streams: the method's own, where others are not given here.
            keep: shares of the run, above 0 and up to 1, whose weights are stored for `kept`; train.keep adds others.

        Raises:
            InputError: a loss or a weight is not finite, memory or disk is full, or files cannot be read.
            Interrupted: by Ctrl-C (then it is a KeyboardInterrupt too) or SIGTERM.
        """
        c = self.config
        self.trained.append(self)
        streams = scheduled(streams or method.streams(data, c.batch, c.crop), c, power_of(method.optimizers.values()))
        timetable = _timetable(streams, c.steps * c.batch)
        _check_blocks(streams, c.batch)
        total = timetable.steps
        pools = {name: stream.rows.digest() for name, stream in streams.items()}
        start, progress = self._restore(method, pools)
        evaluations = {round(total * (i + 1) / c.evaluations) for i in range(c.evaluations)} | {total}
        evaluations = evaluations - {0} if len(data.val) else set()
        if start == total and not progress.lacks(start, evaluations):
            checkpoint.load_weights(self.delivered, method.predictor())
            return method.predictor()
        self._tell_shown(streams, data)
        kept = {share: max(1, round(total * share)) for share in (*c.keep, *keep)}
        rank, world = parallel.rank(), parallel.world()
        dataset = Steps(streams, timetable, data, c.seed, rank, world)
        with (
            Log(self.folder, total, start, rank == 0) as log,
            _Signals() as signals,
            memory_errors(smaller(c)),
            _compiled(method, c.compile),
            # Closed, whatever ends the block: processes that read ignore the signal by which Python would end them.
            closing(steps(dataset, start, c.workers, self.device.type == "cuda")) as items,
        ):
            self._tell_start(log, start, total)
            began, before = time.perf_counter(), progress.seconds

            def save(done: int, received: int | None) -> None:
                progress.seconds = before + time.perf_counter() - began
                self._save(method, progress, done, done == total and not progress.lacks(done, evaluations))
                if received is not None:
                    raise Interrupted.by(
                        received, f"Stopped at step {done} of {total}: the same command goes on from there."
                    )

            if progress.lacks(start, evaluations):
                self._evaluate(method, data, start, progress, log, signals)
                save(start, next((s for s in parallel.gather(signals.received) if s is not None), None))
            statistics = parallel.running_statistics(method.modules())
            scalars = _Scalars()
            skipped: dict[str, str] = {}
            images, since = 0, time.perf_counter()
            loader = _Waiting(items)
            for step, item in enumerate(loader, start):
                clock = Clock(step, total, timetable.progress(step))
                rate = method.schedule.rate(clock.progress) * timetable.rate(step)
                for optimizer in method.optimizers.values():
                    for group in optimizer.param_groups:
                        group["lr"] = group["peak_lr"] * rate
                torch.manual_seed(_seed(c.seed, step, rank))
                batches = {name: batch.to(self.device) for name, batch in item.batches.items()}
                scalars.add(step, method.step(clock, **batches))
                parallel.average(statistics)
                skipped |= item.skipped
                images += sum(len(b.row) for b in batches.values() if b.image.shape[1])

                done = step + 1
                if done == total:
                    self._refresh(method.predictor(), streams, data, log)
                self._keep([share for share, at in kept.items() if at == done], method.predictor())
                evaluating = done in evaluations
                saving = done % c.save_every == 0 or done == total or evaluating
                # Of several processes the others learn of a signal where all are at the same step.
                stopping = signals.received is not None and world == 1
                if done % c.log_every == 0 or saving or stopping:
                    told = _Told.by_all(scalars, skipped, signals.received)
                    saving = saving or told.signal is not None
                    self._check_finite("The loss is", told.bad, streams, timetable)
                    if saving and not _finite(method.parameters()):
                        self._check_finite("A weight is", step, streams, timetable)
                    for path, reason in told.skipped.items():
                        if path not in progress.skipped:
                            progress.skipped[path] = reason
                            log.line(f"skipped an unlabelled image: {reason}")
                    values = told.means()
                    seconds = time.perf_counter() - since
                    speed = world * images / seconds
                    bare = {"rate": rate, "images_per_second": speed, "waiting": loader.seconds / seconds}
                    log.row(step, {**values, **bare})
                    log.progress(step, values, speed)
                    skipped, images, since, loader.seconds = {}, 0, time.perf_counter(), 0.0
                    if evaluating:
                        self._evaluate(method, data, done, progress, log, signals)
                        since = time.perf_counter()
                    if saving:
                        save(done, told.signal if world > 1 else signals.received)
            if not evaluations:  # else the last one has drawn them
                log.curves()
            _tell_unused(log)
        checkpoint.load_weights(self.delivered, method.predictor())
        return method.predictor()

    def _tell_start(self, log: Log, start: int, total: int) -> None:
        where = f"stage {self.name}: " if self.name else ""
        if start:
            log.line(f"{where}going on at step {start} of {total}")
        elif where:
            log.line(f"{where}{total} steps")

    def _tell_shown(self, streams: Mapping[str, Stream], data: Data) -> None:
        """Writes sampling.json: how many samples of an epoch show each class, drawn alike and around places."""
        mixtures = [stream.mixture for stream in streams.values() if stream.mixture is not None]
        parts = [part for mixture in mixtures for part in mixture.parts if part.centroids is not None]
        path = self.folder / "sampling.json"
        if not parts or parallel.rank() > 0 or path.exists():
            return
        samples = sum(part.items for part in parts)
        alike, drawn = np.sum([part.shown() for part in parts], axis=0)
        places = np.sum([part.centroids.counts for part in parts if part.centroids is not None], axis=0)
        table = {
            name: {"places": int(n), "alike": float(a), "drawn": float(d)}
            for name, n, a, d in zip(data.classes, places, alike, drawn, strict=True)
        }
        write_json(path, {"samples": samples, "classes": table})
        rarest = sorted((name for name in table if table[name]["places"]), key=lambda name: table[name]["alike"])
        told = (f"{name} {table[name]['drawn']:.1f} (else {table[name]['alike']:.1f})" for name in rarest[:3])
        _say(
            [f"with crops around places, of the {samples} of an epoch so many are of images with {', '.join(told)}"]
            if rarest
            else ["no class has a place in any image: crops are drawn anywhere"]
        )

    def _restore(self, method: Trainable, pools: dict[str, str]) -> tuple[int, Progress]:
        """Puts the checkpoint's state into the method; the step to go on with, and the progress so far."""
        state = checkpoint.load(self.weights)
        if len(set(parallel.gather(state["step"] if state else 0))) > 1:
            raise InputError(f"{self.folder} is not the same folder for all processes: put --out on a shared disk.")
        if state is None:
            parallel.same(method.state_dict().values())
            return 0, Progress(pools=pools)
        progress = Progress(**state["progress"])
        if progress.pools != pools:
            other = [name for name, pool in pools.items() if name not in progress.pools or progress.pools[name] != pool]
            raise InputError(
                f"The {' and '.join(other)} images are not those that {self.folder} has learned from: restore them, or "
                "choose another --out."
            )
        try:
            method.load_state_dict(state["method"])
            for name, optimizer in method.optimizers.items():
                optimizer.load_state_dict(state["optimizers"][name])
        except (RuntimeError, ValueError, KeyError) as error:  # such as a class that was added to the data
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"{self.folder} holds a run of another network ({reason}): if the classes or the code have changed "
                "since, choose another --out."
            ) from error
        return state["step"], progress

    def _evaluate(
        self, method: Trainable, data: Data, done: int, progress: Progress, log: Log, signals: "_Signals"
    ) -> None:
        net = method.predictor()
        if parallel.world() > 1:
            # They finish it also after a signal, as they would not stop at the same image, if they are given the time.
            self._save(method, progress, done, False)
        try:
            # Images of other sizes than crops, each a few times: not worth compiling for.
            eager = torch.compiler.set_stance("force_eager") if self.config.compile else nullcontext()
            with eager, signals.at_once() if parallel.world() == 1 else nullcontext():
                scores = evaluate(net, data.val, data, self.inference, self.device)
        except Interrupted:
            return  # the checkpoint shows that it is lacking
        progress.last = {"step": done, "miou": scores.miou}
        per_class = {f"val_{name}": value for name, value in scores.per_class.items()}
        log.row(done - 1, {"val_miou": scores.miou, **per_class})
        best = progress.best is None or scores.miou > progress.best["miou"]
        log.line(f"step {done}: val mIoU {100 * scores.miou:.2f}{' (best so far)' if best else ''}")
        if best:
            if parallel.rank() == 0:
                checkpoint.save_weights(self.weights / f"best-{done}.safetensors", net)
            progress.best = progress.last
        log.curves()

    def _keep(self, shares: Iterable[float], net: nn.Module) -> None:
        for share in shares if parallel.rank() == 0 else ():
            checkpoint.save_weights(self._kept(share), net)

    def _kept(self, share: float) -> Path:
        return self.folder / "kept" / f"{share:g}.safetensors"

    def _refresh(self, net: nn.Module, streams: Mapping[str, Stream], data: Data, log: Log) -> None:
        """Batch norm's running statistics anew, from whole crops, where those at the end of the run were small."""
        phases = next(iter(streams.values())).phases
        if len(phases) == 1 or phases[-1].crop == self.config.crop:
            return
        c, (name, stream) = self.config, next((n, s) for n, s in streams.items() if s.images)
        mixture = None if stream.mixture is None else stream.mixture.without_places()
        whole = replace(stream, phases=(Phase(c.crop, c.batch),), strong=0, mixture=mixture)
        timetable = Timetable(whole.phases, REFRESH * c.batch)
        dataset = Steps({name: whole}, timetable, data, c.seed, parallel.rank(), parallel.world())
        modes = [(module, module.training) for module in net.modules()]
        net.train()  # frozen ones stay as they are
        norms = [module for module in net.modules() if isinstance(module, _BatchNorm) and module.training]
        momenta = [norm.momentum for norm in norms]
        net.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain mean
            norm.train()
        with torch.no_grad():
            for item in steps(dataset, 0, c.workers, self.device.type == "cuda") if norms else ():
                net(item.batches[name].to(self.device).image)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, training in modes:
            module.training = training
        parallel.average(parallel.running_statistics(norms))
        if norms:
            log.line(f"batch norm's statistics are now those of {REFRESH} batches of {c.crop[0]}x{c.crop[1]} px")

    def _save(self, method: Trainable, progress: Progress, done: int, deliver: bool) -> None:
        progress.peak_gb = max(progress.peak_gb, *parallel.gather(peak_memory()))
        if parallel.rank() == 0:
            self._write(method, progress, done, deliver)
        parallel.wait()

    def _write(self, method: Trainable, progress: Progress, done: int, deliver: bool) -> None:
        if deliver:  # before the checkpoint that says so
            self._deliver(method.predictor(), progress)
        optimizers = {name: optimizer.state_dict() for name, optimizer in method.optimizers.items()}
        state = {"step": done, "method": method.state_dict(), "optimizers": optimizers, "progress": vars(progress)}
        checkpoint.save(self.weights, state)
        # Only now does the checkpoint on disk name the new one.
        for path in self.weights.glob("best-*.safetensors"):
            if progress.best is None or path.name != f"best-{int(progress.best['step'])}.safetensors":
                path.unlink()

    def _deliver(self, net: nn.Module, progress: Progress) -> None:
        if progress.best is None:
            checkpoint.save_weights(self.delivered, net)
        else:
            best = self.weights / f"best-{int(progress.best['step'])}.safetensors"
            with replacing(self.delivered) as part:
                part.write_bytes(best.read_bytes())

    def _check_finite(self, what: str, bad: int, streams: Mapping[str, Stream], timetable: Timetable) -> None:
        if bad < 0:
            return
        drawn = {name: draws(stream, timetable, name, self.config.seed, bad) for name, stream in streams.items()}
        images = ", ".join(str(streams[name].rows[int(i)].image) for name, draw in drawn.items() for i in draw.rows)
        state = checkpoint.load(self.weights)
        good = f"the last good checkpoint is of step {state['step']}" if state else "there is no checkpoint yet"
        raise InputError(f"{what} not finite at step {bad}; {good}; lower optim.lr or look at these images: {images}.")


@contextmanager
def _compiled(method: Trainable, wanted: bool) -> Iterator[None]:
    """Compiles the method's networks, at their first forward, if that is wanted.

    Raises:
        InputError: torch.compile failed in the block, as it does where there is no C++ compiler.
    """
    if wanted:
        method.compile()
    try:
        yield
    except RuntimeError as error:
        # By name: the module that holds the class takes a second to import, and nearly no run compiles.
        if not any(kind.__name__ == "TorchDynamoException" for kind in type(error).__mro__):
            raise
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(
            f"train.compile: torch cannot compile this network here ({reason[:200]}): leave it out."
        ) from error


SHARES = {"confident", "selected"}
"""What methods call the share of the unlabelled pixels that they learn from."""

REFRESH = 200
"""Batches whose mean replaces batch norm's running statistics where a run ends with small crops."""


def _timetable(streams: Mapping[str, Stream], samples: int) -> Timetable:
    for name, stream in streams.items():
        if not len(stream.rows):
            raise InputError(
                f"The method learns from {name} images too, and there is none: change data.{name} or the method."
            )
    timetables = [Timetable(stream.phases, samples) for stream in streams.values()]
    assert len({t.steps for t in timetables}) == 1, "the streams of a method have the same number of steps"
    return timetables[0]


def _check_blocks(streams: Mapping[str, Stream], own: int) -> None:
    """Every process needs its block of each batch, and mixing partners in it.

    Raises:
        InputError: a batch cannot be divided among the processes.
    """
    world = parallel.world()

    def divides(batch: int, mixes: bool) -> bool:
        return batch % world == 0 and (not mixes or batch // world % mix_group(batch) == 0)

    for stream in streams.values():
        mixes = stream.strong > 0 and not stream.labelled  # labelled images have no partners
        for batch in (phase.batch for phase in stream.phases):
            if not divides(batch, mixes):
                what = " that are mixed in one process" if mixes and batch % world == 0 else ""
                times = max(1, batch // own)  # a step with small crops may have several times the recipe's batch
                sizes = range(own, world * own * 12 + 1)
                better = next(size for size in sizes if divides(size, mixes) and divides(size * times, mixes))
                raise InputError(
                    f"train.batch: {batch} images cannot be divided among {world} processes into equal blocks"
                    f"{what}: take train.batch={better}, or launch fewer processes."
                )


def _tell_unused(log: Log) -> None:
    """Says so where no pixel of an unlabelled image was ever learned from."""
    for name in sorted(SHARES & log.columns.keys()):
        if not any(row[name] for row in log.rows.values() if name in row):
            log.line(
                f"NO unlabelled pixel was {name}: nothing was learned from the unlabelled images. Train longer, or "
                "lower the method's threshold."
            )


def _say(remarks: Iterable[str]) -> None:
    """Tells the user, once for all processes."""
    for remark in remarks if parallel.rank() == 0 else ():
        Console().print(remark, markup=False, highlight=False, soft_wrap=True)


def _finite(weights: Iterable[Tensor]) -> bool:
    """Whether all weights are finite; the device is waited for once."""
    return bool(torch.stack([weight.detach().isfinite().all() for weight in weights]).all())


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


class _Signals:
    """Remembers SIGINT and SIGTERM, so that the loop can finish its step and save; a second one acts at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.before: dict[int, Any] = {}
        self.acting = False

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._answer) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _answer(self, number: int, _: FrameType | None) -> None:
        self.received = number
        if parallel.world() > 1:
            return  # the launcher hands on what this process has been sent already
        self.__exit__()
        if self.acting:
            raise Interrupted.by(number, "stopped")

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """A block that a signal cuts short, and that is left out after one, by `Interrupted`."""
        if self.received is not None:
            raise Interrupted.by(self.received, "stopped")
        self.acting = True
        try:
            yield
        finally:
            self.acting = False
