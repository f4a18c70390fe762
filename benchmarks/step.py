"""What a training step costs over its least passes: time and peak memory.

    python benchmarks/step.py [RECIPE...] [--set KEY=VALUE]... [--device cpu|cuda] [--rounds 15] [--compile] [--json]

The least passes of a method are written down in passes.LEAST, in images: forwards and backwards of its networks and
nothing else, backward from given gradients of the logits. What the ratio charges for is all the rest of a step:
transfer, photometry, targets, losses and their gradients, optimiser, teacher. Both sides run in the recipe's precision
and memory layout, with random images in its shapes, and take turns in one process; times are medians. Peak memory is
that of a fresh process for each side. No data is opened. For each recipe labelled-only stands beside its method. A last
table has the same passes in both precisions and layouts, and with --compile the recipe's own through torch.compile, in
brackets the seconds until they had run once.
"""

import json
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import wraps
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import numpy as np
import torch
from common import DEFAULT, finish, highest, parser, run_script, table
from passes import Bench, prepare

from semiseg.config import Recipe, load_recipe, override, parse
from semiseg.networks.net import SegNet
from semiseg.types import InputError

TIME, MEMORY = 1.15, 1.10
"""The most that a step may cost, in least passes."""


def take_turns(functions: dict[str, Callable[[], None]], wait: Callable[[], None], rounds: int) -> dict[str, Any]:
    """Seconds of each function, (rounds,), one call each a round and in turning order, after two calls to warm up."""
    seconds = defaultdict(list)
    for turn in range(-2, rounds):
        for name in list(functions)[:: 1 if turn % 2 else -1]:
            wait()
            begun = time.perf_counter()
            functions[name]()
            wait()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - begun)
    return {name: np.array(values) for name, values in seconds.items()}


PARTS = {
    "to_float": "photometry",
    "strong": "photometry",
    "pseudo_label": "targets and loss",
    "cutmix_box": "targets and loss",
    "mix": "targets and loss",
    "masked_cross_entropy": "targets and loss",
    "binary_cross_entropy": "targets and loss",
    "cross_entropy": "targets and loss",
    "one_hot": "targets and loss",
    "squared_difference": "targets and loss",
    "entropy": "targets and loss",
    "histogram": "targets and loss",
    "threshold": "targets and loss",
    "half_box": "targets and loss",
    "quantile": "targets and loss",
    "class_region": "targets and loss",
    "winner": "targets and loss",
    "candidates": "contrastive part",
    "at": "contrastive part",
    "class_sums": "contrastive part",
    "draw_keys": "contrastive part",
    "draw_anchors": "contrastive part",
    "contrast": "contrastive part",
    "ema_update": "teacher's update",
}
"""What the functions that a method's file imports belong to."""


def breakdown(bench: Bench, rounds: int) -> dict[str, float]:
    """Median milliseconds of the parts of a step; the losses' gradients are in `backward`."""
    method, spent, inside = bench.method, defaultdict[str, float](float), list[str]()

    def timed(function: Callable[..., Any], part: str = "") -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            if inside:  # of a part that is timed
                return function(*args, **options)
            bench.wait()
            inside.append(part)
            begun = time.perf_counter()
            result = function(*args, **options)
            bench.wait()
            inside.clear()
            spent[part or ("forward" if torch.is_grad_enabled() else "teacher's forward")] += (
                time.perf_counter() - begun
            )
            return result

        return call

    module = sys.modules[type(method).__module__]
    places: list[tuple[Any, str, str]] = [(module, name, part) for name, part in PARTS.items() if hasattr(module, name)]
    places += [(torch.Tensor, "backward", "backward")]
    if hasattr(method, "bank"):
        places += [(method.bank, name, "contrastive part") for name in ("push", "draw")]
    places += [(o, name, "optimiser") for o in method.optimizers.values() for name in ("step", "zero_grad")]
    children = {"student": "", "teacher": "", "critic": "critic's forward", "loss": "targets and loss"}
    places += [(child, "forward", children[name]) for name, child in method.named_children() if name in children]
    places += [(SegNet, name, "") for name in ("encode", "fuse", "classify")]  # of methods that call them apart
    found = []
    with ExitStack() as stack:
        for owner, name, part in places:
            stack.enter_context(mock.patch.object(owner, name, timed(getattr(owner, name), part)))
        for _ in range(rounds + 1):
            spent.clear()
            begun = time.perf_counter()
            bench.whole()
            bench.wait()
            found.append({**spent, "rest": time.perf_counter() - begun - sum(spent.values())})
    return {part: 1e3 * median(one[part] for one in found[1:]) for part in found[-1]}


