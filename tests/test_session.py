"""The loop: what it writes, how it stops, and what it says when something is wrong."""

import csv
import errno
import itertools
import multiprocessing
import os
import resource
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch._dynamo.utils
import torch._inductor.config
from safetensors.torch import load_file
from torch import Tensor

from semiseg.data.rows import Rows
from semiseg.engine import checkpoint
from semiseg.engine.evaluate import Scores, evaluate
from semiseg.engine.log import Log
from semiseg.engine.session import Session
from semiseg.testing import Case, Moment, Result, run
from semiseg.types import InputError, Interrupted

Around = Callable[[Moment], dict[str, Tensor]]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEMISEG_CACHE", str(tmp_path / "cache"))


NET = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, channels, classes):
        super().__init__(nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, classes, 1))
"""


@pytest.fixture
def case(tmp_path: Path) -> Case:
    """Labelled-only training of 12 steps: evaluations at 6 and 12, checkpoints every third step, rows every second."""
    (tmp_path / "net.py").write_text(NET, encoding="utf-8")
    return Case("supervised", tmp_path, base=tmp_path, network={"name": "net.py:Net"})


def at(step: int, action: Callable[[], object]) -> Around:
    """Does something right after the update of a step."""

    def around(moment: Moment) -> dict[str, Tensor]:
        scalars = moment.go()
        if moment.clock.step == step:
            action()
        return scalars

    return around


def state(folder: Path) -> dict[str, Any]:
    found = checkpoint.load(folder / "checkpoints")
    assert found is not None
    return found


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def same_end(one: Result, other: Result) -> None:
    for a, b in ((one.net, other.net), (one.checkpoints(), other.checkpoints())):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


# ---- what a run leaves -------------------------------------------------------------------------------------------


def test_rows_and_files(case: Case) -> None:
    result = run(case, "run", keep=(0.5, 1.0))
    found = rows(result.folder)
    assert [int(row["step"]) for row in found] == [1, 2, 3, 5, 7, 8, 9, 11]
    assert [int(row["step"]) for row in found if row["val_miou"]] == [5, 11]
    assert [float(row["rate"]) for row in found] == pytest.approx(
        [(1 - int(row["step"]) / 12) ** 0.9 for row in found], rel=1e-5
    )
    assert {f"val_{name}" for name in ("ground", "thing", "rare")} < found[0].keys()
    assert all(0 <= float(row["waiting"]) <= 1 for row in found)
    files = {path.relative_to(result.folder).as_posix() for path in result.folder.rglob("*") if path.is_file()}
    best = int(state(result.folder)["progress"]["best"]["step"])
    assert files == {
        "metrics.csv",
        "checkpoints/last.pt",
        "checkpoints/delivered.safetensors",
        f"checkpoints/best-{best}.safetensors",
        "kept/0.5.safetensors",
        "kept/1.safetensors",
    }
    progress = state(result.folder)["progress"]
    assert progress["seconds"] > 0
    assert progress["peak_gb"] > 0
    assert progress["last"]["step"] == 12


def test_a_row_is_the_mean_of_its_steps(case: Case) -> None:
    losses: list[float] = []

    def note(moment: Moment) -> dict[str, Tensor]:
        scalars = moment.go()
        losses.append(float(scalars["loss"]))
        return scalars

    found = rows(run(case, "run", note, log_every=4, save_every=100, evaluations=1).folder)
    assert [int(row["step"]) for row in found] == [3, 7, 11]
    for row, i in zip(found, (0, 4, 8), strict=True):
        assert float(row["loss"]) == pytest.approx(np.mean(losses[i : i + 4]), rel=1e-5)


def test_rates_are_the_peaks_times_the_schedule(case: Case) -> None:
    seen: list[list[float]] = []

    def note(moment: Moment) -> dict[str, Tensor]:
        groups = moment.method.optimizers["student"].param_groups
        seen.append([group["lr"] / group["peak_lr"] for group in groups])
        return moment.go()

    run(case, "run", note)
    assert seen == [pytest.approx([(1 - step / 12) ** 0.9] * len(seen[0])) for step in range(12)]


def fake_scores(monkeypatch: pytest.MonkeyPatch, *mious: float) -> None:
    """Evaluations find these mIoUs in turn."""
    left = iter(mious)

    def fake(*_: object) -> Scores:
        share = round(1000 * next(left))
        confusion = np.array([[[share, 1000 - share], [0, 0]]])
        return Scores(confusion, ("image",), ("thing", "none"))

    monkeypatch.setattr("semiseg.engine.session.evaluate", fake)


@pytest.mark.parametrize(
    ("mious", "best"), [((0.3, 0.7, 0.5), 8), ((0.3, 0.5, 0.7), 12), ((0.7, 0.5, 0.3), 4), ((0.5, 0.5, 0.5), 4)]
)
def test_the_best_on_val_is_delivered(
    case: Case, monkeypatch: pytest.MonkeyPatch, mious: tuple[float, ...], best: int
) -> None:
    fake_scores(monkeypatch, *mious)
    at_step: dict[int, dict[str, Tensor]] = {}

    def note(moment: Moment) -> dict[str, Tensor]:
        scalars = moment.go()
        weights = moment.method.predictor().state_dict()
        at_step[moment.clock.step + 1] = {name: tensor.clone() for name, tensor in weights.items()}
        return scalars

    result = run(case, "run", note, evaluations=3)
    assert all(torch.equal(tensor, at_step[best][name]) for name, tensor in result.net.items())
    progress = state(result.folder)["progress"]
    assert progress["best"] == {"step": best, "miou": max(mious)}
    assert progress["last"] == {"step": 12, "miou": mious[-1]}
    assert [path.name for path in (result.folder / "checkpoints").glob("best-*")] == [f"best-{best}.safetensors"]
    stored = load_file(result.folder / "checkpoints" / f"best-{best}.safetensors")
    assert all(torch.equal(tensor, at_step[best][name]) for name, tensor in stored.items())


def test_without_val_the_last_is_delivered(case: Case) -> None:
    data = case.data()
    result = run(case, "run", data=replace(data, val=data.val[:0]))
    last = state(result.folder)["method"]
    assert all(torch.equal(tensor, last[f"student.{name}"]) for name, tensor in result.net.items())
    assert state(result.folder)["progress"]["best"] is None
    assert "val_miou" not in rows(result.folder)[0]


def test_a_finished_run_is_not_run_again(case: Case) -> None:
    first = run(case, "run")
    before = {path: path.stat().st_mtime_ns for path in first.folder.rglob("*") if path.is_file()}

    def fail(_: Moment) -> dict[str, Tensor]:
        raise AssertionError("a step")

    same_end(first, run(case, "run", fail))
    assert before == {path: path.stat().st_mtime_ns for path in first.folder.rglob("*") if path.is_file()}


def test_more_evaluations_than_steps(case: Case) -> None:
    found = rows(run(case, "run", steps=2, evaluations=5).folder)
    assert [row["step"] for row in found if row["val_miou"]] == ["0", "1"]


def test_what_is_kept_of_a_short_run(case: Case) -> None:
    kept = run(case, "run", steps=2, keep=(0.01, 0.02, 1.0)).folder / "kept"
    assert sorted(path.name for path in kept.iterdir()) == ["0.01.safetensors", "0.02.safetensors", "1.safetensors"]


# ---- stopped -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [0, 4, 5, 11])
def test_a_signal_writes_a_checkpoint_and_the_run_goes_on(case: Case, number: signal.Signals, step: int) -> None:
    whole = run(case, "whole")
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    with pytest.raises(Interrupted, match=f"(?i)stopped at step {step + 1}") as stopped:
        run(case, "stopped", at(step, lambda: signal.raise_signal(number)))
    assert stopped.value.code == 128 + number
    assert isinstance(stopped.value, KeyboardInterrupt) == (number == signal.SIGINT), "as scripts expect Ctrl-C"
    assert {n: signal.getsignal(n) for n in before} == before
    assert state(case.folder / "stopped")["step"] == step + 1
    same_end(whole, run(case, "stopped"))


def test_a_run_that_goes_on_has_the_same_images(case: Case) -> None:
    """Others would be drawn in another order from there on."""
    with pytest.raises(Interrupted):
        run(case, "stopped", at(4, lambda: signal.raise_signal(signal.SIGTERM)))
    data = case.data()
    with pytest.raises(InputError, match=r"^The labelled images are not those that .*stopped has learned from"):
        run(case, "stopped", data=replace(data, labelled=data.labelled[:-1]))
    run(case, "stopped", data=data)


@pytest.mark.parametrize("call", [1, 2])
def test_an_interrupted_evaluation_is_made_up_for(case: Case, call: int) -> None:
    """It is cut short, the checkpoint is written, and the next start evaluates the same weights first."""
    whole = run(case, "whole")
    calls: list[int] = []

    def interrupted(*args: Any) -> Scores:
        calls.append(len(calls))
        if len(calls) == call:
            signal.raise_signal(signal.SIGTERM)
        return evaluate(*args)

    with mock.patch("semiseg.engine.session.evaluate", interrupted), pytest.raises(Interrupted):
        run(case, "run")
    assert state(case.folder / "run")["step"] == 6 * call
    resumed = run(case, "run")
    same_end(whole, resumed)
    assert resumed.metrics() == whole.metrics()
    for key in ("best", "last"):
        assert state(resumed.folder)["progress"][key] == state(whole.folder)["progress"][key]


@pytest.fixture
def _answered() -> Iterator[None]:
    """Ctrl-C is answered as in a terminal: a shell starts what runs in its background with the signal ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_answered")
