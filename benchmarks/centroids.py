"""How long it takes to find where classes are in all masks of a data set.

    python benchmarks/centroids.py [--maps 3000] [--height 1024] [--width 2048] [--classes 19] [--workers 2] [--json]

Writes so many label maps of round regions in different sizes, with IGNORE between them, and indexes them once, decoding
included, with nothing kept from before.
"""

import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import finish, parser, run_script, table

from semiseg.data.centroids import class_centroids
from semiseg.data.formats import MaskCode, write_mask
from semiseg.data.rows import Rows
from semiseg.data.splits import Data, DataConfig, default_palette
from semiseg.types import IGNORE

MINUTES = 2.0
"""At most, for 3,000 maps of 1024x2048 px on two cores."""
DIFFERENT = 20
"""Maps that are drawn; the others are links to them, as a file is read in the same time by whatever name."""


def write(folder: Path, maps: int, size: tuple[int, int], classes: int) -> Rows:
    rng = np.random.default_rng(0)
    y, x = np.ogrid[: size[0], : size[1]]
    for number in range(maps):
        path = folder / f"{number}.png"
        if number >= DIFFERENT:
            os.link(folder / f"{number % DIFFERENT}.png", path)
            continue
        mask = np.full(size, IGNORE, dtype=np.uint8)
        for _ in range(60):
            radius = rng.integers(8, max(9, size[0] // 3))
            inside = (y - rng.integers(size[0])) ** 2 + (x - rng.integers(size[1])) ** 2 < radius**2
            mask[inside] = rng.integers(classes)
        write_mask(path, mask, default_palette(classes))
    names = [f"{number}.png" for number in range(maps)]
    return Rows.of(folder, names, names)


def measure(maps: int, size: tuple[int, int], classes: int, workers: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        rows = write(folder, maps, size, classes)
        os.environ["SEMISEG_CACHE"] = str(folder / "cache")
        names, none = tuple(f"class_{i}" for i in range(classes)), rows[:0]
        code, config = MaskCode(classes), DataConfig(root=str(folder))
        data = Data("maps", names, default_palette(classes), code, config, rows, none, none, none, "")
        begun = time.perf_counter()
        found = class_centroids(rows, data, (size[0], size[0]), workers=workers)
        seconds = time.perf_counter() - begun
        begun = time.perf_counter()
        class_centroids(rows, data, (size[0], size[0]), workers=workers)
        again = time.perf_counter() - begun
    return {
        "maps": maps, "size": list(size), "workers": workers, "places": int(found.first[-1]),
        "seconds": seconds, "seconds_again": again, "maps_per_second": maps / seconds,
    }  # fmt: skip


def as_text(result: dict[str, Any]) -> str:
    rows = [["maps", "size", "workers", "places", "seconds", "maps/s", "seconds, from the kept index"]]
    size = "x".join(map(str, result["size"]))
    cells = [result["maps"], size, result["workers"], result["places"], f"{result['seconds']:.1f}",
             f"{result['maps_per_second']:.1f}", f"{result['seconds_again']:.2f}"]  # fmt: skip
    return f"target: 3000 maps of 1024x2048 px in {60 * MINUTES:.0f} s\n\n{table([*rows, list(map(str, cells))])}"


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    for name, value in (("maps", 3000), ("height", 1024), ("width", 2048), ("classes", 19), ("workers", 2)):
        options.add_argument(f"--{name}", type=int, default=value)
    given = options.parse_args(arguments)
    result = measure(given.maps, (given.height, given.width), given.classes, given.workers)
    finish(result, as_text(result), given.json)


if __name__ == "__main__":
    run_script(main)
