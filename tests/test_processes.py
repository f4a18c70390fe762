"""Several processes: what they say to one another, and runs by torchrun. `testing.check_processes` has the methods."""

import contextlib
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from together import Together

from semiseg import api, cli, experiment, parallel, testing
from semiseg.config import build_of, load_recipe
from semiseg.engine.evaluate import evaluate
from semiseg.engine.pseudo import pseudo_label
from semiseg.types import InferenceConfig

PROCESSES = textwrap.dedent("""
    import atexit
    from pathlib import Path

    import torch
    import torch.nn.functional as F
    from torch import nn

    from semiseg import parallel

    parallel.start(torch.device("cpu"))
    rank = parallel.rank()
    assert parallel.world() == 2
    assert parallel.gather(rank) == [0, 1]

    counts = parallel.shared_sum([torch.tensor(rank + 1), torch.tensor(0.5, dtype=torch.float64)])
    assert [c.item() for c in counts] == [3, 1.0] and [c.dtype for c in counts] == [torch.int64, torch.float64]

    # Gradients: small buckets, an earlier backward, a weight that one process reaches, and one that none does.
    parallel.BUCKET["cpu"] = 64
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(5)).to(memory_format=torch.channels_last)
    x = torch.randn(2, 4)
    weights = [w for layer in layers for w in layer.parameters()]

    def loss(rank):
        out = layers[1](F.relu(layers[0](x[rank : rank + 1])))
        if rank == 1:
            out = layers[2](out)
        return out.square().sum()

    (loss(0) + loss(1)).backward()
    layers[3](x).sum().backward()
    expected = [None if w.grad is None else w.grad.clone() for w in weights]
    for w in weights:
        w.grad = None
    layers[3](x[rank : rank + 1]).sum().backward()
    with parallel.summed_gradients(weights):
        loss(rank).backward()
    for w, grad in zip(weights, expected, strict=True):
        assert (w.grad is None) == (grad is None)
        assert grad is None or torch.allclose(w.grad, grad)
    assert expected[-1] is None and expected[4] is not None
    assert not any(w._post_accumulate_grad_hooks for w in weights)

    norm = nn.BatchNorm2d(3)
    norm.running_mean.fill_(rank)
    parallel.average(parallel.running_statistics(nn.Sequential(norm).modules()))
    assert norm.running_mean.tolist() == [0.5] * 3 and norm.running_var.tolist() == [1.0] * 3

    # Optimisers load this after the meeting. What keeps the group keeps its threads, which now and then abort the exit.
    import torch.distributed.nn.functional

    atexit._run_exitfuncs()
    threads = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    assert not any("gloo" in name for name in threads), threads
""")


def test_what_two_processes_tell_each_other() -> None:
    launched = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    launched["MASTER_PORT"] = str(testing._free_port())
    both = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESSES], env=os.environ | launched | {"RANK": str(rank)}, stderr=subprocess.PIPE
        )
        for rank in (0, 1)
    ]
    for process in both:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()


# U2PL's draws belong to a process; what they are drawn from does not. Class 2 has anchors in half of the batch only.
SPY = textwrap.dedent("""
    from dataclasses import replace
    from unittest import mock

    import torch

    from semiseg import parallel
    from semiseg.methods import U2PL, u2pl
    from semiseg.types import IGNORE


    class Spy(U2PL):
        def __init__(self, config, build):
            super().__init__(config, build)
            self.register_buffer("positive", torch.zeros(build.classes, config.width))
            self.register_buffer("told", torch.zeros(2))

        def _contrast(self, mask, taught, *rest):
            mask, label = mask.clone(), taught.label.clone()
            for labels in (mask[:4], label[:4]):
                if parallel.rank() == 0:
                    labels[labels == 2] = IGNORE
            with mock.patch.object(u2pl, "contrast", wraps=u2pl.contrast) as contrast:
                share, scalars = super()._contrast(mask, replace(taught, label=label), *rest)
            self.positive.copy_(contrast.call_args.args[1])
            used = parallel.added(share.count)
            self.told.copy_(torch.stack([parallel.added(share.total) / used, used]))
            parts = (self.bank.keys, self.bank.fill, self.bank.next)
            queues = b"".join(part.numpy().tobytes() for part in parts)
            assert len(set(parallel.gather(queues))) == 1, "every process holds the same queues"
            return share, scalars
""")
ROOM = 4096