def test_a_second_interrupt_acts_at_once(case: Case) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(case, "run", at(4, twice))
    assert state(case.folder / "run")["step"] == 3
    same_end(run(case, "whole"), run(case, "run"))


def test_a_run_in_a_thread_leaves_signals_alone(case: Case) -> None:
    before = signal.getsignal(signal.SIGINT)
    during: list[object] = []
    note = at(3, lambda: during.append(signal.getsignal(signal.SIGINT)))
    thread = threading.Thread(target=run, args=(case, "run", note))
    thread.start()
    thread.join()
    assert during == [before]
    assert state(case.folder / "run")["step"] == 12


def test_metrics_are_cut_at_resume(case: Case) -> None:
    """Rows of steps that are run again, and half a line, are removed."""

    class Killed(BaseException):
        pass

    def die() -> None:
        raise Killed

    with pytest.raises(Killed):
        run(case, "run", at(8, die))
    folder = case.folder / "run"
    assert [int(row["step"]) for row in rows(folder)] == [1, 2, 3, 5, 7]
    assert state(folder)["step"] == 6
    with (folder / "metrics.csv").open("a", encoding="utf-8") as file:
        file.write("9")
    resumed = run(case, "run")
    assert resumed.metrics() == run(case, "whole").metrics()


def test_skipped_images_are_named_once(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the run was interrupted in between."""
    lines: list[str] = []
    monkeypatch.setattr(Log, "line", lambda _, text: lines.append(text))
    case = replace(case, method="fixmatch")
    data = case.data()
    bad = [row.image for row in data.unlabelled[:2]]
    for path in bad:
        path.write_bytes(b"no image")
    with pytest.raises(Interrupted):
        run(case, "run", at(5, lambda: signal.raise_signal(signal.SIGINT)), data=data)
    run(case, "run", data=data)
    named = [line for line in lines if "skipped" in line]
    assert len(named) == 2
    assert all(sum(str(path) in line for line in named) == 1 for path in bad)
    assert state(case.folder / "run")["progress"]["skipped"].keys() == {str(path) for path in bad}


# ---- what goes wrong ---------------------------------------------------------------------------------------------


def lose(step: int, name: str = "loss") -> Around:
    def around(moment: Moment) -> dict[str, Tensor]:
        scalars = moment.go()
        bad = torch.tensor(float("nan" if step % 2 else "inf"))
        return {**scalars, name: bad} if moment.clock.step == step else scalars

    return around


@pytest.mark.parametrize(("step", "good"), [(0, None), (1, None), (4, 3), (8, 6), (11, 9)])
def test_a_loss_that_is_not_finite_stops_the_run(case: Case, step: int, good: int | None) -> None:
    """It names the step, its images and the last good checkpoint, which holds no step after it."""
    images: list[str] = []

    def around(moment: Moment) -> dict[str, Tensor]:
        if moment.clock.step == step:
            images.extend(case.data().labelled[int(i)].image.as_posix() for i in moment.batches["labelled"].row)
        return lose(step)(moment)

    with pytest.raises(InputError, match=f"not finite at step {step}; ") as caught:
        run(case, "run", around, log_every=100)
    text = str(caught.value)
    assert len(images) == 4
    assert all(image in text for image in images)
    assert f"checkpoint is of step {good};" in text if good else "no checkpoint yet" in text
    found = checkpoint.load(case.folder / "run" / "checkpoints")
    assert (found["step"] if found else None) == good


def test_the_first_step_that_is_not_finite_is_named(case: Case) -> None:
    def around(moment: Moment) -> dict[str, Tensor]:
        return {"loss": torch.tensor(torch.nan)} if moment.clock.step >= 6 else moment.go()

    with pytest.raises(InputError, match="not finite at step 6; the last good checkpoint is of step 6;"):
        run(case, "run", around, log_every=100)


def test_only_losses_must_be_finite(case: Case) -> None:
    run(case, "run", lose(4, "confident"))


@pytest.mark.parametrize(("step", "good"), [(1, None), (5, 3), (11, 9)])
def test_weights_that_are_not_finite_replace_no_checkpoint(case: Case, step: int, good: int | None) -> None:
    """Although the loss, which was computed before them, is finite."""

    def around(moment: Moment) -> dict[str, Tensor]:
        scalars = moment.go()
        if moment.clock.step == step:
            list(moment.method.parameters())[-1].data[0] = torch.inf
        return scalars

    with pytest.raises(InputError, match=f"A weight is not finite at step {step}; .*images/train/"):
        run(case, "run", around, save_every=3 if good else 2, log_every=100)
    found = checkpoint.load(case.folder / "run" / "checkpoints")
    assert (found["step"] if found else None) == good


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def files_end_at(size: int, at_step: int) -> Iterator[Around]:
    """From a step on, no file of this process can grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield at(at_step, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1])))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_keeps_the_previous_checkpoint(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(case, "whole")
    with monkeypatch.context() as patch, pytest.raises(InputError, match=r"last\.pt could not be written \(No space"):
        run(case, "run", at(8, lambda: patch.setattr(torch, "save", full)))
    assert state(case.folder / "run")["step"] == 6
    same_end(whole, run(case, "run"))


@pytest.mark.parametrize("file", ["last.pt", "best-12.safetensors"])
def test_a_file_that_breaks_off_keeps_the_previous_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    """The writers of torch and safetensors fail in the middle of a file, each in its own words."""
    case = Case("supervised", tmp_path)
    scores = (0.5,) if file == "last.pt" else (0.3, 0.5)
    fake_scores(monkeypatch, *scores)
    whole = run(case, "whole", evaluations=len(scores))
    limit = (whole.folder / "checkpoints" / file).stat().st_size // 2

    fake_scores(monkeypatch, *scores)
    with files_end_at(limit, at_step=10) as around, pytest.raises(InputError, match=f"{file} could not be written"):
        run(case, "run", around, evaluations=len(scores))
    assert state(case.folder / "run")["step"] == 9
    assert not list((case.folder / "run").rglob(".*"))

    fake_scores(monkeypatch, *scores[-1:])
    same_end(whole, run(case, "run", evaluations=len(scores)))


def test_an_error_that_is_not_the_disks_stays(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(RuntimeError, match="launch failure"):
        run(case, "run")


def test_a_run_folder_that_cannot_be_written(case: Case) -> None:
    (case.folder / "run").mkdir()
    (case.folder / "run" / "checkpoints").write_text("a file where a folder should be")
    with pytest.raises(InputError, match="could not be written"):
        run(case, "run")


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("can't allocate memory: ...")]
)
def test_too_little_memory(case: Case, error: Exception) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(InputError, match=r"(?i)out of memory with train\.batch=4 .*train\.batch=2"):
        run(case, "run", at(1, fail))