def by_option(recipe: Recipe, base: Path, device: torch.device, rounds: int, compiled: bool) -> list[dict[str, Any]]:
    """The least passes in every precision and layout, and the recipe's own compiled: ms, and s until they first ran."""
    options = [(precision, last, False) for precision in ("fp32", "bf16") for last in (False, True)]
    if compiled:
        options.append((recipe.train.precision, recipe.train.channels_last, True))
    functions, first, wait = {}, {}, None
    for precision, last, compile_ in options:
        values = {"precision": precision, "channels_last": last, "compile": compile_}
        texts = [f"train.{key}={str(value).lower()}" for key, value in values.items()]
        bench = prepare(parse(override(recipe.dump(), texts), base), device, base)
        name = "compiled" if compile_ else precision + " channels_last" * last
        functions[name], wait = bench.least(), bench.wait
        begun = time.perf_counter()
        functions[name]()
        wait()
        first[name] = time.perf_counter() - begun
    assert wait is not None
    times = take_turns(functions, wait, rounds)
    return [{"option": name, "ms": 1e3 * float(np.median(t)), "first_s": first[name]} for name, t in times.items()]


def peak(recipe: Recipe, base: Path, device: torch.device, side: str) -> float | None:
    """Peak MB of three steps (`whole`) or their passes (`least`), networks included; for a fresh process."""
    import segmentation_models_pytorch  # noqa: F401  before the baseline: the code itself does not count
    import timm  # noqa: F401

    before = highest()
    bench = prepare(recipe, device, base)
    function = bench.whole if side == "whole" else bench.least()
    for _ in range(3):
        function()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    after = highest()
    return None if before is None or after is None else after - before


def peak_apart(path: Path, overrides: list[str], method: str, device: str, side: str) -> float | None:
    command = [sys.executable, __file__, str(path), "--peak", side, "--method", method, "--device", device]
    command += [f"--set={text}" for text in overrides]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"the process that measures memory failed: {done.stderr.strip()}")
    value: float | None = json.loads(done.stdout.splitlines()[-1])
    return value


