"""One experiment: the trainings that a recipe asks for, and what they say together.

RUN/                  one training; or, of several, what they say together
RUN/baseline/         the labelled-only model beside a semi-supervised one
RUN/seed-0/, fold-0/  one of several trainings, each with its baseline/
RUN/final/            after folds: whichever won, trained on all masks
"""

import json
import math
import shutil
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from semiseg import methods, parallel
from semiseg.config import Recipe, build_of, load_recipe
from semiseg.data.check import leaks
from semiseg.data.splits import Data, DataConfig, load_data, located
from semiseg.engine import checkpoint
from semiseg.engine.evaluate import evaluate, joined, load_scores, save_scores
from semiseg.engine.log import forget_peak
from semiseg.engine.memory import memory_errors, smaller
from semiseg.engine.session import Session
from semiseg.engine.verdict import Trained, Verdict, judge
from semiseg.files import LOCK, alone, replacing, sweep, write_json, write_text
from semiseg.methods import Supervised
from semiseg.methods.labelled import LossConfig
from semiseg.networks.factory import NetworkConfig, code_file, find_weights
from semiseg.networks.weights import copy_model, save_model
from semiseg.types import InputError, as_text, flat
from semiseg.watch import patience

FREE = {"train.workers", "train.save_every", "train.device"}
"""Options that may change when a run goes on: the weights do not depend on them (device: on one kind of machine)."""

BASELINE = "supervised"
"""The method of the labelled-only model."""

PROBE = ".semiseg-"
"""How the name of a file begins that is written to see whether one can be."""

_THREADS = parallel.threads()
"""Asked for at once: a run may change torch's own number."""


@dataclass(frozen=True)
class _Code:
    """Where the user's own code is looked for, files of code and classes, and the run folder, which keeps a copy."""

    base: Path | None
    files: tuple[Path, ...]
    run: Path

    def check(self) -> None:
        """A file that is edited meanwhile would make the later trainings of a run others than the first.

        Raises:
            InputError: a file is not what the run began with.
        """
        for path in self.files:
            copy = self.run / path.name
            if copy.is_file() and path.is_file() and copy.read_bytes() != path.read_bytes():
                raise InputError(
                    f"{path} is not what {self.run} began with: choose another --out, or restore it from there."
                )


def run(recipe: Recipe, out: Path, base: Path | None = None) -> None:
    """Trains what the recipe asks for in the folder `out`, or goes on where it was; `base` is the recipe's folder.

    Raises:
        InputError: something that the user gave is wrong; nothing is written then.
    """
    recipe, code = _resolve(recipe, base, out)
    recipe = _for_folder(recipe, out, code)
    if _finished(out):
        print(f"{out} holds this run, finished.")
        return
    several = members(recipe)
    with _writing(out), parallel.peers(), memory_errors(smaller(recipe.train)):
        # Met first: from here on a process may take its time with the data, and one that is lost is missed.
        parallel.start(parallel.device(recipe.train.device))
        parts = several or {"": recipe}
        if recipe.seeds > 1:
            pools = dict.fromkeys(parts, _load(recipe))
        else:
            pools = {name: _load(part) for name, part in parts.items()}
        for name in several:
            for folder in (out / name, out / name / "baseline"):
                _check_scored(folder, pools[name])
        parallel.wait()  # all have looked at the folder by now: from here on process 0 may write
        torch.set_num_threads(recipe.train.threads)
        _write_recipe(recipe, out, code)
        _check_shared(out)
        for name, part in parts.items():
            if several:
                print(f"{name}:")
            beside = _has_baseline(part, pools[name])
            _train(part, pools[name], out / name, code, judged=beside and not several)
            if beside and several:
                _train(labelled_only(part), pools[name], out / name / "baseline", code)
        if several:
            _conclude(recipe, out, code)


def members(recipe: Recipe) -> dict[str, Recipe]:
    """The recipes of several trainings by their folders, for `seeds` and for folds of which none is chosen."""
    if recipe.seeds > 1:
        seeds = range(recipe.train.seed, recipe.train.seed + recipe.seeds)
        return {f"seed-{s}": _with(recipe, "train", seed=s).model_copy(update={"seeds": 1}) for s in seeds}
    if recipe.data.folds is not None and recipe.data.fold is None:
        return {f"fold-{k}": _with(recipe, "data", fold=k) for k in range(recipe.data.folds)}
    return {}


