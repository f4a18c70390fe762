"""A row of results.csv: what it stands for, and how it is written from a finished run. Scores are in per cent."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from common import ROOT, commit, machine

from semiseg.config import Recipe, load_recipe, parse
from semiseg.data.splits import load_data
from semiseg.engine.evaluate import load_scores
from semiseg.types import InputError

GOLDEN = ROOT / "tests" / "golden"
FREE = {
    *("train.seed", "train.threads", "train.workers", "train.save_every", "train.device", "train.log_every"),
    *("train.keep", "data.split_seed", "data.cache", "data.fold", "baseline", "seeds"),
}
"""Options that make no other experiment. Threads and device change the last bits: the row names the machine."""
PLACES = {"data.root", "network.weights"}
"""Paths, of which the last part counts: where files lie differs between machines."""

Row = dict[str, str]


def name_of(path: Path) -> str:
    """What a recipe is called in the ledger: its path below recipes/ without suffix."""
    place, below = path.resolve().with_suffix(""), ROOT / "recipes"
    return place.relative_to(below).as_posix() if place.is_relative_to(below) else place.name


def flat_options(recipe: Recipe) -> dict[str, Any]:
    """All options by `section.key`, without those that are free."""

    def flat(value: Any, name: str) -> dict[str, Any]:
        if isinstance(value, dict) and value:
            return {k: v for key, inner in value.items() for k, v in flat(inner, f"{name}.{key}".lstrip(".")).items()}
        return {name: Path(value).name if name in PLACES else value}

    return {name: value for name, value in flat(recipe.dump(), "").items() if name not in FREE}


def digest(options: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:12]


def method_hash(name: str) -> str:
    """Of the text of the method's golden losses, which change whenever the method does.

    Raises:
        InputError: there is no such text.
    """
    path = GOLDEN / f"{name}.txt"
    if not path.is_file():
        raise InputError(f"{path} is missing: write the golden losses of {name} first, rows are known by them.")
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


@dataclass(frozen=True)
class Job:
    """One recipe with one seed, which is that of the run and that of the draw of the labels, and other options."""

    path: Path
    seed: int
    runs: Path
    recipe: Recipe
    method_hash: str
    options: tuple[str, ...]

    @classmethod
    def of(cls, path: Path, seed: int, runs: Path, texts: Sequence[str] = ()) -> "Job":
        options = (*cls.overrides(seed), *texts)
        recipe = load_recipe(path, options)
        return cls(path, seed, runs, recipe, method_hash(recipe.method.name), options)

    @staticmethod
    def overrides(seed: int) -> list[str]:
        return [f"train.seed={seed}", f"data.split_seed={seed}"]

    @property
    def todo(self) -> str:
        """How the job stands in todo.txt."""
        return f"{self.path} --seeds {self.seed}"

    def same_experiment(self, row: Row) -> bool:
        """Whether a row's options are this job's. One that is newer than the row counts as its default then: if it
        changed the method, the golden losses tell."""
        method, own = self.recipe.method, self.recipe.dump()["method"]
        needed = {name: own[name] for name, f in type(method.options).model_fields.items() if f.is_required()}
        plain = {"data": {"root": self.recipe.data.root}, "method": {"name": method.name, **needed}}
        defaults, now = flat_options(parse(plain, "")), flat_options(self.recipe)
        then = {name: value for name, value in json.loads(row["options"]).items() if name not in FREE}
        newer = now.keys() - then.keys()
        equal = then.keys() <= now.keys() and all(now[name] == value for name, value in then.items())
        return equal and all(name in defaults and now[name] == defaults[name] for name in newer)

    def stands(self, row: Row) -> bool:
        """Whether a row is this job's result."""
        mine = (self.method_hash, str(self.seed))
        return (row["method_hash"], row["seed"]) == mine and self.same_experiment(row)

    def recipe_hash(self, rows: Sequence[Row]) -> str:
        """Of the options; that of earlier rows of the same experiment, also where an option was added since."""
        earlier = (row["recipe_hash"] for row in rows if self.same_experiment(row))
        return next(earlier, digest(flat_options(self.recipe)))

    def folder(self, rows: Sequence[Row]) -> Path:
        """Of the run."""
        return self.runs / f"{name_of(self.path).replace('/', '-')}-{self.recipe_hash(rows)[:6]}-s{self.seed}"

    def row(self, rows: Sequence[Row]) -> Row:
        """The row of the finished run.

        Raises:
            InputError: the run has no score.
        """
        r, results = self.recipe, json.loads((self.folder(rows) / "results.json").read_text(encoding="utf-8"))
        if results["split"] is None:
            raise InputError(f"{self.path}: its data has no val or test split, so a run has no score.")
        every = load_data(r.data.model_copy(update={"labelled": None}), self.path.parent)
        best = results["val_best"]
        per_class = {k: None if v is None else round(100 * v, 3) for k, v in results["per_class"].items()}
        return {
            "recipe": name_of(self.path),
            "recipe_hash": self.recipe_hash(rows),
            "method_hash": self.method_hash,
            "commit": commit(),
            "seed": str(self.seed),
            "method": r.method.name,
            "data": Path(r.data.root).name,
            "split": results["split"],
            "labelled": str(results["labelled"]),
            "masks": str(len(every.labelled)),
            "setting": _setting(r),
            "miou": f"{100 * results['miou']:.3f}",
            "val_best": f"{100 * best['miou']:.3f}" if best else "",
            "minutes": f"{results['seconds'] / 60:.2f}",
            "gb": f"{results['peak_gb']:.3f}",
            "date": datetime.now(UTC).date().isoformat(),
            "machine": machine(),
            "per_class": json.dumps(per_class, ensure_ascii=False),
            "options": json.dumps(flat_options(r), sort_keys=True),
        }


def _setting(recipe: Recipe) -> str:
    """What two recipes must share to be compared, in words: network, weights, sizes, length."""
    n, t, size = recipe.network, recipe.train, recipe.data.size
    weights = Path(n.weights).stem.removeprefix(n.encoder).strip(".")
    images = "" if size is None else f" of {size} px" if isinstance(size, int) else f" of {size[0]}x{size[1]}"
    crop = f"crop {t.crop[0]}x{t.crop[1]}{images}"
    return f"{n.name} {n.encoder} {weights}, {crop}, batch {t.batch}, {t.steps} steps, {t.precision}"


def add_subsets(row: Row, folder: Path, subsets: dict[str, str]) -> None:
    """Fills columns miou_NAME from the run's confusion matrices, one an image; empty where no image is meant."""
    file = folder / "results.npz"
    for column, prefix in ((f"miou_{name}", prefix) for name, prefix in subsets.items()):
        if not file.exists() or row.get(column):
            continue
        scores = load_scores(file)
        chosen = np.array([Path(image).name.startswith(prefix) for image in scores.names])
        if chosen.any():
            part = type(scores)(scores.confusions[chosen], scores.names, scores.classes)
            row[column] = f"{100 * part.miou:.3f}"
