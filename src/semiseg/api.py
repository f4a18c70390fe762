"""Train, evaluate, predict, compare and export from Python; the command line calls these and prints."""

import shutil
import subprocess
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from pydantic_core import to_jsonable_python
from torch import Tensor, nn

from semiseg import methods, parallel
from semiseg.config import SECTIONS, Recipe, build_of, fields_of, load_recipe, parse
from semiseg.data.check import Report, contact_sheet, leaks
from semiseg.data.check import check as check_data
from semiseg.data.formats import read_image
from semiseg.data.loader import first_step
from semiseg.data.sampling import Phase, Stream
from semiseg.data.splits import Data, DataConfig, load_data, located
from semiseg.engine import checkpoint
from semiseg.engine import compare as comparing
from semiseg.engine import evaluate as evaluating
from semiseg.engine.evaluate import Scores
from semiseg.engine.memory import memory_errors, smaller
from semiseg.engine.predict import Prediction, Predictor, predict_files
from semiseg.engine.session import Session
from semiseg.files import LOCK, alone, replacing, sweep, write_json, write_text
from semiseg.networks.factory import Build, NetworkConfig, OptimConfig, code_file, find_weights
from semiseg.networks.weights import model_folder, read_model, save_model
from semiseg.plan import plan, undivided
from semiseg.types import InferenceConfig, InputError, Labelled, Options, nearest

FREE = {("train", "workers"), ("train", "save_every"), ("train", "device")}
"""Options that may change when a run goes on: the weights do not depend on them (device: on one kind of machine)."""

_THREADS = parallel.threads()
"""Asked for at once: a run may change torch's own number."""


@dataclass(frozen=True)
class Model:
    """A trained model with its classes and preprocessing; `folder` holds its files."""

    predictor: Predictor
    folder: Path
    card: Mapping[str, Any]

    @property
    def classes(self) -> tuple[str, ...]:
        return self.predictor.classes

    @property
    def net(self) -> nn.Module:
        """The network: image (B, N, H, W) -> logits (B, C, H, W).

        Raises:
            InputError: the model was loaded from an ONNX file.
        """
        if not isinstance(self.predictor.net, nn.Module):
            raise InputError(f"{self.folder} is an ONNX model: it predicts and evaluates, but has no torch network.")
        return self.predictor.net

    def predict(self, image: str | Path | NDArray[np.generic]) -> Prediction:
        """Predicts a file, or an array (H, W, N) uint8 or uint16: mask and confidence at its own size.

        Raises:
            InputError: the file cannot be read, or the array is another one.
        """
        if isinstance(image, str | Path):
            image = read_image(Path(image), self.predictor.channels)
        if image.ndim != 3 or image.dtype not in (np.uint8, np.uint16):
            raise InputError(
                f"An image of shape {image.shape} and type {image.dtype} cannot be predicted: give (H, W, "
                f"{self.predictor.channels}) in uint8 or uint16, or a file."
            )
        return self.predictor(image)


if TYPE_CHECKING:
    from semiseg.engine.export import Agreement

# ---- training ----------------------------------------------------------------------------------------------------


def train(
    source: str | Path | Recipe | Mapping[str, Any],
    out: str | Path,
    method: str | Mapping[str, Any] | Options | None = None,
    overrides: Iterable[str] = (),
    hours: float = 1.0,
    **options: Any,
) -> Model:
    """Trains, or goes on where the same call was stopped.

    Args:
        source: a recipe file, a folder of images and masks (a recipe is written for it first), or a recipe in Python.
        out: the run folder.
        method: a name ("fixmatch", or "file.py:Class" of one's own), a name with options ({"name": "fixmatch",
            "threshold": 0.9}), or the options of one of the package's methods (FixMatch.Config(threshold=0.9)). What is
            not given has its default, whatever the recipe says of it. None: the recipe's method, else FixMatch.
        overrides: `section.key=value` texts, as on the command line.
        hours: for a folder, how long the training may take on this machine.
        options: any option of a recipe's sections or of the package's methods by its plain name, such as
            `encoder="resnet50"`, `steps=20_000` or `threshold=0.9`. A name that several sections have is an error, and
            so are options of a method of one's own: give the one in `overrides`, the other in `method`.

    Raises:
        InputError: something that the user gave is wrong; nothing is written then.
        KeyboardInterrupt: Ctrl-C; the same call goes on from there.
    """
    out = Path(out)
    texts = [
        *([f"method={_text(_named(method))}"] if method else []),
        *overrides,
        *(f"{_find(k)}={_text(v)}" for k, v in options.items()),
    ]
    recipe, base = _recipe(source, texts, out, hours)
    return run(recipe, out, base)