def _check_shared(out: Path) -> None:
    """Raises InputError where this process does not see what process 0 has written; a shared disk may take a while."""
    parallel.wait()
    ends = time.monotonic() + patience()
    while not (out / "recipe.yaml").exists():
        if time.monotonic() > ends:
            raise InputError(f"{out} is not the same folder for all processes: put --out on a disk that all see.")
        time.sleep(0.1)


def _check_scored(folder: Path, data: Data) -> None:
    """Raises InputError where a finished training was scored on other images than it would be now."""
    rows = data.test if len(data.test) else data.val
    if _finished(folder) and len(rows) and load_scores(folder / "results.npz").names != tuple(rows.names):
        raise InputError(
            f"{folder} was scored on other images than there are now: the data has changed since the run began, choose "
            "another --out."
        )


def _with(recipe: Recipe, section: str, **options: object) -> Recipe:
    return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=options)})


def labelled_only(recipe: Recipe) -> Recipe:
    """The same without the unlabelled images: the same labelled loss, for the same steps."""
    loss = getattr(recipe.method.options, "loss", None)
    config = Supervised.Config(loss=loss) if isinstance(loss, LossConfig) else Supervised.Config()
    method = recipe.method.model_copy(update={"name": BASELINE, "options": config})
    return recipe.model_copy(update={"method": method})


def _load(recipe: Recipe) -> Data:
    data = load_data(recipe.data)
    if problems := leaks(data):
        raise InputError(problems[0])
    return data


def _finished(folder: Path) -> bool:
    return (folder / "results.json").exists()


def _has_baseline(recipe: Recipe, data: Data) -> bool:
    """Whether the labelled-only model belongs beside it: the method is another, and something can be scored."""
    return recipe.baseline and recipe.method.name != BASELINE and len(data.val) + len(data.test) > 0


def _train(recipe: Recipe, data: Data, folder: Path, code: _Code, judged: bool = False) -> None:
    """One training in its folder, unless it is finished there.

    If it is `judged`, the labelled-only one follows in baseline/, results.json has the verdict on both, and model/ is
    that of the two that won. The method comes first, as what is wrong with it, or too large, is seen at once then.
    """
    if _finished(folder):
        return
    results, weights = _fit(recipe, data, folder, code)
    forget_peak()
    beside = folder / "baseline"
    if judged:
        print("and the labelled-only model, to see what the unlabelled images bring (baseline: false omits it)")
        _train(labelled_only(recipe), data, beside, code)
    if parallel.rank() == 0:
        verdict = (
            _verdict([(_trained(folder, results), _trained(beside))], recipe, results["split"]) if judged else None
        )
        if verdict is None or verdict.wins:
            save_model(folder / "model", weights, _card(recipe, data))
        else:
            copy_model(beside / "model", folder / "model")
            results["delivered"] = f"labelled-only, {_read(beside)['delivered']}"
        results["verdict"] = verdict and asdict(verdict)
        write_json(folder / "results.json", results)  # the last file: where it is, the training is finished
    parallel.wait()