def measure(
    path: Path, overrides: list[str], device: torch.device, rounds: int, memory: bool, compiled: bool
) -> list[dict[str, Any]]:
    """One line of results for labelled-only and one for the recipe's method, if that is another one."""
    recipe, base = load_recipe(path, overrides), path.parent
    torch.set_num_threads(recipe.train.threads or torch.get_num_threads())
    recipes = {"supervised": of_method(recipe, "supervised", path)} | {recipe.method.name: recipe}
    benches = {name: prepare(one, device, base) for name, one in recipes.items()}
    functions: dict[str, Callable[[], None]] = {}
    for name, bench in benches.items():
        functions |= {f"{name} whole": bench.whole, f"{name} least": bench.least()}
    times = take_turns(functions, bench.wait, rounds)
    found = []
    for name, bench in benches.items():
        whole, least = times[f"{name} whole"], times[f"{name} least"]
        options = by_option(recipes[name], base, device, max(1, rounds // 3), compiled)
        line = {
            "recipe": path.stem,
            "device": device.type,
            "method": name,
            "step_ms": 1e3 * float(np.median(whole)),
            "least_ms": 1e3 * float(np.median(least)),
            "ratio": float(np.median(whole) / np.median(least)),
            "ratio_quartiles": np.percentile(whole / least, [25, 75]).tolist(),
            "images_per_second": bench.images / float(np.median(whole)),
            "over_labelled_only": float(np.median(whole) / np.median(times["supervised whole"])),
            "options": sorted(options, key=lambda option: option["ms"]),
            "parts_ms": breakdown(bench, max(1, rounds // 3)),
        }
        if memory:
            for side in ("whole", "least"):
                line[f"{side}_mb"] = peak_apart(path, overrides, name, device.type, side)
            known = line["whole_mb"] is not None
            line["memory_ratio"] = line["whole_mb"] / line["least_mb"] if known else None
        found.append(line)
    return found


def of_method(recipe: Recipe, name: str, source: Path) -> Recipe:
    """The recipe as it is if it has that method, else with the method's defaults."""
    return recipe if recipe.method.name == name else parse(override(recipe.dump(), [f"method={name}"]), source)


def as_text(lines: list[dict[str, Any]]) -> str:
    """Three tables: what a step costs, where its time goes, and what precision, layout and compiling make of it."""
    head = ["recipe", "device", "method", "step ms", "least ms", f"ratio (<= {TIME})", "images/s", "x labelled-only",
            "fastest passes", "peak MB", "least MB", f"ratio (<= {MEMORY})"]  # fmt: skip
    rows = [head]
    for x in lines:
        low, high = x["ratio_quartiles"]
        memory = ["", "", ""]
        if x.get("memory_ratio") is not None:
            memory = [f"{x['whole_mb']:.0f}", f"{x['least_mb']:.0f}", f"{x['memory_ratio']:.3f}"]
        speed = [f"{x['step_ms']:.1f}", f"{x['least_ms']:.1f}", f"{x['ratio']:.3f} ({low:.3f}-{high:.3f})"]
        beside = [f"{x['images_per_second']:.1f}", f"{x['over_labelled_only']:.2f}"]
        best = f"{x['options'][0]['ms']:.1f} ms, {x['options'][0]['option']}"
        rows.append([x["recipe"], x["device"], x["method"], *speed, *beside, best, *memory])
    parts = list(dict.fromkeys(part for line in lines for part in line["parts_ms"]))
    costs = [["ms of a step", *parts]]
    for x in lines:
        cells = [f"{x['parts_ms'][part]:.1f}" if part in x["parts_ms"] else "" for part in parts]
        costs.append([f"{x['method']}, {x['device']}", *cells])
    names = sorted(option["option"] for option in lines[0]["options"])
    passes = [["ms of the least passes", *names]]
    for x in lines:
        found = {option["option"]: option for option in x["options"]}
        cells = [f"{found[n]['ms']:.1f}" + f" ({found[n]['first_s']:.0f} s)" * (n == "compiled") for n in names]
        passes.append([f"{x['method']}, {x['device']}", *cells])
    return f"{table(rows)}\n\n{table(costs)}\n\n{table(passes)}"


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("recipes", nargs="*", type=Path, default=[DEFAULT], metavar="RECIPE")
    options.add_argument("--device", choices=["cpu", "cuda"], help="else the CPU, and the GPU where there is one")
    options.add_argument("--rounds", type=int, default=15, help="steps that are timed")
    options.add_argument("--no-memory", action="store_true", help="leaves the fresh processes out")
    options.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as for semiseg train")
    options.add_argument("--compile", action="store_true", help="also times compiled passes, after minutes")
    options.add_argument("--peak", choices=["whole", "least"], help="only prints one side's peak MB")
    options.add_argument("--method", help="with --peak: the method")
    given = options.parse_args(arguments)
    devices = [given.device] if given.device else ["cpu", "cuda"][: 1 + torch.cuda.is_available()]
    if given.peak:
        path = given.recipes[0]
        recipe = of_method(load_recipe(path, given.set), given.method, path)
        torch.set_num_threads(recipe.train.threads or torch.get_num_threads())
        print(json.dumps(peak(recipe, path.parent, torch.device(devices[0]), given.peak)))
        return
    lines = []
    for path in given.recipes:
        for device in devices:
            lines += measure(path, given.set, torch.device(device), given.rounds, not given.no_memory, given.compile)
    finish({"steps": lines, "most": {"time": TIME, "memory": MEMORY}}, as_text(lines), given.json)


if __name__ == "__main__":
    run_script(main)