def test_other_errors_are_not_hidden(case: Case) -> None:
    def fail() -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        run(case, "run", at(1, fail))


def test_a_worker_that_the_system_ends(case: Case) -> None:
    """As the kernel does where memory runs out."""

    def kill() -> None:
        for child in multiprocessing.active_children():
            child.kill()

    with pytest.raises(InputError, match=r"train\.workers"):
        run(case, "run", at(2, kill), workers=1, steps=200, save_every=200, log_every=200, evaluations=1)


def test_an_error_of_a_method_ends_what_reads(case: Case) -> None:
    """Also while its traceback is held, as Python holds that of a script, which would not end before they do."""

    def fail() -> None:
        raise TypeError("a method of one's own")

    with pytest.raises(TypeError) as held:
        run(case, "run", at(2, fail), workers=1, steps=200, save_every=200, log_every=200, evaluations=1)
    assert held.tb is not None
    assert not multiprocessing.active_children()


def test_what_taught_nothing_is_said(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(Log, "line", lambda _, text: lines.append(text))
    for threshold, told in ((1.0, 1), (0.0, 0)):
        own = replace(case, method="fixmatch", options={"threshold": threshold})
        run(own, f"threshold {threshold}", steps=2)
        assert sum("NO unlabelled pixel was confident" in line for line in lines) == told
        lines.clear()


def test_no_unlabelled_image(case: Case) -> None:
    data = case.data()
    with pytest.raises(InputError, match=r"data\.unlabelled"):
        run(replace(case, method="fixmatch"), "run", data=replace(data, unlabelled=Rows.of(data.unlabelled.root, [])))


# ---- schedules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["coarse2fine", "fine2coarse+", "alternate"])
def test_a_schedule_killed_and_continued(case: Case, schedule: str) -> None:
    options = {"schedule": schedule, "crop": [32, 32], "small_batch": 2, "steps": 16}
    whole = run(case, "whole", **options)
    seen = list[tuple[int, int, int]]()

    def kill(moment: Moment) -> dict[str, Tensor]:
        image = moment.batches["labelled"].image
        seen.append((moment.clock.step, len(image), image.shape[2]))
        if len(seen) in (4, 9):
            raise KeyboardInterrupt
        return moment.go()

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(case, "killed", kill, **options)
    resumed = run(case, "killed", **options)
    assert all(torch.equal(tensor, resumed.net[name]) for name, tensor in whole.net.items())
    assert {size for _, _, size in seen} <= {16, 32}


def test_rates_of_a_schedule_with_larger_batches(case: Case) -> None:
    """Four times the batch: AdamW has twice the rate, reached evenly."""
    factors: list[float] = []

    def note(moment: Moment) -> dict[str, Tensor]:
        group, clock = moment.method.optimizers["student"].param_groups[0], moment.clock
        factors.append(group["lr"] / group["peak_lr"] / (1 - clock.progress) ** 0.9)
        return moment.go()

    run(case, "run", note, schedule="coarse2fine+", crop=[64, 64], steps=60)
    assert factors[0] == pytest.approx(1)
    assert max(factors) == pytest.approx(2)
    assert factors[-1] == pytest.approx(1)
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(factors[: factors.index(max(factors)) + 1]))