def _fit(recipe: Recipe, data: Data, folder: Path, code: _Code) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Trains and scores: what results.json says of the method, and the weights on the CPU; writes results.npz."""
    code.check()
    _write_recipe(recipe, folder, code)
    # A method of one's own may draw as it is made: not from what a training before it in this process left.
    torch.manual_seed(recipe.train.seed)
    device = parallel.device(recipe.train.device)
    kind = methods.find(recipe.method.name, code.base)
    build = build_of(_without_weights(recipe) if _restored(kind, folder) else recipe, data, device, code.base)
    method = kind(recipe.method.options, build)
    if isinstance(method, nn.Module):
        method.to(device)
    for line in (_opening(recipe, data, device), *data.notes):
        print(line)
    session = Session(folder, recipe.train, recipe.evaluate, device)
    session.starts_from(build.report)
    net = method.fit(session, data)

    split, rows = ("test", data.test) if len(data.test) else ("val", data.val)
    results = _results(recipe, data, session, split if len(rows) else None)
    if len(rows):
        scores = evaluate(net, rows, data, recipe.evaluate, device)
        if parallel.rank() == 0:
            save_scores(folder / "results.npz", scores)
        results |= {
            "miou": scores.miou,
            "per_class": scores.per_class,
            "absent": list(scores.absent),
            "images": len(rows),
        }
    return results, {name: tensor.cpu() for name, tensor in net.state_dict().items()}


def _verdict(pairs: Sequence[tuple[Trained, Trained]], recipe: Recipe, split: str) -> Verdict | None:
    """See `engine.verdict.judge`; of several pairs the recipe says what they are.

    Raises:
        InputError: a pair was not scored on the same masks.
    """
    if not all(a.scores.of_same_masks(b.scores) for a, b in pairs):
        raise InputError(
            f"The {split} images and masks are not those of the labelled-only training: the data has changed since the "
            "run began, choose another --out."
        )
    how: Literal["one", "seeds", "folds"] = "one" if len(pairs) == 1 else "seeds" if recipe.seeds > 1 else "folds"
    return judge(pairs, recipe.method.name, split, how)


def _read(folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return results


def _trained(folder: Path, results: Mapping[str, Any] | None = None) -> Trained:
    """What a verdict is made of; val counts where it is not the split that is reported."""
    results = _read(folder) if results is None else results
    best = results["val_best"]["miou"] if results["split"] == "test" and results["val_best"] else None
    return Trained(load_scores(folder / "results.npz"), None if best is None or math.isnan(best) else best)


def _conclude(recipe: Recipe, out: Path, code: _Code) -> None:
    """What several trainings say together, and the model that is delivered."""
    folders = [out / name for name in members(recipe)]
    # Process 0 reads and decides: on a shared disk the others may not see yet what it has just written.
    verdict = _verdict_of_all(recipe, folders) if parallel.rank() == 0 else None
    wins = parallel.first(verdict is None or verdict.wins)
    data = load_data(recipe.data)
    if recipe.seeds == 1:
        winner = recipe if wins else labelled_only(recipe)
        whole = _with(winner, "data", folds=None, group=False).model_copy(update={"baseline": False})
        print(f"final: all {len(data.labelled)} masks")
        _train(whole, data, out / "final", code)
    if parallel.rank() == 0:
        _deliver(recipe, out, folders, data, verdict)
    parallel.wait()


def _verdict_of_all(recipe: Recipe, folders: Sequence[Path]) -> Verdict | None:
    if not all(_finished(folder / "baseline") for folder in folders):
        return None
    pairs = [(_trained(folder), _trained(folder / "baseline")) for folder in folders]
    return _verdict(pairs, recipe, _read(folders[0])["split"])


def _deliver(recipe: Recipe, out: Path, folders: Sequence[Path], data: Data, verdict: Verdict | None) -> None:
    """Puts the model and the results of several trainings into the run's folder."""
    wins = verdict is None or verdict.wins
    arm = folders if wins else [folder / "baseline" for folder in folders]
    chosen = _best(arm) if recipe.seeds > 1 else out / "final"
    trainings = [*folders, *(folder / "baseline" for folder in folders), chosen]
    everything = [_read(folder) for folder in dict.fromkeys(trainings) if _finished(folder)]
    results = everything[0] | {
        "family": data.family,
        "labelled": len(data.labelled),
        "unlabelled": len(data.unlabelled),
        "remarks": list(data.notes),
        "delivered": ("" if wins else "labelled-only, ") + f"{chosen.relative_to(out)}: {_read(chosen)['delivered']}",
        "val_best": None,
        "val_last": None,
        "stages": {},  # each training's are in its own results.json
        "seconds": sum(results["seconds"] for results in everything),
        "peak_gb": max(results["peak_gb"] for results in everything),
        "skipped": {path: why for results in everything for path, why in results["skipped"].items()},
        "verdict": verdict and asdict(verdict),
    }
    if results["split"] is not None:
        results |= _scores(recipe, folders, results["note"])
    copy_model(chosen / "model", out / "model")
    if recipe.seeds == 1 and results["split"] is not None:
        save_scores(out / "results.npz", joined([load_scores(folder / "results.npz") for folder in folders]))
    write_json(out / "results.json", results)


def _best(folders: Sequence[Path]) -> Path:
    """The training that is best on val; the first where there is no val, or no mask of it has a class."""
    best = [_read(folder)["val_best"] for folder in folders]
    scores = [(val["miou"] if val else None) or 0 for val in best]
    return folders[int(np.argmax(scores))]


