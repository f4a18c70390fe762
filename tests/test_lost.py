"""A process that is lost, fails or never comes ends the others in time with one sentence; the run can go on."""

import os
import signal
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml
from together import Together, die

from semiseg import cli, parallel, testing, watch
from semiseg.engine import evaluate
from semiseg.engine.log import Log
from semiseg.engine.predict import Predictor
from semiseg.types import InputError


def sentences(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("error: ")]


PLACES = {
    "training": (parallel, "average"),
    "evaluation": (evaluate, "probabilities"),
    "labelling": (Predictor, "__call__"),
}


def train(recipe: Path, out: Path, mortal: int = -1, place: str = "evaluation", call: int = 0) -> None:
    """`semiseg train` without curves, in which process `mortal` is killed at a call of a place."""
    # Processes that read images inherit their parent's connections.
    workers = int(place == "training")
    sys.argv = ["semiseg", "train", str(recipe), "--out", str(out), f"train.workers={workers}"]
    owner, name = PLACES[place]
    before, calls = getattr(owner, name), iter(range(call))

    def then(*arguments: object) -> object:
        if parallel.rank() == mortal and next(calls, None) is None:
            die()
        return before(*arguments)

    with mock.patch.object(Log, "curves"), mock.patch.object(owner, name, then):
        cli.main()


def test_killed_in_training_evaluation_and_labelling(tmp_path: Path) -> None:
    """The other process says so, and the same command goes on, to the same weights bit for bit."""
    testing.write_data(tmp_path / "data", val=4)
    recipe = tmp_path / "recipe.yaml"
    options = {"least_pixels": 8}
    plain = testing.Case("selftraining", tmp_path, options).recipe(steps=6, batch=4).dump()
    recipe.write_text(yaml.safe_dump(plain), encoding="utf-8")
    Together(tmp_path / "1", 2, train, recipe, tmp_path / "whole").good()
    for mortal, place, call in ((1, "training", 2), (0, "evaluation", 1), (1, "labelling", 2)):
        began = time.monotonic()
        codes, said = Together(tmp_path / place, 2, train, recipe, tmp_path / "killed", mortal, place, call).wait()
        assert time.monotonic() - began < 20
        other = 1 - mortal
        assert (codes[mortal], codes[other]) == (-signal.SIGKILL, 1), said
        (sentence,) = sentences(said[other])
        assert f"process {mortal} of 2 (pid " in sentence, said
        assert "broke off its connection: it was killed" in sentence
        assert "give the same command again" in sentence
        assert "Traceback" not in said[other]
        assert not (tmp_path / "killed" / "results.json").exists()
    Together(tmp_path / "2", 2, train, recipe, tmp_path / "killed").good()
    whole, killed = (testing.Result({}, tmp_path / name).checkpoints() for name in ("whole", "killed"))
    assert testing._different(whole, killed) == ""
    assert any("student" in name for name in whole)


def meet() -> None:
    try:
        parallel.start(torch.device("cpu"))
    except InputError as error:
        print(f"error: {error}", flush=True)
        sys.exit(1)


@pytest.mark.parametrize(
    ("world", "ranks", "words"),
    [
        (2, (0,), "process 1 of 2 did not come within 1 s"),
        (4, (0, 2), "processes 1, 3 of 4 did not come within 1 s"),
        (2, (1,), "process 1 of 2 cannot reach process 0 at 127.0.0.1, port "),
    ],
)
def test_one_never_starts(tmp_path: Path, world: int, ranks: tuple[int, ...], words: str) -> None:
    codes, said = Together(tmp_path, world, meet, ranks=ranks, patience=1).wait(20)
    assert codes == [1] * len(ranks), said
    for text in said:
        (sentence,) = sentences(text)
        assert words in sentence
        assert "see what" in sentence


def busy_then_stopped() -> None:
    """Process 1 works for much longer than the patience, and is then stopped like a machine that hangs."""
    with parallel.peers():
        parallel.start(torch.device("cpu"))
        if parallel.rank() == 1:
            time.sleep(2.5)
        parallel.wait()
        print("together", flush=True)
        if parallel.rank() == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        parallel.wait()