@pytest.mark.parametrize("world", [2, 4])
def test_prototypes_and_queues_are_those_of_one_process(tmp_path: Path, world: int) -> None:
    """In one step that takes every negative; at so high a temperature an anchor's loss is ln(1 + keys)."""
    (tmp_path / "own.py").write_text(SPY, encoding="utf-8")
    options = {"warm_up": 0.5, "alpha": 60.0, "quantile": "exact", "least": 0.0, "temperature": 1e9, "width": 8}
    options |= {"push": ROOM, "queue": ROOM, "queue_first": ROOM}
    case = testing.Case("own.py:Spy", tmp_path, options, base=tmp_path)
    one = testing._three_steps(case, "one", batch=4 * world).checkpoints()
    Together(tmp_path, world, three_steps, case, "several", {"batch": 4 * world}).good()
    several = testing.Result({}, tmp_path / "several").checkpoints()

    before, after = ({name.partition(":method.")[2]: tensor for name, tensor in run.items()} for run in (one, several))
    fill = before["bank.fill"]
    assert all(0 < count < ROOM for count in fill.tolist())
    assert torch.equal(after["bank.fill"], fill)
    for old, new, count in zip(before["bank.keys"].split(ROOM), after["bank.keys"].split(ROOM), fill, strict=True):
        assert sorted(old[:count].tolist()) == sorted(new[:count].tolist())
    assert before["positive"].norm(dim=1).min() > 0
    torch.testing.assert_close(after["positive"], before["positive"], rtol=0, atol=1e-9)
    assert after["told"].tolist() == pytest.approx(before["told"].tolist(), rel=1e-6)
    assert before["told"].tolist() == pytest.approx([math.log(51), 3], rel=1e-6)


def three_steps(case: testing.Case, name: str, train: Mapping[str, Any], until: int | None = None) -> None:
    """The steps of `testing.check_processes`, or those before step `until`."""

    def around(moment: testing.Moment) -> testing.Scalars:
        if moment.clock.step == until:
            raise testing._Killed
        return testing._uneven(moment)

    with contextlib.suppress(testing._Killed):
        testing._three_steps(case, name, around, **train)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("fixmatch", {"threshold": 0.4}),
        ("advsemiseg", {"threshold": 0.499318, "semi_start": 0.0}),
        ("u2pl", {"warm_up": 0.2, "weight": 0.0}),
    ],
)
def test_a_run_goes_on_in_other_numbers_of_processes(tmp_path: Path, method: str, options: dict[str, Any]) -> None:
    """Its steps are those of one process all the way: 1, 2, 4, 2 and 1 processes take one each."""
    case = testing.Case(method, tmp_path, options)
    train = {"steps": 5, "save_every": 1, "batch": 16}
    one = testing._three_steps(case, "one", **train).checkpoints()
    case.data()
    for step, world in enumerate((1, 2, 4, 2, 1)):
        if world == 1:
            three_steps(case, "several", train, step + 1)
        else:
            Together(tmp_path, world, three_steps, case, "several", train, step + 1).good()
    several = testing.Result({}, tmp_path / "several").checkpoints()
    assert one.keys() == several.keys()
    off = {name: float((one[name].double() - several[name].double()).abs().max()) for name in one if one[name].numel()}
    assert max(off.values()) < 1e-9, max(off, key=off.__getitem__)
    rows = testing.Result({}, tmp_path / "several").metrics()["metrics.csv"]
    assert [row["step"] for row in rows] == [str(step) for step in range(5)]


def score_and_label(case: testing.Case, name: str) -> None:
    """Scores val, and labels the unlabelled images, in as many processes as there are."""
    parallel.start(torch.device("cpu"))
    folder, data = case.folder / name, case.data()
    net = build_of(case.recipe(), data, torch.device("cpu"), None).network()
    scores = evaluate(net, data.val, data, InferenceConfig(), torch.device("cpu"))
    rows, report = pseudo_label(net, data.unlabelled, data, folder, InferenceConfig(), torch.device("cpu"), least=0.4)
    told = {"confusions": scores.confusions, "confidences": np.array(report.confidences), "rows": np.array(len(rows))}
    np.savez(folder / f"told-{parallel.rank()}.npz", **told)


@pytest.mark.parametrize("world", [2, 4])
def test_scores_and_labels_are_those_of_one_process(tmp_path: Path, world: int) -> None:
    """Also where there are fewer images than processes."""
    testing.write_data(tmp_path / "data", train=11, val=3)
    case = testing.Case("supervised", tmp_path)
    score_and_label(case, "one")
    Together(tmp_path, world, score_and_label, case, "several").good()
    with np.load(tmp_path / "one" / "told-0.npz") as one:
        assert one["confusions"].shape[0] == 3
        for rank in range(world):
            with np.load(tmp_path / "several" / f"told-{rank}.npz") as told:
                assert all(np.array_equal(one[name], told[name]) for name in one.files)
    names = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.png"))
    assert len(names) == 2 * 7
    assert all((tmp_path / "one" / n).read_bytes() == (tmp_path / "several" / n).read_bytes() for n in names)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    testing.write_data(folder / "data", val=3)
    plain = testing.Case("fixmatch", folder).recipe(batch=8, threads=1, workers=1).dump()
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(plain), encoding="utf-8")
    return path


