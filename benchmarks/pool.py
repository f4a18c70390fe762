"""What a large unlabelled pool costs: start, memory and step time for 1,000 to 1,000,000 images.

    python benchmarks/pool.py [--images 1000 100000 1000000] [--kinds files tar parquet] [--size 192 256] [--steps 15]
                              [--folder DIR] [--json]

Pools are made below --folder (else the system's temporary folder) and removed again. 64 different JPEGs of --size px
are `files` by hard links, 10,000 a folder; or members of tar archives of 10,000, each with a pax header, as webdataset
writes them; or rows of Parquet files of 10,000, in row groups of 100. All full archives of a pool are one file by hard
links, and so are its Parquet files: the lists are as long as they would be, and nothing is read from a cold disk.

Each pool is measured in a fresh process, as `data.extra` beside 8 synthetic scenes, 4 of them labelled: FixMatch on
DeepLabV3+ MobileNetV2, one thread, 4 + 4 images of 96x128 px, one process that reads.

`start`: `load_data` and the search for leaks, and the first batch from the loader, which starts its process then;
without imports and the network, which do not know the pool. `first start`: the same with an empty cache folder, where
archives are gone through. Memory: how far peaks lie above those with the first of --images: `at first start` of the
training process before its first step, then of it and of the reading process after all steps, which need more than a
start does; the pool is counted in both, though forked processes share it. `step`: from batch to batch, waiting
included, median and quartiles. `read`: of one image at a random place, with its decoding.
"""

import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import build_method, finish, highest, parser, run_script, table
from PIL import Image

from semiseg.config import Recipe, parse
from semiseg.data import synthetic
from semiseg.data.cache import open_image
from semiseg.data.check import leaks
from semiseg.data.loader import Steps, steps
from semiseg.data.sampling import Timetable
from semiseg.data.splits import load_data
from semiseg.types import Clock, InputError

KINDS = ("files", "tar", "parquet")
SHARD, ROW_GROUP, PICTURES = 10_000, 100, 64
LONGEST, MOST = 10.0, 200.0
"""Seconds of a start, and MB of memory above the smallest pool, at a million images."""
READ = 200
"""Images whose reading is timed."""
WARM = 3
"""Steps before those that are timed."""