def _scores(recipe: Recipe, folders: Sequence[Path], note: str | None) -> dict[str, Any]:
    """Means over the seeds; of folds, the images' scores together. `note`: of each training."""
    scores = [load_scores(folder / "results.npz") for folder in folders]
    if recipe.seeds > 1:
        told = f"scores are the means of {recipe.seeds} trainings" + f"; {note}" * (note is not None)
    else:
        scores = [joined(scores)]
        told = "each image is scored by a model that has not seen it; the delivered one has seen all"
    classes = np.array([list(one.per_class.values()) for one in scores])
    return {
        "note": told,
        "miou": float(np.mean([one.miou for one in scores])),
        "per_class": dict(zip(scores[0].classes, classes.mean(0).tolist(), strict=True)),
        "absent": list(scores[0].absent),
        "images": len(scores[0].names),
    }


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """The run folder is this run's alone; of several processes the first one sees to that."""
    if parallel.rank() > 0:
        yield
        return
    with alone(out), _nothing_half_written(out):
        sweep(out)
        yield


def _restored(kind: type[methods.Method], out: Path) -> bool:
    """Whether everything that the method makes at once is about to come from the run's checkpoint.

    Then it does not matter what has become of `network.weights` since. Later stages need it.
    """
    return kind.fit is methods.StepMethod.fit and (out / "checkpoints" / checkpoint.LAST).exists()


def _without_weights(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"network": recipe.network.model_copy(update={"weights": "random"})})


def _opening(recipe: Recipe, data: Data, device: torch.device) -> str:
    pools = {"labelled": data.labelled, "unlabelled": data.unlabelled, "val": data.val, "test": data.test}
    images = ", ".join(f"{len(rows)} {name}" for name, rows in pools.items())
    network = recipe.network.name if ":" in recipe.network.name else f"{recipe.network.name} {recipe.network.encoder}"
    where = f"cpu ({recipe.train.threads} thread{'s' * (recipe.train.threads > 1)})" if device.type == "cpu" else "gpu"
    if parallel.world() > 1:
        where = f"{parallel.world()} processes, each on {where}"
    return f"{recipe.method.name}, {network}, {recipe.train.steps} steps on {where}; images: {images}"


def _resolve(recipe: Recipe, base: Path | None, out: Path) -> tuple[Recipe, _Code]:
    """Relative paths made absolute, and the user's own files: code, and what options name beside weights and runs."""
    stored = out / "recipe.yaml"
    recipe = resolved(recipe, base, load_recipe(stored) if stored.exists() else None)
    options = dict(iter(recipe.method.options))  # dict() alone would call an option that is named `keys`
    networks = [value for value in (recipe.network, *options.values()) if isinstance(value, NetworkConfig)]
    places = [name.rpartition(":")[0] for name in (recipe.method.name, *(some.name for some in networks))]
    files = [code_file(place, base) for place in places if place.endswith(".py")]
    files += [value for value in options.values() if isinstance(value, Path) and value.suffix in (".yml", ".yaml")]
    return recipe, _Code(base, tuple(files), out)


def resolved(recipe: Recipe, base: Path | None, begun: Recipe | None = None) -> Recipe:
    """The recipe with its paths absolute; `begun` is what a run that goes on began with.

    Raises:
        InputError: a path names nothing.
    """
    begun, options = begun or recipe, recipe.method.options
    found = {
        name: _found(value, base, getattr(begun.method.options, name, None), f"method.{name}")
        for name, value in options
    }
    network = _found(recipe.network, base, begun.network, "network")
    method = recipe.method.model_copy(update={"options": options.model_copy(update=found)})
    changed = {"data": located(recipe.data, base), "network": network, "method": method}
    return recipe.model_copy(update=changed)


def _found(value: Any, base: Path | None, begun: Any, option: str) -> Any:
    """An option's value with absolute paths; of weights and runs as the run began, whatever became of them."""
    if isinstance(value, DataConfig):
        return located(value, base)
    if isinstance(value, Path):
        return find_weights(str(value), base, str(begun), option).resolve()
    if not isinstance(value, NetworkConfig) or value.weights in ("pretrained", "random"):
        return value
    weights = begun.weights if isinstance(begun, NetworkConfig) else None
    return value.model_copy(
        update={"weights": str(find_weights(value.weights, base, weights, f"{option}.weights").resolve())}
    )