def test_statistics_are_refreshed_where_a_run_ends_with_small_crops(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The delivered network's are the plain mean over batches of whole crops; all other weights stay."""
    options = {"schedule": "fine2coarse", "crop": [32, 32], "evaluations": 1}
    monkeypatch.setattr(Session, "_refresh", lambda *_: None)
    stale = run(case, "stale", **options)
    monkeypatch.undo()
    monkeypatch.setattr("semiseg.engine.session.REFRESH", 6)
    fresh = run(case, "fresh", **options)
    changed = {name for name, tensor in stale.net.items() if not torch.equal(tensor, fresh.net[name])}
    assert changed == {"model.1.running_mean", "model.1.running_var", "model.1.num_batches_tracked"}
    assert int(fresh.net["model.1.num_batches_tracked"]) == 6


def test_other_schedules_leave_the_statistics(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("semiseg.engine.session.REFRESH", None)  # no number of batches
    for schedule in ("baseline", "coarse2fine", "alternate"):
        run(case, schedule, schedule=schedule, crop=[32, 32], evaluations=1, steps=6)


# ---- compiled ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_run(case: Case) -> None:
    """Its losses are nearly those of a plain one, and it ends bit for bit alike where it was interrupted."""
    plain, counted = run(case, "plain"), torch._dynamo.utils.counters["stats"]
    before = counted["unique_graphs"]
    compiled = run(case, "compiled", compile=True)
    assert counted["unique_graphs"] > before
    losses = [[float(row["loss"]) for row in rows(result.folder)] for result in (plain, compiled)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    with pytest.raises(Interrupted):
        run(case, "again", at(4, lambda: os.kill(os.getpid(), signal.SIGTERM)), compile=True)
    same_end(compiled, run(case, "again", compile=True))


def test_what_cannot_be_compiled(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no_such_compiler",))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    torch._dynamo.reset()
    with pytest.raises(
        InputError, match=r"^train\.compile: torch cannot compile this network here \(.*\): leave it out"
    ):
        run(case, "run", compile=True)