def _recipe(
    source: str | Path | Recipe | Mapping[str, Any], overrides: list[str], out: Path, hours: float
) -> tuple[Recipe, Path | None]:
    """The recipe, and the folder beside which its relative paths are looked for."""
    if isinstance(source, Recipe | Mapping):
        plain = source.dump() if isinstance(source, Recipe) else source
        return parse(plain, "recipe", overrides=overrides), None
    path = Path(source)
    if not path.is_dir():
        return load_recipe(path, overrides), path.parent
    # A folder: its recipe is written once, and an interrupted run goes on with the one that it began with.
    stored = out / "recipe.yaml"
    if stored.exists():
        return load_recipe(stored, overrides), out
    if parallel.world() > 1:
        raise InputError(
            f"{path} is a folder, whose recipe one process has to write: run `semiseg init {path}` without torchrun, "
            "then train the recipe."
        )
    text = plan(path, hours)
    print(text)
    return parse(yaml.safe_load(text), path, overrides=overrides), path


def _find(option: str) -> str:
    """`section.key` of an option's plain name."""
    known = {section: set(fields_of(section)) for section in SECTIONS if section != "method"}
    known["method"] = set().union(*(method.Config.model_fields for method in methods.METHODS.values()))
    places = [section for section, names in known.items() if option in names]
    if len(places) == 1:
        return f"{places[0]}.{option}"
    if places:
        raise InputError(f"{option} stands in several sections: give it as overrides=['{places[0]}.{option}=...'].")
    raise InputError(f"{option} is no option; {nearest(option, set().union(*known.values()))}")


def _named(method: str | Mapping[str, Any] | Options) -> str | Mapping[str, Any]:
    """What stands in a recipe under `method`."""
    if not isinstance(method, Options):
        return method
    for name, known in methods.METHODS.items():
        if type(method) is known.Config:
            return {"name": name, **method.model_dump(mode="json")}
    raise InputError(
        f"method: {type(method).__qualname__} belongs to none of {', '.join(methods.METHODS)}: "
        'give {"name": "file.py:Class", "option": ...}.'
    )


def _text(value: object) -> str:
    return yaml.safe_dump(to_jsonable_python(value), default_flow_style=True).strip().removesuffix("\n...")


def run(recipe: Recipe, out: Path, base: Path | None = None) -> Model:
    """Runs a recipe in the folder `out`; see `train`."""
    recipe, copies = _resolve(recipe, base, out)
    recipe = _for_folder(recipe, out, copies)
    if (out / "results.json").exists():
        print(f"{out} holds this run, finished.")
        return load(out)
    with _writing(out), parallel.peers(), memory_errors(smaller(recipe.train)):
        _run(recipe, out, base, copies)
        parallel.wait()  # for the files of process 0
    return load(out)


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """The run folder is this run's alone; of several processes the first one sees to that."""
    if parallel.rank() > 0:
        yield
        return
    with alone(out), _nothing_half_written(out):
        sweep(out)
        yield


def _run(recipe: Recipe, out: Path, base: Path | None, copies: list[Path]) -> None:
    data = load_data(recipe.data)
    if problems := leaks(data):
        raise InputError(problems[0])
    device = parallel.device(recipe.train.device)
    parallel.start(device)
    parallel.wait()  # all have looked at the folder by now: from here on process 0 may write
    torch.set_num_threads(recipe.train.threads)
    kind = methods.find(recipe.method.name, base)
    build = build_of(_without_weights(recipe) if _restored(kind, out) else recipe, data, device, base)
    method = kind(recipe.method.options, build)
    if isinstance(method, nn.Module):
        method.to(device)

    if parallel.rank() == 0:
        _write_recipe(recipe, out, copies)
    for line in (_opening(recipe, data, device), *data.notes):
        print(line)
    session = Session(out, recipe.train, recipe.evaluate, device)
    session.starts_from(build.report)
    net = method.fit(session, data)

    split, rows = ("test", data.test) if len(data.test) else ("val", data.val)
    results = _results(recipe, data, session, split if len(rows) else None)
    scores = evaluating.evaluate(net, rows, data, recipe.evaluate, device) if len(rows) else None
    if parallel.rank() > 0:
        return
    save_model(out / "model", net.state_dict(), _card(recipe, data))
    if scores is not None:
        evaluating.save_scores(out / "results.npz", scores)
        results |= {
            "miou": scores.miou,
            "per_class": scores.per_class,
            "absent": list(scores.absent),
            "images": len(rows),
        }
    write_json(out / "results.json", results)  # the last file: where it is, the run is finished


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


