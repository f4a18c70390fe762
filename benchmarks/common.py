"""What all benchmarks share: what they end with, how they print, how they make a method and start a run."""

import argparse
import csv
import io
import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from semiseg import methods
from semiseg.config import Recipe
from semiseg.data.splits import Data
from semiseg.engine import checkpoint
from semiseg.engine.predict import blend
from semiseg.files import finite, replacing, write_text
from semiseg.methods import StepMethod
from semiseg.networks.factory import Build
from semiseg.types import InputError

ROOT = Path(__file__).parents[1]
HERE = ROOT / "benchmarks"
DEFAULT = ROOT / "recipes/camvid/fixmatch-mobilenetv2-46.yaml"


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--json", action="store_true", help="print JSON")
    return result


def machine() -> str:
    """Processor, the cores this process may use, memory, and the GPU where there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    text = f"{name}, {cores} cores"
    if hasattr(os, "sysconf"):
        text += f", {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    return text + (f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "")


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide speed and scores."""
    packages = ("semiseg", "torch", "torchvision", "timm", "segmentation_models_pytorch", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def commit() -> str:
    """Of this checkout, `none` outside of one; -changed where the package differs from it."""
    try:
        head = _git("rev-parse", "--short", "HEAD")
        return head + "-changed" * bool(_git("status", "--porcelain", "--", "src"))
    except (OSError, subprocess.CalledProcessError):
        return "none"


def _git(*words: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True).stdout.strip()


def finish(result: dict[str, Any], text: str, as_json: bool) -> None:
    """Prints the result, and what it was measured on and with."""
    end = {"machine": machine(), "threads": torch.get_num_threads(), "versions": versions(), "commit": commit()}
    if as_json:
        print(json.dumps(finite(result | end), indent=2))
        return
    known = ", ".join(f"{name} {number}" for name, number in versions().items())
    print(f"{text}\n\n{end['machine']}, {end['threads']} threads; {known}; commit {end['commit']}")


def table(rows: Sequence[Sequence[str]]) -> str:
    """Markdown; the first row is the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def run_script(main: Callable[[], int | None]) -> None:
    """Calls a script's main; a user's mistake is one sentence, not a traceback."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that a run in progress is ended too
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def highest(process: int | str = "self") -> float | None:
    """Peak MB of a process so far; none where the system does not tell."""
    # Not getrusage: its peak is inherited from the process that started this one.
    status = Path("/proc", str(process), "status")
    lines = [line for line in status.read_text().splitlines() if "VmHWM" in line] if status.exists() else []
    return int(lines[0].split()[1]) * 1024 / 1e6 if lines else None


def build_method(recipe: Recipe, data: Data, device: torch.device, base: Path) -> StepMethod:
    """The recipe's method on the device, its networks from random weights: they are as fast as others."""
    build = Build(
        classes=len(data.classes),
        channels=recipe.data.channels,
        config=recipe.network.model_copy(update={"weights": "random"}),
        optim=recipe.optim,
        precision=torch.bfloat16 if recipe.train.precision == "bf16" else None,
        channels_last=recipe.train.channels_last,
        base=base,
        device=device,
        class_pixels=lambda: torch.ones(len(data.classes)),
    )
    method = methods.find(recipe.method.name, base)(recipe.method.options, build)
    if not isinstance(method, StepMethod):
        raise InputError(f"{recipe.method.name} has several stages: its steps are those of the methods it is made of.")
    return method.to(device)


def load_method(recipe: Recipe, data: Data, folder: Path) -> StepMethod:
    """The method of a run on the CPU, everything as it was after its last step, in eval mode."""
    state = checkpoint.load(folder / "checkpoints")
    if state is None:
        raise InputError(f"{folder} has no checkpoint: remove the folder and measure again.")
    method = build_method(recipe, data, torch.device("cpu"), folder)
    method.load_state_dict(state["method"])
    return method.eval()


def train(path: Path, folder: Path, overrides: Sequence[str], seconds: float | None) -> bool:
    """Runs `semiseg train` in a process of its own, so that its peak memory is its own, or goes on where it was.

    What it prints goes to FOLDER.log. Returns whether it finished within `seconds`; else it was asked to stop and wrote
    a checkpoint.

    Raises:
        InputError: the run failed.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.with_name(folder.name + ".log")
    command = [sys.executable, "-m", "semiseg", "train", str(path), "--out", str(folder), "baseline=false", *overrides]
    with log.open("a", encoding="utf-8") as out:
        # A session of its own: Ctrl-C reaches this process only, which asks once; a second signal would cut it short.
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if code:
        last = log.read_text(encoding="utf-8").strip().splitlines()[-1:]
        raise InputError(f"{path} failed, see {log}: {' '.join(last)}")
    return code == 0


def coloured(
    image: NDArray[Any] | None, label: NDArray[Any], palette: Sequence[tuple[int, int, int]]
) -> NDArray[np.uint8]:
    """Labels (H, W) in their colours, on the image (H, W, N) if it is given; IGNORE is white without it."""
    if image is not None:
        return blend(image, label.astype(np.uint8), palette)
    colours = np.full((256, 3), 255, dtype=np.uint8)
    colours[: len(palette)] = palette
    return colours[label]


def draw_panels(
    path: Path,
    panels: Sequence[tuple[str, NDArray[Any]]],
    limits: tuple[float, float],
    dots: Mapping[str, tuple[NDArray[Any], Sequence[int]]] | None = None,
) -> None:
    """Pictures side by side; those with one channel are maps with a scale over `limits`.

    dots: on the last picture, by their name in the legend: (n, 2) of x and y in px, and a colour.
    """
    figure = Figure(figsize=(3.3 * len(panels), 3.2 if dots else 2.9), layout="constrained")
    for axes, (title, pixels) in zip(np.ravel(figure.subplots(1, len(panels))), panels, strict=True):
        if pixels.ndim == 2:
            shown = axes.imshow(pixels, vmin=limits[0], vmax=limits[1], cmap="gray" if dots else "viridis")
            figure.colorbar(shown, ax=axes, shrink=0.8)
        else:
            axes.imshow(pixels)
        axes.set_title(title)
        axes.axis("off")
    if dots:
        for name, (at, colour) in dots.items():
            axes.scatter(at[:, 0], at[:, 1], s=40, color=np.array(colour) / 255, edgecolors="black", label=name)
        figure.legend(loc="outside lower center", ncols=6, fontsize="x-small")
    with replacing(path) as part:
        figure.savefig(part, dpi=110)


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; none where there is no file."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_csv(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """Replaces a CSV file at once; a column that only some rows have is empty in the others."""
    text = io.StringIO(newline="")
    columns = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