def _for_folder(recipe: Recipe, out: Path, code: _Code) -> Recipe:
    """The recipe with the number of threads that the run began with, or that it will begin with.

    Raises:
        InputError: the folder holds something else, or cannot be written.
    """
    stored = out / "recipe.yaml"
    if stored.exists():
        threads = _same(load_recipe(stored), recipe, out)
        code.check()
    elif out.exists() and (not out.is_dir() or any(not _passing(path.name) for path in out.iterdir())):
        raise InputError(f"{out} holds something that is not a run: choose another --out.")
    else:
        if parallel.rank() == 0:
            _check_writable(out)
        threads = recipe.train.threads or _THREADS
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"threads": threads})})


def _passing(name: str) -> bool:
    """Whether a file in the run folder is only there while a process looks whether it may write."""
    return name == LOCK or name.startswith(PROBE)


def _same(before: Recipe, recipe: Recipe, out: Path) -> int:
    """The number of threads of the run that the folder holds."""
    may_change = FREE if recipe.train.threads else FREE | {"train.threads"}
    old, new = flat(before.dump()), flat(recipe.dump())
    for key in dict.fromkeys((*new, *old)):
        if key not in may_change and old.get(key) != new.get(key):
            raise InputError(
                f"{out} holds a run with {key}={as_text(old.get(key))}, not {as_text(new.get(key))}: "
                "choose another --out, or remove that folder."
            )
    # Of several processes each has its share of the cores, however many the run began with, if nothing else is said.
    if recipe.train.threads or parallel.world() == 1:
        return before.train.threads
    return min(before.train.threads, _THREADS)


def _check_writable(out: Path) -> None:
    existing = next(parent for parent in (out.absolute(), *out.absolute().parents) if parent.exists())
    probe = existing / f"{PROBE}{uuid.uuid4().hex}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"{out} cannot be written ({error.strerror}): choose another --out.") from error


@contextmanager
def _nothing_half_written(out: Path) -> Iterator[None]:
    """Takes away what a run wrote that ended before its first checkpoint: there is nothing to go on from."""
    goes_on = (out / "recipe.yaml").exists()
    try:
        yield
    except BaseException:
        if not goes_on and not any(out.rglob(checkpoint.LAST)):
            for path in out.iterdir() if out.exists() else ():
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                elif path.name != LOCK:
                    path.unlink()
        raise


def _write_recipe(recipe: Recipe, out: Path, code: _Code) -> None:
    if parallel.rank() > 0 or (out / "recipe.yaml").exists():
        return
    for path in code.files:
        with replacing(out / path.name) as part:
            part.write_bytes(path.read_bytes())
    head = f"# semiseg {version('semiseg')}, commit {_commit()}\n"
    write_text(out / "recipe.yaml", head + yaml.safe_dump(recipe.dump(), sort_keys=False, default_flow_style=None))


def _commit() -> str:
    """The commit of the source that runs, `none` outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "none"


def _card(recipe: Recipe, data: Data) -> dict[str, Any]:
    return {
        "semiseg": version("semiseg"),
        "method": recipe.method.name,
        "network": _without_weights(recipe).network.model_dump(mode="json"),
        "classes": list(data.classes),
        "palette": [list(colour) for colour in data.palette],
        "channels": recipe.data.channels,
        "size": recipe.data.size,
        "evaluate": recipe.evaluate.model_dump(mode="json"),
        "precision": recipe.train.precision,
    }


def _results(recipe: Recipe, data: Data, session: Session, split: str | None) -> dict[str, Any]:
    progress = session.progress()
    chosen = f"best on val at step {int(progress.best['step'])}" if progress.best else "last step (there is no val)"
    chose = "it also chose the checkpoint, so the number is optimistic" if recipe.train.evaluations > 1 else None
    note = f"there is no test split: val is reported; {chose or 'it chose nothing'}" if split == "val" else None
    return {
        "split": split,
        "family": data.family,
        "note": note,
        "method": recipe.method.name,
        "seed": recipe.train.seed,
        "split_seed": recipe.data.split_seed,
        "labelled": len(data.labelled),
        "unlabelled": len(data.unlabelled),
        "remarks": list(data.notes),
        "delivered": chosen,
        "verdict": None,
        "val_best": progress.best,
        "val_last": progress.last,
        "stages": session.stages(),
        "seconds": progress.seconds,
        "peak_gb": progress.peak_gb,
        "skipped": progress.skipped,
    }