def _resolve(recipe: Recipe, base: Path | None, out: Path) -> tuple[Recipe, list[Path]]:
    """Relative paths made absolute; the second value are the user's own code files, of which the run keeps a copy."""
    stored = out / "recipe.yaml"
    begun = load_recipe(stored) if stored.exists() else recipe
    options = recipe.method.options
    found = {
        name: _found(value, base, getattr(begun.method.options, name, None), f"method.{name}")
        for name, value in options
    }
    network = _found(recipe.network, base, begun.network, "network")
    networks = [value for value in (network, *found.values()) if isinstance(value, NetworkConfig)]
    places = [name.rpartition(":")[0] for name in (recipe.method.name, *(some.name for some in networks))]
    method = recipe.method.model_copy(update={"options": options.model_copy(update=found)})
    changed = {"data": located(recipe.data, base), "network": network, "method": method}
    return recipe.model_copy(update=changed), [code_file(place, base) for place in places if place.endswith(".py")]


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


def _for_folder(recipe: Recipe, out: Path, copies: list[Path]) -> Recipe:
    """The recipe with the number of threads that the run began with, or that it will begin with.

    Raises:
        InputError: the folder holds something else, or cannot be written.
    """
    stored = out / "recipe.yaml"
    if stored.exists():
        threads = _same(load_recipe(stored), recipe, out)
        for path in copies:
            if (out / path.name).is_file() and path.is_file() and (out / path.name).read_bytes() != path.read_bytes():
                raise InputError(
                    f"{path} is not what {out} began with: choose another --out, or restore it from there."
                )
    elif out.exists() and (not out.is_dir() or any(path.name != LOCK for path in out.iterdir())):
        raise InputError(f"{out} holds something that is not a run: choose another --out.")
    else:
        if parallel.rank() == 0:
            _check_writable(out)
        threads = recipe.train.threads or _THREADS
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"threads": threads})})


def _same(before: Recipe, recipe: Recipe, out: Path) -> int:
    """The number of threads of the run that the folder holds."""
    may_change = FREE if recipe.train.threads else FREE | {("train", "threads")}
    for section in SECTIONS:
        old, new = before.dump()[section], recipe.dump()[section]
        for key in dict.fromkeys((*new, *old)):
            if (section, key) not in may_change and old.get(key) != new.get(key):
                raise InputError(
                    f"{out} holds a run with {section}.{key}={_text(old.get(key))}, not {_text(new.get(key))}: "
                    "choose another --out, or remove that folder."
                )
    # Of several processes each has its share of the cores, however many the run began with.
    return before.train.threads if parallel.world() == 1 else min(before.train.threads, _THREADS)


def _check_writable(out: Path) -> None:
    existing = next(parent for parent in (out.absolute(), *out.absolute().parents) if parent.exists())
    probe = existing / f".semiseg-{uuid.uuid4().hex}"
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


def _write_recipe(recipe: Recipe, out: Path, copies: list[Path]) -> None:
    if (out / "recipe.yaml").exists():
        return
    for path in copies:
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
        "val_best": progress.best,
        "val_last": progress.last,
        "seconds": progress.seconds,
        "peak_gb": progress.peak_gb,
        "skipped": progress.skipped,
    }


# ---- using a model -----------------------------------------------------------------------------------------------


