"""Train, evaluate, predict, compare and export from Python; the command line calls these and prints."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torch import Tensor, nn

from semiseg import experiment, methods, parallel
from semiseg.config import ALONE, SECTIONS, Recipe, fields_of, load_recipe, parse
from semiseg.data.check import Report, contact_sheet, leaks
from semiseg.data.check import check as check_data
from semiseg.data.formats import read_image
from semiseg.data.loader import first_step
from semiseg.data.sampling import Phase, Stream
from semiseg.data.splits import Data, load_data
from semiseg.engine import compare as comparing
from semiseg.engine import evaluate as evaluating
from semiseg.engine.evaluate import Scores
from semiseg.engine.predict import Origin, Prediction, Predictor, predict_files
from semiseg.files import write_json
from semiseg.networks.factory import Build, NetworkConfig, OptimConfig
from semiseg.networks.weights import WEIGHTS, model_folder, read_model
from semiseg.plan import plan, undivided
from semiseg.types import InferenceConfig, InputError, Labelled, Options, as_text, nearest


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
        *([f"method={as_text(_named(method))}"] if method else []),
        *overrides,
        *(f"{_find(k)}={as_text(v)}" for k, v in options.items()),
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
    if option in ALONE:
        return option
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


def run(recipe: Recipe, out: Path, base: Path | None = None) -> Model:
    """Runs a recipe in the folder `out`; see `train`."""
    experiment.run(recipe, out, base)
    return load(out)


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
    with parallel.peers():
        parallel.start(model.predictor.device)  # met first: one process may take longer to list the data
        return _evaluate(model, data, split)


def _evaluate(model: Model, data: str | Path | Data | None, split: str | None) -> Scores:
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
    """The nearest folder of a run that the model lies in, as an ONNX file does in model/; else the one it is in."""
    places = (model.folder, model.folder.parent, model.folder.parent.parent)
    return next((place for place in places if (place / "recipe.yaml").is_file()), model.folder.parent)


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
    """Looks for what would spoil a run; see `data.check.check`, and `look` of the method.

    Args:
        source: a recipe, a run or a data folder.
        sheet: where to draw a contact sheet of drawn training samples with their masks, if anywhere.

    Raises:
        InputError: the data cannot even be listed.
    """
    recipe, data = _recipe_and_data(Path(source), overrides)
    report = check_data(data)
    if not report.problems:  # of folds each is the test split once
        parts = experiment.members(recipe).values()
        found = [leaks(load_data(part.data, Path(source).parent)) for part in parts if part.data.fold is not None]
        report = replace(report, problems=tuple(dict.fromkeys(problem for some in found for problem in some)))
    if not report.problems:
        base, bare = Path(source).parent, NetworkConfig(weights="random")  # it is data that is looked at
        try:
            found_paths = experiment.resolved(recipe.model_copy(update={"network": bare}), base)
            told = methods.find(recipe.method.name, base).look(found_paths.method.options, data)
            report = replace(report, method=tuple(told))
        except InputError as error:
            report = replace(report, problems=(str(error),))
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
    """Writes masks for files and folders; see `engine.predict.predict_files`.

    Raises:
        InputError: a file is none, or `out` has masks of another model.
    """
    if not isinstance(model, Model):
        model = load(model)
    with parallel.peers():
        parallel.start(model.predictor.device)
        paths = [Path(image) for image in images]
        return predict_files(model.predictor, paths, Path(out), confidence, overlay, _origin(model))


def _origin(model: Model) -> Origin:
    weights = model.folder / WEIGHTS if model.folder.is_dir() else model.folder
    found = hashlib.sha256(repr(model.card).encode() + weights.read_bytes())
    return Origin(model=str(model.folder), digest=found.hexdigest())


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
        InputError: a run is not finished, or has no score, or a file of it is damaged.
    """
    found = []
    parts = [part for run in runs for part in _trainings(Path(run))]
    for folder in {part.resolve(): part for part in parts}.values():  # a training counts once
        try:
            results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(
                f"{folder / 'results.json'} is damaged ({error}): remove it, and the same `semiseg train` command "
                "writes it again."
            ) from error
        if results["split"] is None:
            raise InputError(f"{folder} has no score to compare, as its data has neither val nor test: leave it out.")
        scores = evaluating.load_scores(folder / "results.npz")
        options = load_recipe(folder / "recipe.yaml").dump()
        if code := _code(folder):
            options["code"] = code  # another text is another method, whatever its name is
        seeds = (options["train"].pop("seed"), options["data"].pop("split_seed"), options["data"].pop("fold"))
        for name in ("baseline", "seeds", *experiment.FREE):
            section, _, key = name.rpartition(".")
            (options[section] if section else options).pop(key)
        found.append(comparing.Run(str(folder), options, seeds, results, scores))
    return comparing.compare(found)


def _code(folder: Path) -> str:
    """What the user's own files that the recipe of a run names say, in short; nothing where it names none."""
    recipe = (folder / "recipe.yaml").read_text(encoding="utf-8")
    files = sorted(path for path in folder.iterdir() if path.suffix in (".py", ".yml", ".yaml"))
    texts = [path.read_bytes() for path in files if path.name != "recipe.yaml" and path.name in recipe]
    return hashlib.sha256(b"\0".join(texts)).hexdigest()[:8] if texts else ""


def _trainings(folder: Path) -> list[Path]:
    """The folders of a run's trainings: itself, or those of its seeds or folds.

    Raises:
        InputError: it is not finished.
    """
    found = [folder]
    if (folder / "results.json").is_file():
        found += [folder / name for name in experiment.members(load_recipe(folder / "recipe.yaml"))]
    for part in found:
        if not (part / "results.json").is_file():
            raise InputError(f"{part} holds no finished run: finish it by the same `semiseg train` command.")
    return found[1:] or found


__all__ = ["Model", "check", "compare", "data_of", "evaluate", "export", "load", "predict", "run", "train"]