def pictures(size: tuple[int, int]) -> list[bytes]:
    """JPEGs of soft blobs in some noise: some 0.2 bytes a pixel."""
    rng, found = np.random.default_rng(0), []
    for _ in range(PICTURES):
        coarse = Image.fromarray(rng.integers(256, size=(12, 16, 3), dtype=np.uint8))
        soft = np.asarray(coarse.resize(size[::-1], Image.Resampling.BICUBIC), dtype=np.int16)
        file = io.BytesIO()
        noisy = (soft + rng.integers(-8, 9, soft.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(file, "JPEG", quality=85)
        found.append(file.getvalue())
    return found


def make_files(folder: Path, count: int, sources: Sequence[bytes]) -> None:
    (folder / ".sources").mkdir(parents=True)  # a file has 65,000 links at most, on ext4
    places = [folder / ".sources" / f"{i}.jpg" for i in range(len(sources))]
    for place, data in zip(places, sources, strict=True):
        place.write_bytes(data)
    for start in range(0, count, SHARD):
        inside = folder / f"{start // SHARD:05d}"
        inside.mkdir()
        for i in range(start, min(count, start + SHARD)):
            os.link(places[i % len(places)], inside / f"{i:09d}.jpg")


def make_tar(path: Path, count: int, sources: Sequence[bytes]) -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for i in range(count):
            info = tarfile.TarInfo(f"{i:09d}.jpg")
            info.size, info.mtime = len(sources[i % len(sources)]), 0.5
            archive.addfile(info, io.BytesIO(sources[i % len(sources)]))


def make_parquet(path: Path, count: int, sources: Sequence[bytes]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    cells = [{"bytes": sources[i % len(sources)], "path": f"{i:09d}.jpg"} for i in range(count)]
    columns = pa.table({"image": pa.array(cells)})
    parquet.write_table(columns, path, row_group_size=ROW_GROUP, use_dictionary=False)


def make(folder: Path, kind: str, count: int, size: tuple[int, int]) -> None:
    """A pool of so many images in a new folder."""
    sources = pictures(size)
    if kind == "files":
        make_files(folder, count, sources)
        return
    folder.mkdir()
    write = make_tar if kind == "tar" else make_parquet
    full, rest = divmod(count, SHARD)
    for number in range(full):
        path = folder / f"{number:05d}.{kind}"
        if number == 0:
            write(path, SHARD, sources)
        else:
            os.link(folder / f"{0:05d}.{kind}", path)
    if rest:
        write(folder / f"{full:05d}.{kind}", rest, sources)


def recipe_of(scenes: Path, pool: Path) -> Recipe:
    plain = {
        "data": {"root": str(scenes), "format": "splits", "extra": str(pool)},
        "network": {"name": "deeplabv3plus", "encoder": "mobilenetv2_100", "weights": "random"},
        "method": {"name": "fixmatch"},
        "train": {"steps": 1000, "batch": 4, "crop": [96, 128], "threads": 1, "workers": 1},
    }
    return parse(plain, "benchmarks/pool.py")


def measure(scenes: Path, pool: Path, count: int) -> dict[str, Any]:
    """What this process, a fresh one, sees of a pool; without steps (`count` 0) its start alone."""
    recipe, device = recipe_of(scenes, pool), torch.device("cpu")
    torch.set_num_threads(1)
    begun = time.perf_counter()
    data = load_data(recipe.data)
    assert not leaks(data)
    start = time.perf_counter() - begun
    method = build_method(recipe, data, device, scenes)
    streams = method.streams(data, recipe.train.batch, recipe.train.crop)
    begun = time.perf_counter()
    timetable = Timetable(streams["unlabelled"].phases, max(1, WARM + count) * recipe.train.batch)
    for stream in streams.values():
        stream.rows.digest()  # as a run does, to know its images when it goes on
    start += time.perf_counter() - begun
    seconds, begun = [], time.perf_counter()
    reader: float | None = None
    for number, item in enumerate(steps(Steps(streams, timetable, data, 0), 0, 1, False)):
        if number == 0:
            start += time.perf_counter() - begun
        if count:
            method.step(Clock(number, timetable.steps), **item.batches)
        seconds.append(time.perf_counter() - begun)
        reader = max((highest(child.pid) or 0.0 for child in active_children() if child.pid), default=reader)
    places = np.random.default_rng(1).integers(len(data.unlabelled), size=READ)
    memory = highest()
    if memory is None or reader is None:
        raise InputError("this system does not tell how much memory a process needs: run pool.py on Linux.")
    begun = time.perf_counter()
    for place in places.tolist() if count else ():
        open_image(data.unlabelled[place], 3, None, cache=False)
    return {
        "images": len(data.unlabelled), "start": start, "memory": memory, "reader": reader,
        "steps": np.diff(seconds)[WARM - 1 :].tolist(), "read": (time.perf_counter() - begun) / READ,
    }  # fmt: skip


def measured(scenes: Path, pool: Path, cache: Path, count: int) -> dict[str, Any]:
    """`measure` in a fresh process."""
    command = [sys.executable, __file__, "--measure", str(scenes), str(pool), "--steps", str(count)]
    environment = os.environ | {"SEMISEG_CACHE": str(cache)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def all_pools(
    kinds: Sequence[str], sizes: Sequence[int], pixels: tuple[int, int], count: int, place: Path | None
) -> list[dict[str, Any]]:
    """A line for each kind and size."""
    found = []
    with tempfile.TemporaryDirectory(dir=place) as top:
        scenes = Path(top, "scenes")
        synthetic.write(scenes, train=8, labelled=4, val=0, test=0, size=(96, 128))
        for kind in kinds:
            for number, size in enumerate(sizes):
                with tempfile.TemporaryDirectory(dir=top) as folder:
                    pool, cache = Path(folder, "pool"), Path(folder, "cache")
                    make(pool, kind, size, pixels)
                    first = measured(scenes, pool, cache, 0)
                    line = measured(scenes, pool, cache, count) | {"kind": kind, "pool": size}
                    line |= {"first_start": first["start"], "first_memory": first["memory"]}
                if number == 0:
                    base = line
                line["more_mb"] = line["memory"] - base["memory"]
                line["first_more_mb"] = line["first_memory"] - base["first_memory"]
                line["reader_more_mb"] = line["reader"] - base["reader"]
                found.append(line)
                print(f"{kind} {size}: measured", file=sys.stderr)
    return found


def as_text(lines: Sequence[dict[str, Any]]) -> str:
    limit = f"at 1,000,000: start <= {LONGEST:g} s, memory <= {MOST:g} MB"
    rows = [["pool", "images", "first start, s", "start, s", "MB at first start", "MB in training", "MB of the reader",
             "step, s", "read, ms"]]  # fmt: skip
    for line in lines:
        low, median, high = np.percentile(line["steps"], [25, 50, 75])
        rows.append(
            [
                line["kind"],
                f"{line['pool']:,}",
                f"{line['first_start']:.2f}",
                f"{line['start']:.2f}",
                f"{line['first_more_mb']:+.0f}",
                f"{line['more_mb']:+.0f}",
                f"{line['reader_more_mb']:+.0f}",
                f"{median:.3f} ({low:.3f}-{high:.3f})",
                f"{1000 * line['read']:.2f}",
            ]
        )
    return f"{table(rows)}\n\n{limit}"


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--images", type=int, nargs="+", default=(1000, 100_000, 1_000_000), metavar="N")
    options.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    options.add_argument("--size", type=int, nargs=2, default=(192, 256), metavar=("H", "W"), help="px of an image")
    options.add_argument("--steps", type=int, default=15, help="that are timed")
    options.add_argument("--folder", type=Path, help="where the pools are made")
    options.add_argument("--measure", type=Path, nargs=2, metavar="FOLDER", help="only measures scenes and a pool")
    given = options.parse_args(arguments)
    if given.measure:
        print(json.dumps(measure(*given.measure, given.steps)))
        return
    lines = all_pools(given.kinds, given.images, tuple(given.size), max(2, given.steps), given.folder)
    result = {"size": list(given.size), "pools": lines, "longest_start": LONGEST, "most_mb": MOST}
    finish(result, as_text(lines), given.json)


if __name__ == "__main__":
    run_script(main)