def load(path: str | Path, device: str = "auto", window: int | None = None) -> Model:
    """Loads a model from a run folder, a model folder, or an exported `.onnx` file with its `.json` beside it.

    Args:
        path: the folder or file.
        device: auto, cpu or cuda.
        window: side in px of a window that slides over the images; none: as in the model's recipe.

    Raises:
        InputError: there is no model.
    """
    path = Path(path)
    place = parallel.device(device)
    if not path.exists():
        raise InputError(f"{path} does not exist: name a run folder, a model folder, or an .onnx file.")
    if path.suffix == ".onnx":
        from semiseg.engine.export import onnx_network  # an optional extra

        net, card, folder = onnx_network(path), _read_card(path.with_suffix(".json")), path
    else:
        folder = model_folder(path)
        tensors, card = read_model(folder)
        net = _network(card, tensors, place, folder.parent)
    predictor = Predictor(
        net=net,
        classes=tuple(card["classes"]),
        palette=tuple((c[0], c[1], c[2]) for c in card["palette"]),
        channels=card["channels"],
        size=tuple(card["size"]) if isinstance(card["size"], list) else card["size"],
        inference=InferenceConfig(**card["evaluate"] | ({"window": (window, window)} if window else {})),
        device=place,
    )
    return Model(predictor, folder, card)


