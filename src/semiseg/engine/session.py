"""The loop: batches in, one `method.step` each, and at their intervals the log, the evaluation and the checkpoint.

It knows no method. Everything that a step may depend on is a function of the step's number or stands in the checkpoint, so a run
that was killed ends with the same weights, bit for bit.
"""

import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

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

    def progress(self) -> Progress:
        """What the stage's checkpoint says."""
        state = checkpoint.load(self.weights)
        return Progress(**state["progress"]) if state else Progress()

    def train(self, method: Trainable, data: Data, streams: Mapping[str, Stream] | None = None) -> nn.Module:
        """Runs the steps that are left and returns the delivered network: the best on val, or without val the last.

        Raises:
            InputError: a loss is not finite, memory or disk is full, or files cannot be read.
            Interrupted: by Ctrl-C or SIGTERM.
        """
        c = self.config
        streams = streams or method.streams(data, c.batch, c.crop)
        timetables = [Timetable(stream.phases, c.steps * c.batch) for stream in streams.values()]
        assert len({t.steps for t in timetables}) == 1, "the streams of a method have the same number of steps"
        timetable, total = timetables[0], timetables[0].steps
        delivered = self.weights / "delivered.safetensors"

        state = checkpoint.load(self.weights)
        start, progress = (state["step"], Progress(**state["progress"])) if state else (0, Progress())
        if state:
            method.load_state_dict(state["method"])
            for name, optimizer in method.optimizers.items():
                optimizer.load_state_dict(state["optimizers"][name])
        if start == total:
            checkpoint.load_weights(delivered, method.predictor())
            return method.predictor()

        evaluations = {round(total * (i + 1) / c.evaluations) for i in range(c.evaluations)} | {total}
        kept = {round(total * share): share for share in c.keep}
        with Log(self.folder, total, start) as log, _signals() as signals, self._memory_errors():
            if start:
                log.line(f"going on at step {start} of {total}")
            sums: dict[str, Tensor] = {}
            summed, images, since = 0, 0, time.perf_counter()
            bad = torch.full((), -1, dtype=torch.int64, device=self.device)
            loader = steps(Steps(streams, timetable, data, c.seed), start, c.workers, self.device.type == "cuda")
            began, before = time.perf_counter(), progress.seconds
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
                stop = signals[0] if signals else None
                evaluating = done in evaluations and len(data.val) > 0
                saving = done % c.save_every == 0 or done == total or evaluating or stop is not None
                if done % c.log_every == 0 or saving:
                    self._check_finite(int(bad), streams, timetable)
                    values = {name: float(value) / summed for name, value in sums.items()}
                    speed = images / (time.perf_counter() - since)
                    log.row(step, {**values, "rate": rate, "images_per_second": speed})
                    log.progress(step, values, speed)
                    sums, summed, images, since = {}, 0, 0, time.perf_counter()
                if evaluating:
                    self._evaluate(method.predictor(), data, done, progress, log)
                    since = time.perf_counter()
                if done in kept:
                    checkpoint.save_weights(self.folder / "kept" / f"{kept[done]:g}.safetensors", method.predictor())
                if saving:
                    progress.seconds = before + time.perf_counter() - began
                    progress.peak_gb = max(progress.peak_gb, peak_memory())
                    if done == total:
                        self._deliver(method.predictor(), progress, delivered)  # before the checkpoint that says so
                    optimizers = {name: optimizer.state_dict() for name, optimizer in method.optimizers.items()}
                    record = {
                        "step": done,
                        "method": method.state_dict(),
                        "optimizers": optimizers,
                        "progress": vars(progress),
                    }
                    checkpoint.save(self.weights, record)
                    self._drop_old_best(progress)
                if stop is not None and done < total:
                    raise Interrupted(
                        128 + stop,
                        f"stopped at step {done}; the checkpoint is written, the same command goes on from there",
                    )
            log.curves()
        checkpoint.load_weights(delivered, method.predictor())
        return method.predictor()

    def _evaluate(self, net: nn.Module, data: Data, done: int, progress: Progress, log: Log) -> None:
        scores = evaluate(net, data.val, data, self.inference, self.device)
        progress.last = {"step": done, "miou": scores.miou}
        per_class = {f"val_{name}": value for name, value in scores.per_class.items()}
        log.row(done - 1, {"val_miou": scores.miou, **per_class})
        best = progress.best is None or scores.miou > progress.best["miou"]
        log.line(f"step {done}: val mIoU {100 * scores.miou:.2f}{' (best so far)' if best else ''}")
        if best:
            checkpoint.save_weights(self.weights / f"best-{done}.safetensors", net)
            progress.best = progress.last
        log.curves()

    def _deliver(self, net: nn.Module, progress: Progress, delivered: Path) -> None:
        if progress.best is None:
            checkpoint.save_weights(delivered, net)
        else:
            best = self.weights / f"best-{int(progress.best['step'])}.safetensors"
            with replacing(delivered) as part:
                part.write_bytes(best.read_bytes())

    def _drop_old_best(self, progress: Progress) -> None:
        # Only now does the checkpoint on disk name the new one.
        for path in self.weights.glob("best-*.safetensors"):
            if progress.best is None or path.name != f"best-{int(progress.best['step'])}.safetensors":
                path.unlink()

    def _check_finite(self, bad: int, streams: Mapping[str, Stream], timetable: Timetable) -> None:
        if bad < 0:
            return
        drawn = {name: draws(stream, timetable, name, self.config.seed, bad) for name, stream in streams.items()}
        images = ", ".join(str(streams[name].rows[int(i)].image) for name, draw in drawn.items() for i in draw.rows)
        state = checkpoint.load(self.weights)
        good = f"the last good checkpoint is of step {state['step']}" if state else "there is no checkpoint yet"
        raise InputError(
            f"The loss is not finite at step {bad}; {good}; lower optim.lr or look at these images: {images}."
        )

    @contextmanager
    def _memory_errors(self) -> Iterator[None]:
        try:
            yield
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            text = str(error)
            refused = isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in text
            if "DataLoader worker" in text and "exited unexpectedly" in text:
                raise InputError(
                    "A process that reads images was ended by the system, mostly for lack of memory: use fewer train.workers."
                ) from error
            if not refused:
                raise
            height, width = (max(32, side * 3 // 4 // 32 * 32) for side in self.config.crop)
            batch = max(1, self.config.batch // 2)
            raise InputError(
                f"Out of memory with train.batch={self.config.batch} and train.crop={list(self.config.crop)}: "
                f"try train.batch={batch}, or train.crop=[{height},{width}]."
            ) from error


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM, so that the loop can finish its step and write a checkpoint; a second one acts at once."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def remember(number: int, _: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, before[number])

    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
