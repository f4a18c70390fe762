"""The loop: batches in, one `method.step` each, and at their intervals the log, the evaluation and the checkpoint.

It knows no method. Everything that a step may depend on is a function of the step's number or stands in the checkpoint,
so a run that was killed ends with the same weights, bit for bit.
"""

import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn

from semiseg import parallel
from semiseg.data.loader import Steps, steps
from semiseg.data.sampling import Stream, Timetable, draws
from semiseg.data.splits import Data
from semiseg.engine import checkpoint
from semiseg.engine.evaluate import evaluate
from semiseg.engine.log import Log, peak_memory
from semiseg.engine.memory import memory_errors, smaller
from semiseg.files import replacing
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

    def lacks(self, step: int, evaluations: set[int]) -> bool:
        """Whether the evaluation that is due at `step` was interrupted."""
        return step in evaluations and (self.last is None or self.last["step"] != step)


@dataclass(frozen=True)
class Session:
    """One stage of a run in its folder."""

    folder: Path
    config: TrainConfig
    inference: InferenceConfig
    device: torch.device

    def stage(self, name: str) -> "Session":
        """A stage of its own: another folder, the same options."""
        return replace(self, folder=self.folder / name)

    @property
    def weights(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def delivered(self) -> Path:
        return self.weights / "delivered.safetensors"

    def progress(self) -> Progress:
        """What the stage's checkpoint says."""
        state = checkpoint.load(self.weights)
        return Progress(**state["progress"]) if state else Progress()

    def train(self, method: Trainable, data: Data, streams: Mapping[str, Stream] | None = None) -> nn.Module:
        """Runs the steps that are left and returns the delivered network: the best on val, or without val the last.

        Raises:
            InputError: a loss or a weight is not finite, memory or disk is full, or files cannot be read.
            Interrupted: by Ctrl-C (then it is a KeyboardInterrupt too) or SIGTERM.
        """
        c = self.config
        streams = streams or method.streams(data, c.batch, c.crop)
        timetable = _timetable(streams, c.steps * c.batch)
        total = timetable.steps
        start, progress = self._restore(method)
        evaluations = {round(total * (i + 1) / c.evaluations) for i in range(c.evaluations)} | {total}
        evaluations = evaluations - {0} if len(data.val) else set()
        if start == total and not progress.lacks(start, evaluations):
            checkpoint.load_weights(self.delivered, method.predictor())
            return method.predictor()
        kept = {share: max(1, round(total * share)) for share in c.keep}
        with Log(self.folder, total, start) as log, _Signals() as signals, memory_errors(smaller(c)):
            if start:
                log.line(f"going on at step {start} of {total}")
            began, before = time.perf_counter(), progress.seconds

            def save(done: int) -> None:
                progress.seconds = before + time.perf_counter() - began
                self._save(method, progress, done, done == total and not progress.lacks(done, evaluations))
                if signals.received is not None:
                    raise Interrupted.by(
                        signals.received,
                        f"Stopped at step {done} of {total}: the same command goes on from there.",
                    )

            if progress.lacks(start, evaluations):
                self._evaluate(method.predictor(), data, start, progress, log, signals)
                save(start)
            sums: dict[str, Tensor] = {}
            summed, images, since = 0, 0, time.perf_counter()
            bad = torch.full((), -1, dtype=torch.int64, device=self.device)
            loader = steps(Steps(streams, timetable, data, c.seed), start, c.workers, self.device.type == "cuda")
            for step, item in enumerate(loader, start):
                rate = method.schedule.rate(step / total) * timetable.at(step)[0].rate
                for optimizer in method.optimizers.values():
                    for group in optimizer.param_groups:
                        group["lr"] = group["peak_lr"] * rate
                torch.manual_seed(_seed(c.seed, step, parallel.rank()))
                batches = {name: batch.to(self.device) for name, batch in item.batches.items()}
                scalars = method.step(Clock(step, total), **batches)

                finite = torch.stack([v.isfinite() for name, v in scalars.items() if name.startswith("loss")]).all()
                bad = torch.where((bad < 0) & ~finite, step, bad)
                sums = {name: value.detach() + sums.get(name, 0) for name, value in scalars.items()}
                summed, images = summed + 1, images + sum(len(b.row) for b in batches.values())
                for path, reason in item.skipped.items():
                    if path not in progress.skipped:
                        progress.skipped[path] = reason
                        log.line(f"skipped an unlabelled image: {reason}")

                done = step + 1
                evaluating = done in evaluations
                saving = done % c.save_every == 0 or done == total or evaluating or signals.received is not None
                if done % c.log_every == 0 or saving:
                    self._check_finite("The loss is", int(bad), streams, timetable)
                    if saving and not _finite(method.parameters()):
                        self._check_finite("A weight is", step, streams, timetable)
                    values = {name: float(value) / summed for name, value in sums.items()}
                    speed = images / (time.perf_counter() - since)
                    log.row(step, {**values, "rate": rate, "images_per_second": speed})
                    log.progress(step, values, speed)
                    sums, summed, images, since = {}, 0, 0, time.perf_counter()
                if evaluating:
                    self._evaluate(method.predictor(), data, done, progress, log, signals)
                    since = time.perf_counter()
                for share in (share for share, at in kept.items() if at == done):
                    checkpoint.save_weights(self.folder / "kept" / f"{share:g}.safetensors", method.predictor())
                if saving:
                    save(done)
            log.curves()
        checkpoint.load_weights(self.delivered, method.predictor())
        return method.predictor()

    def _restore(self, method: Trainable) -> tuple[int, Progress]:
        """Puts the checkpoint's state into the method; the step to go on with, and the progress so far."""
        state = checkpoint.load(self.weights)
        if state is None:
            return 0, Progress()
        method.load_state_dict(state["method"])
        for name, optimizer in method.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        return state["step"], Progress(**state["progress"])

    def _evaluate(
        self, net: nn.Module, data: Data, done: int, progress: Progress, log: Log, signals: "_Signals"
    ) -> None:
        try:
            with signals.at_once():
                scores = evaluate(net, data.val, data, self.inference, self.device)
        except Interrupted:
            return  # the checkpoint shows that it is lacking
        progress.last = {"step": done, "miou": scores.miou}
        per_class = {f"val_{name}": value for name, value in scores.per_class.items()}
        log.row(done - 1, {"val_miou": scores.miou, **per_class})
        best = progress.best is None or scores.miou > progress.best["miou"]
        log.line(f"step {done}: val mIoU {100 * scores.miou:.2f}{' (best so far)' if best else ''}")
        if best:
            checkpoint.save_weights(self.weights / f"best-{done}.safetensors", net)
            progress.best = progress.last
        log.curves()

    def _save(self, method: Trainable, progress: Progress, done: int, deliver: bool) -> None:
        progress.peak_gb = max(progress.peak_gb, peak_memory())
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


def _timetable(streams: Mapping[str, Stream], samples: int) -> Timetable:
    for name, stream in streams.items():
        if not len(stream.rows):
            raise InputError(
                f"The method learns from {name} images too, and there is none: change data.{name} or the method."
            )
    timetables = [Timetable(stream.phases, samples) for stream in streams.values()]
    assert len({t.steps for t in timetables}) == 1, "the streams of a method have the same number of steps"
    return timetables[0]


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