def _read_card(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(
            f"{path} is missing: it was written beside the ONNX file by `semiseg export`, keep the two together."
        )
    card: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return card


def _network(card: Mapping[str, Any], tensors: dict[str, Tensor], device: torch.device, base: Path) -> nn.Module:
    build = Build(
        classes=len(card["classes"]),
        channels=card["channels"],
        config=NetworkConfig(**card["network"]),
        optim=OptimConfig(),
        seed=0,
        precision=torch.bfloat16 if card["precision"] == "bf16" else None,
        channels_last=False,
        base=base,
        device=device,
    )
    net = build.network()
    net.load_state_dict(tensors)
    return net.eval().to(device)


def evaluate(model: Model | str | Path, data: str | Path | Data | None = None, split: str | None = None) -> Scores:
    """Scores a model on a split.

    Args:
        model: a model, or the path of one.
        data: a recipe, a data folder, or loaded data; none, or the folder that the run was trained on: the run's own
            data, divided as it was for the training. A folder without a class file has the model's classes.
        split: train, val or test; none: test, and of another folder that is not divided all images with a mask.

    Raises:
        InputError: the split is empty, or the classes are not the model's.
    """
    if not isinstance(model, Model):
        model = load(model)
    recipe = _run_folder(model) / "recipe.yaml"
    if data is None or (isinstance(data, str | Path) and _trained_on(recipe, Path(data))):
        if not recipe.exists():
            raise InputError(f"{model.folder} does not lie in a run folder: name the data to evaluate on.")
        data = recipe
    whole = None if isinstance(data, Data) else _undivided(Path(data), model)
    if not isinstance(data, Data):
        data = whole or data_of(data)
    splits = {"all": data.labelled} if whole else {"train": data.labelled, "val": data.val, "test": data.test}
    split = split or ("all" if whole else "test")
    if split not in splits:
        raise InputError(f"The split {split} is unknown; {nearest(split, splits)}")
    if not len(splits[split]):
        there = " or ".join(name for name, rows in splits.items() if len(rows))
        raise InputError(f"{data.name} has no {split} split: choose {there}.")
    if data.classes != model.classes:
        raise InputError(
            f"{data.name} has the classes {', '.join(data.classes)}, the model {', '.join(model.classes)}."
        )
    config = data.config.model_copy(update={"size": model.predictor.size, "channels": model.predictor.channels})
    data = replace(data, config=config)
    net = model.predictor.net
    module = net if isinstance(net, nn.Module) else _AsModule(net)
    parallel.start(model.predictor.device)
    scores = evaluating.evaluate(module, splits[split], data, model.predictor.inference, model.predictor.device)
    return replace(scores, split=split)


def _undivided(path: Path, model: Model) -> Data | None:
    """The data of a folder that is neither a run nor divided into splits: its masks are there to be scored, all."""
    config = undivided(path) if not (path / "recipe.yaml").exists() else None
    if config is None:
        return None
    if not (path / "classes.json").is_file():
        config = config.model_copy(update={"classes": model.classes})
    return load_data(config)


class _AsModule(nn.Module):
    def __init__(self, function: evaluating.Network) -> None:
        super().__init__()
        self.function = function

    def forward(self, image: Tensor) -> Tensor:
        return self.function(image)


def _trained_on(recipe: Path, folder: Path) -> bool:
    # A new division of the same folder would put training images into the test split.
    if not folder.is_dir() or not recipe.exists():
        return False
    root = Path(load_recipe(recipe).data.root)
    return root.exists() and folder.samefile(root)


def _run_folder(model: Model) -> Path:
    return model.folder if model.folder.is_dir() and (model.folder / "recipe.yaml").exists() else model.folder.parent


def data_of(source: str | Path, overrides: Iterable[str] = ()) -> Data:
    """The data of a recipe, a run, or a folder.

    Raises:
        InputError: it cannot be read.
    """
    return _recipe_and_data(Path(source), overrides)[1]


def _recipe_and_data(path: Path, overrides: Iterable[str]) -> tuple[Recipe, Data]:
    if path.is_dir() and (path / "recipe.yaml").exists():
        path = path / "recipe.yaml"
    if path.is_dir():
        recipe = parse(yaml.safe_load(plan(path, None)), path, overrides=overrides)
    else:
        recipe = load_recipe(path, overrides)
    return recipe, load_data(recipe.data, path.parent)


def check(source: str | Path, sheet: str | Path | None = None, overrides: Iterable[str] = ()) -> Report:
    """Looks for what would spoil a run; see `data.check.check`.

    Args:
        source: a recipe, a run or a data folder.
        sheet: where to draw a contact sheet of drawn training samples with their masks, if anywhere.

    Raises:
        InputError: the data cannot even be listed.
    """
    recipe, data = _recipe_and_data(Path(source), overrides)
    report = check_data(data)
    if sheet is not None and not report.problems:
        train = recipe.train
        streams = {"labelled": Stream(data.labelled, (Phase(train.crop, train.batch),))}
        batch = first_step(streams, data, train.seed)["labelled"]
        assert isinstance(batch, Labelled)
        contact_sheet(batch.image, batch.mask, data.palette, Path(sheet), data.classes)
    return report


def predict(
    model: Model | str | Path,
    images: Sequence[str | Path],
    out: str | Path,
    confidence: bool = False,
    overlay: bool = False,
) -> tuple[int, int, dict[str, str]]:
    """Writes masks for files and folders; see `engine.predict.predict_files`."""
    if not isinstance(model, Model):
        model = load(model)
    parallel.start(model.predictor.device)
    return predict_files(model.predictor, [Path(image) for image in images], Path(out), confidence, overlay)


def export(model: Model | str | Path, path: str | Path | None = None) -> tuple[Path, "Agreement"]:
    """Writes the model as ONNX (float images in 0..1 to logits, any batch and size), and compares it with torch.

    Returns:
        the file, with a `.json` of classes and preprocessing beside it, and how well the two agree.

    Raises:
        InputError: the export extra is not installed.
    """
    if not isinstance(model, Model):
        model = load(model)
    from semiseg.engine.export import export_onnx  # an optional extra

    path = Path(path) if path else model.folder / "model.onnx"
    agreement = export_onnx(model.net, path, model.predictor.channels)
    write_json(path.with_suffix(".json"), model.card)
    return path, agreement


def compare(runs: Sequence[str | Path]) -> list[comparing.Line]:
    """One line for each recipe among the runs; runs that differ in their seeds and folds only are one recipe's.

    Raises:
        InputError: a run is not finished.
    """
    found = []
    for folder in map(Path, runs):
        if not (folder / "results.json").is_file():
            raise InputError(f"{folder} holds no finished run: finish it by the same `semiseg train` command.")
        if not (folder / "results.npz").is_file():
            raise InputError(f"{folder} has no score to compare, as its data has neither val nor test: leave it out.")
        scores = evaluating.load_scores(folder / "results.npz")
        recipe = load_recipe(folder / "recipe.yaml")
        results = yaml.safe_load((folder / "results.json").read_text(encoding="utf-8"))
        options = recipe.dump()
        seeds = (options["train"].pop("seed"), options["data"].pop("split_seed"), options["data"].pop("fold"))
        for section, key in FREE:
            options[section].pop(key)
        found.append(comparing.Run(folder.name, options, seeds, results, scores))
    return comparing.compare(found)


__all__ = ["Model", "check", "compare", "data_of", "evaluate", "export", "load", "predict", "run", "train"]
