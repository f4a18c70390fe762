"""What a run tells while it goes: metrics.csv, curves.png, a live bar or plain lines; and how its files are written."""

import csv
import io
import math
import sys
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Self

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from semiseg.files import appending, replacing, write_text

PANELS = {
    "loss": "losses",
    "rate": "learning rates",
    "val": "validation",
    "queue/": "keys a class",
    "threshold/": "thresholds",
    "images_per_second": "images a second",
    "": "other",
}
"""Which panel of curves.png a metric belongs to, by how its name begins; the first that fits."""

NAMED = 24
"""Curves of a panel that a legend has room for; of more the first one alone is named, which is the mean of val's."""

BAR = 16
"""Characters of the live bar."""


class Log:
    """The record of one stage of a run, called at the log interval only.

    `folder` receives metrics.csv and curves.png; `total` is the number of steps of the stage, `start` the first step
    that will be run: rows of a previous run at or after it are removed. `active=False`, for every process
    but the first, makes all methods do nothing. Steps are counted from 0, as in `Clock`.
    """

    def __init__(self, folder: Path, total: int, start: int = 0, active: bool = True) -> None:
        self.file = folder / "metrics.csv"
        self.total, self.start, self.active = total, start, active
        self.rows: dict[int, dict[str, float]] = {}
        self.columns: dict[str, None] = {}
        self.began = time.monotonic()
        self.console = Console()
        # No thread of its own: a bar that redraws between log intervals would take time from the run.
        columns = BarColumn(BAR), TextColumn("{task.description}", markup=False)
        self.bar = Progress(*columns, console=self.console, auto_refresh=False)
        self.task = self.bar.add_task("starting", total=total, completed=start)
        self.live = active and self.console.is_interactive
        if active:
            folder.mkdir(parents=True, exist_ok=True)
            self._cut()
        if self.live:
            self.bar.start()

    def row(self, step: int, values: dict[str, float]) -> None:
        """Adds numbers to the row of `step` in metrics.csv; an unknown name becomes a new column."""
        if not self.active:
            return
        append = step not in self.rows and values.keys() <= self.columns.keys() and self.file.exists()
        self.rows.setdefault(step, {}).update(values)
        self.columns |= dict.fromkeys(values)
        if append:
            with appending(self.file) as file:
                csv.writer(file).writerow(self._cells(step))
        else:
            self._rewrite()

    def progress(self, step: int, values: dict[str, float], rate: float) -> None:
        """Shows that `step` is done: its losses, `rate` in images a second, the time left and the peak memory."""
        if not self.active:
            return
        done = step + 1
        seconds = (self.total - done) * (time.monotonic() - self.began) / (done - self.start)
        # Not what there is of every class: that is for metrics.csv.
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in values.items() if "/" not in name)
        left = timedelta(seconds=round(seconds))
        # The numbers last: a narrow terminal cuts the end.
        text = f"{done}/{self.total}  {left} left  {rate:.1f} images/s  {peak_memory():.1f} GB  {numbers}"
        if self.live:
            shown = text[: self.console.width - BAR - 2]  # a longer text would push the bar out
            self.bar.update(self.task, completed=done, description=shown, refresh=True)
        else:
            self.line(text)

    def line(self, text: str) -> None:
        """Prints one line: a remark, a warning, a score."""
        if self.active:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def curves(self) -> None:
        """Draws every column of metrics.csv over the steps into curves.png."""
        panels: dict[str, list[str]] = {}
        for name in self.columns:
            panels.setdefault(next(title for start, title in PANELS.items() if name.startswith(start)), []).append(name)
        if self.active and panels:
            _draw(self.file.with_name("curves.png"), panels, self.rows)

    def close(self) -> None:
        """Ends the live bar; the files need no closing, they are complete after every call."""
        if self.live:
            self.bar.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _cut(self) -> None:
        if not self.file.exists():
            return
        # A killed process may leave half a line, whose step would be misread as an earlier one.
        whole = self.file.read_text(encoding="utf-8").rpartition("\n")[0]
        for cells in csv.DictReader(io.StringIO(whole)):
            step = int(cells.pop("step"))
            if step < self.start:
                self.rows[step] = {name: float(cell) for name, cell in cells.items() if cell}
                self.columns |= dict.fromkeys(self.rows[step])
        self._rewrite()

    def _rewrite(self) -> None:
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(["step", *self.columns])
        writer.writerows(self._cells(step) for step in self.rows)
        write_text(self.file, text.getvalue())

    def _cells(self, step: int) -> list[str]:
        row = self.rows[step]
        return [str(step), *(f"{row[name]:.6g}" if name in row else "" for name in self.columns)]


def peak_memory() -> float:
    """The most memory that this process has used since `forget_peak`, in GB: of the GPU if it uses one, else of the
    machine. Loader processes are not counted. Windows does not tell: NaN.
    """
    if gpu := torch.cuda.max_memory_allocated():
        return gpu / 1e9
    if sys.platform == "win32":
        return math.nan
    import resource  # exists on POSIX only

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9


def forget_peak() -> None:
    """Counts peak memory from here on, for the next of several trainings; the machine's on Linux alone."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # proc_pid_clear_refs(5)


def _draw(path: Path, panels: dict[str, list[str]], rows: dict[int, dict[str, float]]) -> None:
    from matplotlib.figure import Figure  # slow to import; used without pyplot, which would look for a window system

    order = [title for title in PANELS.values() if title in panels]
    across = min(2, len(order))
    down = math.ceil(len(order) / across)
    figure = Figure(figsize=(6.4 * across, 3.6 * down), layout="constrained")
    for place, title in enumerate(order, start=1):
        axes = figure.add_subplot(down, across, place, title=title, xlabel="step")
        names = panels[title]
        named = names if len(names) <= NAMED else names[:1]
        for name in names:
            steps = [step for step, row in rows.items() if name in row]
            values = [rows[step][name] for step in steps]
            mean = _running_mean(values)
            (curve,) = axes.plot(steps[-len(mean) :], mean, label=name if name in named else None)
            axes.plot(steps, values, ".-", color=curve.get_color(), alpha=0.3, linewidth=0.7, markersize=3)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    with replacing(path) as part:
        figure.savefig(part, dpi=110)


def _running_mean(values: list[float]) -> np.ndarray:
    """Over the last fiftieth of the points, so that a noisy loss can be read; a short series stays as it is."""
    width = max(1, len(values) // 50)
    return np.convolve(values, np.full(width, 1 / width), "valid")
