"""Several processes: what they say to one another, and runs by torchrun. `testing.check_processes` has the methods."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from semiseg import api, testing

PROCESSES = textwrap.dedent("""
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
    parallel.BUCKET = 64
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
    parallel.average_statistics(nn.Sequential(norm).modules())
    assert norm.running_mean.tolist() == [0.5] * 3 and norm.running_var.tolist() == [1.0] * 3
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
    finish(launch("train", recipe, "--out", folder / "stopped"))
    whole, stopped = (load_file(folder / name / "model" / "model.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)

    scores = api.evaluate(folder / "whole", split="val")
    assert f"mIoU {100 * scores.miou:.2f} on 3 images" in finish(launch("evaluate", folder / "whole", "--split", "val"))
    said = finish(launch("predict", folder / "whole", folder / "data/images/val", "--out", folder / "two"))
    assert said.count("3 masks written") == 1
    api.predict(folder / "whole", [folder / "data/images/val"], folder / "one")
    names = sorted(path.name for path in (folder / "one").iterdir())
    assert names == sorted(path.name for path in (folder / "two").iterdir())
    assert len(names) == 3
    assert all((folder / "one" / n).read_bytes() == (folder / "two" / n).read_bytes() for n in names)


@pytest.mark.parametrize(("batch", "sentence"), [(1, "train.batch=2"), (4, "mixed in one process: take train.batch=6")])
def test_a_batch_that_two_processes_cannot_divide(recipe: Path, batch: int, sentence: str) -> None:
    out = recipe.parent / f"batch {batch}"
    said = finish(launch("train", recipe, "--out", out, f"train.batch={batch}"), code=1)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert any(f"train.batch: {batch} images cannot be divided among 2 processes" in line for line in errors)
    assert sentence in errors[0]
    assert not out.exists() or not any(out.iterdir())