def launch(*arguments: object) -> list[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return [*torchrun, "-m", "semiseg", *map(str, arguments)]


def finish(command: Sequence[str], code: int = 0) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def verb(*arguments: object) -> None:
    sys.argv = ["semiseg", *map(str, arguments)]
    cli.main()


def test_a_run_of_two_processes(recipe: Path) -> None:
    """It prints once, scores and predicts like one process, and killed and started again it ends the same."""
    folder = recipe.parent
    said = finish(launch("train", recipe, "--out", folder / "whole"))
    assert said.count("12/12 ") == 1
    assert "on 2 processes, each on cpu" in said

    with subprocess.Popen(
        launch("train", recipe, "--out", folder / "stopped"), stdout=subprocess.PIPE, text=True
    ) as process:
        checkpoint = folder / "stopped" / "checkpoints" / "last.pt"
        ends = time.monotonic() + 120
        while not checkpoint.exists() and process.poll() is None and time.monotonic() < ends:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    assert not (folder / "stopped" / "results.json").exists(), "it was stopped before its end"
    shutil.copytree(folder / "stopped", folder / "alone")
    finish(launch("train", recipe, "--out", folder / "stopped"))
    api.train(recipe, folder / "alone")  # one process goes on with what two began
    names = ("whole", "stopped", "alone")
    whole, stopped, alone = (load_file(folder / name / "model" / "model.safetensors") for name in names)
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
    assert whole.keys() == alone.keys()

    scores, images = api.evaluate(folder / "whole", split="val"), folder / "data/images/val"
    said = Together(folder / "a", 2, verb, "evaluate", folder / "whole", "--split", "val").good()
    assert f"mIoU {100 * scores.miou:.2f} on 3 images" in said[0]
    assert not said[1]
    said = Together(folder / "b", 2, verb, "predict", folder / "whole", images, "--out", folder / "two").good()
    assert "3 masks written" in said[0]
    assert not said[1]
    api.predict(folder / "whole", [images], folder / "one")
    names = sorted(path.name for path in (folder / "one").iterdir())
    assert names == sorted(path.name for path in (folder / "two").iterdir())
    assert len(names) == 4  # three masks, and whose they are
    assert all((folder / "one" / n).read_bytes() == (folder / "two" / n).read_bytes() for n in names)


def in_a_folder_of_its_own(recipe: Path, out: Path) -> None:
    verb("train", recipe, "--out", out / str(parallel.rank()))


def test_folders_that_are_not_shared(recipe: Path, tmp_path: Path) -> None:
    """A run that begins does not train to its end before that shows."""
    codes, said = Together(tmp_path / "a", 2, in_a_folder_of_its_own, recipe, tmp_path / "out", patience=3).wait()
    assert codes == [1, 1], said
    assert "1 is not the same folder for all processes: put --out on a disk that all see." in said[1]
    assert not (tmp_path / "out" / "0" / "metrics.csv").exists()


def test_threads_at_resume(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are asked for are kept; else they are the process' share."""
    asked = load_recipe(recipe, ["train.threads=8"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(experiment, "_THREADS", 2)
    assert experiment._same(asked, asked, tmp_path) == 8
    assert experiment._same(asked, load_recipe(recipe, ["train.threads=0"]), tmp_path) == 2


def test_seeds_with_their_baselines(recipe: Path) -> None:
    """All processes take the same branches, and the first one writes and speaks."""
    out, words = recipe.parent / "seeds", ("baseline=true", "--seeds", 2, "train.steps=2", "data.labelled=3")
    said = Together(recipe.parent / "c", 2, verb, "train", recipe, "--out", out, *words).good()
    assert said[0].count("verdict: ") == 1
    assert not said[1]


@pytest.mark.parametrize(("batch", "sentence"), [(1, "train.batch=2"), (4, "mixed in one process: take train.batch=6")])
def test_a_batch_that_two_processes_cannot_divide(recipe: Path, batch: int, sentence: str) -> None:
    out = recipe.parent / f"batch {batch}"
    said = finish(launch("train", recipe, "--out", out, f"train.batch={batch}"), code=1)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert any(f"train.batch: {batch} images cannot be divided among 2 processes" in line for line in errors)
    assert sentence in errors[0]
    assert not out.exists() or not any(out.iterdir())