def test_one_that_works_is_not_lost_and_one_that_hangs_is(tmp_path: Path) -> None:
    both = Together(tmp_path, 2, busy_then_stopped, patience=1)
    both.processes[0].join(20)
    assert both.processes[0].exitcode == 1
    os.kill(both.processes[1].pid or 0, signal.SIGCONT)  # it comes too late
    codes, said = both.wait(20)
    assert codes == [1, 1], said
    assert said[0].startswith("together\nerror: process 1 of 2 (pid "), said
    assert "has been silent for 1 s" in said[0]
    assert said[1].startswith("together\nerror: in process 1: process 1 of 2 (pid "), said  # what 0 said of it


def busy_while_one_dies() -> None:
    with parallel.peers():
        parallel.start(torch.device("cpu"))
        parallel.wait()
        if parallel.rank() == 2:
            die()
        time.sleep(30)


def test_all_are_told_wherever_they_are(tmp_path: Path) -> None:
    """Also those without a connection to the lost one, and outside of any collective."""
    began = time.monotonic()
    codes, said = Together(tmp_path, 3, busy_while_one_dies).wait()
    assert codes == [1, 1, -signal.SIGKILL], said
    assert time.monotonic() - began < 15
    for text in said[:2]:
        assert len(sentences(text)) == 1
        assert "process 2 of 3 (pid " in sentences(text)[0]


def one_fails(at_work: bool) -> None:
    """A process ends with an error of its own, while another waits for it or is at work."""
    watch.GRACE = 0.5
    try:
        with parallel.peers():
            parallel.start(torch.device("cpu"))
            parallel.wait()
            if parallel.rank() == 1:
                raise InputError("the disk is full.")
            if at_work:
                time.sleep(30)
            parallel.wait()
    except InputError as error:
        print(f"error: {error}", flush=True)
        sys.exit(1)


@pytest.mark.parametrize("at_work", [False, True])
def test_one_fails(tmp_path: Path, at_work: bool) -> None:
    codes, said = Together(tmp_path, 2, one_fails, at_work).wait(20)
    assert codes == [1, 1], said
    assert sentences(said[0]) == ["error: process 1 of 2 ended: see what it said."]
    assert sentences(said[1]) == ["error: the disk is full."]


def all_fail() -> None:
    """Each by itself: none is hurried while it cleans up."""
    watch.GRACE = 0.2
    try:
        with parallel.peers():
            parallel.start(torch.device("cpu"))
            raise InputError(f"my own, {parallel.rank()}.")
    except InputError as error:
        time.sleep(1)
        print(f"error: {error}", flush=True)
        sys.exit(1)


def test_all_fail(tmp_path: Path) -> None:
    codes, said = Together(tmp_path, 3, all_fail).wait(20)
    assert codes == [1, 1, 1]
    assert [sentences(text) for text in said] == [[f"error: my own, {rank}."] for rank in range(3)]


def none_can_talk() -> None:
    parallel.GRACE = 1.0
    try:
        with parallel.peers():
            parallel.start(torch.device("cpu"))
            parallel.wait()
            raise RuntimeError("NCCL error: out of memory\nand where it was")
    except InputError as error:
        print(f"error: {error}", flush=True)
        sys.exit(1)


def test_a_connection_that_fails_is_named(tmp_path: Path) -> None:
    """By the process that gives up first; the other one may hear of that before it has waited as long."""
    codes, said = Together(tmp_path, 2, none_can_talk).wait(20)
    assert codes == [1, 1], said
    named = ["error: the processes cannot talk to each other, and none has ended (NCCL error: out of memory)."]
    first, second = [sentences(text) for text in said]
    assert first == named or second == named, said
    assert first in (named, ["error: process 1 of 2 ended: see what it said."])
    assert second in (named, ["error: process 0 of 2 ended: see what it said."])


@pytest.mark.parametrize("text", ["soon", "0", "-3", "inf", "nan"])
def test_patience_is_a_number_of_seconds(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEMISEG_PATIENCE", text)
    with pytest.raises(InputError, match=f"SEMISEG_PATIENCE={text} is no number of seconds"):
        watch.patience()


@pytest.mark.parametrize("missing", ["RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_an_incomplete_launch(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(missing)
    with pytest.raises(InputError, match=r"launch them by torchrun, or set all four\.$"):
        parallel.start(torch.device("cpu"))
