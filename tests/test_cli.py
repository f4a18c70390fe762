"""Level 5: the verbs, from a folder to a model that predicts, on 24 tiny images; and runs that are interrupted."""

import csv
import json
import os
import random
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from semiseg import api, cli, experiment, methods
from semiseg.config import ALONE, SECTIONS, Recipe, parse
from semiseg.engine import session
from semiseg.engine.evaluate import joined, load_scores
from semiseg.files import LOCK, sweep
from semiseg.methods import FixMatch, Supervised
from semiseg.networks.weights import copy_model
from semiseg.types import Clock, InputError, Options

Command = Callable[..., Any]
"""The fixture `semiseg` of conftest.py."""

TINY = ("network.name=fpn", "network.encoder=test_resnet", "network.weights=random", "train.threads=1")


@pytest.fixture(scope="module")
def home(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe and what became of it without any interruption, in `run`."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "recipe.yaml").write_text(recipe_text(drawn))
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEMISEG_CACHE", str(folder / ".cache"))
        api.train(folder / "recipe.yaml", folder / "run")
    torch.set_num_threads(threads)
    return folder


def recipe_text(data: Path) -> str:
    train = {"steps": 24, "batch": 4, "crop": [32, 32], "save_every": 4, "log_every": 4, "evaluations": 2, "threads": 1}
    return yaml.safe_dump(
        {
            "data": {"root": str(data), "format": "splits", "scale": [0.75, 1.5]},
            "network": {"name": "fpn", "encoder": "test_resnet", "weights": "random"},
            "train": train,
            "baseline": False,
        }
    )


def same_outcome(run: Path, whole: Path) -> None:
    """The runs delivered the same weights, bit for bit, and the same numbers."""
    for file in ("model/model.safetensors", "checkpoints/delivered.safetensors", "model/model.json"):
        assert (run / file).read_bytes() == (whole / file).read_bytes(), file
    found, expected = (json.loads((folder / "results.json").read_text()) for folder in (run, whole))
    for free in ("seconds", "peak_gb"):
        found.pop(free), expected.pop(free)
    assert found == expected
    assert {path.name for path in run.iterdir()} == {path.name for path in whole.iterdir()}
    assert not list(run.rglob(".*")), "a temporary file was left"
    rows, expected_rows = (val_rows(folder) for folder in (run, whole))
    assert rows == expected_rows


def val_rows(run: Path) -> dict[str, str]:
    with (run / "metrics.csv").open() as file:
        return {row["step"]: row["val_miou"] for row in csv.DictReader(file) if row["val_miou"]}


def pixels(path: Path | str) -> Any:
    with Image.open(path) as image:
        return np.array(image)


# ---- the front door ----------------------------------------------------------------------------------------------


def test_help_comes_at_once() -> None:
    """`python -m semiseg --help` works, and loads nothing that takes seconds."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "semiseg", "--help"], capture_output=True, text=True, check=True
    )
    assert "predict" in done.stdout
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "semiseg.cli" in loaded
    assert not {"torch", "numpy", "timm", "yaml", "PIL", "semiseg.api"} & loaded


@pytest.mark.parametrize(
    "verb", ["demo", "init", "check", "train", "evaluate", "predict", "compare", "export", "methods", "options"]
)
def test_every_verb_explains_itself(semiseg: Command, verb: str) -> None:
    done = semiseg(verb, "-h")
    assert done.code == 0
    assert verb in done.out


def test_version(semiseg: Command) -> None:
    assert semiseg("--version").out.split()[0] == "semiseg"


def test_usage_has_an_exit_code_of_its_own(semiseg: Command) -> None:
    done = semiseg("trian")
    assert done.code == 2
    assert "train" in done.err
    assert semiseg("train").code == 2
    assert semiseg().code == 2


def test_options(semiseg: Command, home: Path) -> None:
    """Every option of a recipe has a meaning and its default, as text that `train` takes."""
    plain = json.loads(semiseg("options", "--json").out)
    recipe = yaml.safe_load((home / "run/recipe.yaml").read_text())
    expected = {f"{section}.{name}" for section in SECTIONS if section != "method" for name in recipe[section]}
    assert plain.keys() == expected | set(ALONE)
    assert [name for name, (_, text) in plain.items() if not text] == []
    known = {name: default for name, (default, _) in plain.items() if name != "data.root"}
    assert parse(recipe, "recipe", overrides=[f"{name}={default}" for name, default in known.items()]).seeds == 1
    assert semiseg("options", "optim").out.startswith("optim.name = adamw  # adamw or sgd.\noptim.lr = 0.0003  # ")
    assert "did you mean train" in semiseg("options", "trian").sentence


def test_methods(semiseg: Command) -> None:
    text, plain = semiseg("methods").out, json.loads(semiseg("methods", "--json").out)
    assert plain.keys() == methods.METHODS.keys()
    assert f"{methods.DEFAULT} (default): " in text
    for name, method in methods.METHODS.items():
        assert f"{method.paper}\n" in text
        assert plain[name].keys() == methods.describe(method).keys()
        shown = semiseg("methods", name).out
        assert shown.startswith(name)
        assert all(f"  method.{option} = " in shown for option in plain[name])
    assert len(text.splitlines()) == len(plain) + 2
    assert json.loads(semiseg("methods", "st", "u2pl", "--json").out) == {name: plain[name] for name in ("st", "u2pl")}
    assert "did you mean u2pl" in semiseg("methods", "u2p").sentence


# ---- from a folder to a model ------------------------------------------------------------------------------------


def test_init_check_train(semiseg: Command, flat: Path, tmp_path: Path) -> None:
    done = semiseg("init", flat, "--hours", "0.01")
    assert done.code == 0, done.err
    text = (tmp_path / "recipe.yaml").read_text()
    assert text in done.out
    assert "next: semiseg check recipe.yaml" in done.out
    refused = semiseg("init", flat)
    assert "recipe.yaml is there already" in refused.sentence
    assert (tmp_path / "recipe.yaml").read_text() == text

    done = semiseg("check", "recipe.yaml")
    assert done.code == 0, done.out
    assert "Report(" not in done.out
    assert "8 labelled, 6 unlabelled, 0 val, 0 test" in done.out
    assert all(f"class_{i} " in done.out for i in range(1, 6))
    assert "no problem found" in done.out
    assert min(pixels("check.png").shape[:2]) > 60

    assert "set train.steps there." in semiseg("train", "recipe.yaml", "-o", "run", "--hours", "2").sentence
    done = semiseg("train", "recipe.yaml", "--out", "run", *TINY, "train.steps=2", "train.workers=0")
    assert done.code == 0, done.err
    assert "test mIoU" in done.out
    assert "final: last step" in done.out
    assert "next: semiseg predict run" in done.out


def test_check_reports_problems(semiseg: Command, scenes: Path, recipe: Path) -> None:
    (scenes / "masks/val/scene-00001.png").write_bytes(b"damaged")
    done = semiseg("check", recipe, "--sheet", "sheet.png")
    assert done.code == 1
    assert "problem: " in done.out
    assert "masks/val/scene-00001.png" in done.out
    assert not Path("sheet.png").exists()


def test_train_of_a_folder_is_init_and_train(semiseg: Command, flat: Path) -> None:
    words = ("train", flat, "-o", "run", *TINY, "train.steps=2", "train.workers=0")
    done = semiseg(*words)
    assert done.code == 0, done.err
    assert "folds: 5" in done.out, "the recipe with its reasons is shown"
    assert "test mIoU" in done.out
    before = {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")}
    done = semiseg(*words)
    assert done.code == 0
    assert "run holds this run, finished." in done.out
    assert "test mIoU" in done.out
    assert {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")} == before


def test_train_without_a_held_out_image(semiseg: Command, recipe: Path, scenes: Path) -> None:
    for kind in ("images", "masks"):
        for split in ("val", "test"):
            shutil.rmtree(scenes / kind / split)
    done = semiseg("train", recipe, "-o", "run", "train.steps=2")
    assert done.code == 0, done.err
    assert "there is no score" in done.out
    assert json.loads(Path("run/results.json").read_text())["split"] is None
    assert "has no score" in semiseg("compare", "run").sentence
    assert "no test split: choose train" in semiseg("evaluate", "run").sentence


def test_paths_are_those_beside_the_recipe(semiseg: Command, recipe: Path, scenes: Path, tmp_path: Path) -> None:
    """A run remembers where its files are, from wherever it is looked at."""
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists/ids.txt").write_text("scene-00000\nscene-00002\nscene-00005\n")
    place = tmp_path / "lists/recipe.yaml"
    place.write_text(recipe.read_text().replace(str(scenes), "../scenes"))
    done = semiseg("train", "lists/recipe.yaml", "-o", "run", "data.labelled=ids.txt", "train.steps=2")
    assert done.code == 0, done.err
    assert "3 labelled, 11 unlabelled" in done.out
    os.chdir(tmp_path / "lists")
    done = semiseg("check", "../run")
    assert done.code == 0, done.err
    assert "3 labelled, 11 unlabelled" in done.out


# ---- using a model -----------------------------------------------------------------------------------------------


def test_evaluate(semiseg: Command, home: Path, drawn: Path) -> None:
    results = json.loads((home / "run/results.json").read_text())
    plain = json.loads(semiseg("evaluate", home / "run", "--json").out)
    assert plain["miou"] == results["miou"]
    assert plain["per_class"] == results["per_class"]
    masks = [pixels(path) for path in (drawn / "masks/test").iterdir()]
    assert np.sum(plain["confusion"]) == sum((mask != 255).sum() for mask in masks)
    text = semiseg("evaluate", home / "run/model", "--data", home / "recipe.yaml").out
    assert f"test mIoU {100 * results['miou']:.2f} on 6 images" in text
    assert all(name in text for name in results["per_class"])
    val = semiseg("evaluate", home / "run", "--split", "val").out
    assert f"val mIoU {100 * results['val_best']['miou']:.2f} on 4 images" in val
    assert semiseg("evaluate", home / "run", "--data", drawn).out == text, "a folder names the same data"
    windows = semiseg("evaluate", home / "run", "--window", "32")
    assert windows.code == 0
    assert windows.out != text


def test_evaluate_a_folder_that_is_not_divided(semiseg: Command, home: Path, flat: Path) -> None:
    """Every mask is scored; without a class file their ids are those of the model's classes."""
    masks = list((flat / "masks").iterdir())
    done = semiseg("evaluate", home / "run", "--data", flat)
    assert re.search(rf"^mIoU [\d.]+ on all {len(masks)} images that have a mask$", done.out, re.MULTILINE), done.out
    plain = json.loads(semiseg("evaluate", home / "run", "--data", flat, "--json").out)
    assert (plain["split"], plain["images"]) == ("all", len(masks))
    assert np.sum(plain["confusion"]) == sum((pixels(mask) != 255).sum() for mask in masks)
    assert "The split val is unknown" in semiseg("evaluate", home / "run", "--data", flat, "--split", "val").sentence


def test_predict(semiseg: Command, home: Path, drawn: Path) -> None:
    images = drawn / "images/test"
    done = semiseg("predict", home / "run", images, images.parent / "val/scene-00000.png", "-o", "out/a")
    assert "would both be written to" in done.sentence
    words = ("predict", home / "run", images, "-o", "out", "--overlay", "--confidence")
    done = semiseg(*words)
    assert done.code == 0, done.err
    assert done.out == "6 masks written to out\n"
    model = api.load(home / "run")
    for path in images.iterdir():
        prediction = model.predict(path)
        assert np.array_equal(pixels(f"out/{path.name}"), prediction.mask)
        assert abs(pixels(f"out/confidence/{path.name}") / 255 - prediction.confidence).max() <= 0.5 / 255 + 1e-6
        assert pixels(f"out/overlay/{path.stem}.jpg").shape == (*prediction.mask.shape, 3)

    Path("out/scene-00003.png").unlink()
    assert semiseg(*words).out == "1 masks written to out; 5 were there before\n"
    assert semiseg("predict", home / "run", images, "-o", "out").out.startswith("0 masks written to out; 6 were there")


def test_a_folder_of_masks_belongs_to_one_model(semiseg: Command, home: Path, scenes: Path) -> None:
    """Another model's masks are neither kept nor mixed in, nor are masks that somebody drew written over."""
    images = sorted((scenes / "images/test").iterdir())
    shutil.copytree(home / "run/model", "copy")
    assert semiseg("predict", home / "run", images[0], "-o", "out").code == 0
    assert semiseg("predict", "copy", *images[:2], "-o", "out").out == "1 masks written to out; 1 were there before\n"
    (Path("copy") / "model.onnx").write_bytes(b"beside the weights")
    assert semiseg("predict", "copy", *images[:2], "-o", "out").out == "0 masks written to out; 2 were there before\n"
    moved = {
        name: tensor + 1 if "bias" in name else tensor for name, tensor in load_file("copy/model.safetensors").items()
    }
    save_file(moved, "copy/model.safetensors")
    assert semiseg("predict", "copy", images[2], "-o", "out").sentence == (
        f"out holds masks of {home / 'run/model'}: choose another --out, or remove its masks and predicted.json."
    )
    assert not Path("out", images[2].name).exists()
    Path("out/predicted.json").write_text("{")
    assert "holds masks of an unknown model" in semiseg("predict", home / "run", images[2], "-o", "out").sentence
    Path("out/predicted.json").unlink()
    before = Path("out", images[0].name).read_bytes()
    done = semiseg("predict", home / "run", images[0], "-o", "out", "--overlay")
    assert "holds masks of an unknown model" in done.sentence
    assert Path("out", images[0].name).read_bytes() == before


def test_predict_into_a_folder_of_images(semiseg: Command, home: Path, scenes: Path) -> None:
    """Results of an earlier call are no images, and no image is taken for its mask."""
    images = scenes / "images/test"
    assert semiseg("predict", home / "run", images, "-o", images).sentence.endswith("choose another --out.")
    words = ("predict", home / "run", images, "-o", images / "masks", "--overlay")
    assert semiseg(*words).out.startswith("6 masks")
    assert semiseg(*words).out.startswith("0 masks written to")
    assert len(list(images.rglob("*.png"))) == 12


def test_predict_an_array_that_is_no_image(home: Path) -> None:
    model = api.load(home / "run")
    for image in (np.zeros((32, 32), np.uint8), np.zeros((32, 32, 3), np.float32)):
        with pytest.raises(InputError, match=r"give \(H, W, 3\) in uint8 or uint16"):
            model.predict(image)


def test_predict_goes_on_after_a_damaged_image(semiseg: Command, home: Path, scenes: Path) -> None:
    (scenes / "images/test/scene-00002.png").write_bytes(b"damaged")
    done = semiseg("predict", home / "run", scenes / "images/test", "-o", "out")
    assert "images/test/scene-00002.png" in done.sentence
    assert done.out == "5 masks written to out\n"
    assert len(list(Path("out").glob("*.png"))) == 5


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("fixmatch", {"threshold": 0.9}),
        (None, {"threshold": 0.9}),
        ({"name": "fixmatch", "threshold": 0.9}, {}),
        ({"threshold": 0.9, "sigma": (0.1, 2.0)}, {}),
        (FixMatch.Config(threshold=0.9), {}),
    ],
)
def test_a_method_in_python(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Any, options: dict[str, Any]
) -> None:
    found: list[Recipe] = []
    monkeypatch.setattr(api, "run", lambda recipe, *_: found.append(recipe))
    api.train(recipe, tmp_path / "run", method=method, lr=1e-5, **options)
    assert found[0].method.name == "fixmatch"
    assert found[0].method.options == FixMatch.Config(threshold=0.9)
    assert found[0].optim.lr == 1e-5


def test_a_method_in_python_that_is_wrong(recipe: Path, tmp_path: Path) -> None:
    class Mine(Options):
        strength: float = 1.0

    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"method": Mine()}, f'belongs to none of {", ".join(methods.METHODS)}: give {{"name": "file.py:Class"'),
        ({"method": "supervised", "threshold": 0.9}, "method.threshold is unknown"),
        ({"treshold": 0.9}, "treshold is no option; did you mean threshold or "),
        ({"name": "fpn"}, "name stands in several sections"),
    )
    for words, expected in cases:
        with pytest.raises(InputError, match=re.escape(expected)):
            api.train(recipe, tmp_path / "run", **words)
    assert not (tmp_path / "run").exists()


HOLDER = """
import sys, time
from pathlib import Path
from semiseg.files import alone
with alone(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(600)
"""


def test_one_process_a_run(semiseg: Command, recipe: Path, tmp_path: Path) -> None:
    """A second one is refused and changes nothing; the lock goes with the process that holds it, even if killed."""
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        try:
            assert holder.stdout.readline() == b"locked\n"
            words = ("train", recipe, "-o", "run", "train.steps=2")
            assert semiseg(*words).sentence == "run is in use by another process: wait for it, or choose another --out."
            assert [path.name for path in Path("run").iterdir()] == [LOCK]
        finally:
            holder.kill()
    assert semiseg(*words).code == 0
    assert not (tmp_path / "run" / LOCK).exists()


def test_a_failed_start_leaves_no_folder(semiseg: Command, recipe: Path) -> None:
    assert semiseg("train", recipe, "-o", "run", "data.labelled=999").code == 1
    assert not Path("run").exists()


def test_compare(semiseg: Command, home: Path) -> None:
    for seed in (0, 1):
        words = ("train", home / "recipe.yaml", "-o", f"base-{seed}", "method=supervised", f"train.seed={seed}")
        assert semiseg(*words, "train.steps=4", "train.workers=0").code == 0
    done = semiseg("compare", home / "run", "base-0", "base-1")
    assert done.code == 0, done.err
    head, _, *lines = [line for line in done.out.splitlines() if line.startswith("|")]
    assert "mIoU" in head
    assert [line.split("|")[1].split()[0] for line in lines] == ["fixmatch", "supervised"]
    plain = json.loads(semiseg("compare", home / "run", "base-0", "base-1", "--json").out)
    assert [line["runs"] for line in plain] == [1, 2]
    assert plain[0]["miou"] == pytest.approx(100 * json.loads((home / "run/results.json").read_text())["miou"])
    assert semiseg("compare", home / "run", home / "run").out == semiseg("compare", home / "run").out, "counted once"
    assert "| IoU " not in done.out
    assert "| IoU " in semiseg("compare", home / "run", "base-0", "--per-class").out


def test_a_method_in_a_file_elsewhere(semiseg: Command, recipe: Path, tmp_path: Path) -> None:
    """The run's own copy serves where the file is gone; a run does not go on with another text."""
    code = tmp_path / "code" / "mine.py"
    code.parent.mkdir()
    code.write_text("from semiseg.methods.supervised import Supervised as Mine\n")
    words = ("train", recipe, "-o", "own", "method=code/mine.py:Mine")
    assert semiseg(*words, "train.steps=4").code == 0
    assert semiseg(*words, "train.steps=4").out.startswith("own holds this run, finished.")
    code.write_text(code.read_text() + "# edited\n")
    assert "mine.py is not what own began with: choose another --out" in semiseg(*words, "train.steps=4").sentence
    code.unlink()
    assert semiseg("evaluate", "own").code == 0
    assert semiseg("compare", "own").code == 0
    code.write_text("from semiseg.methods.supervised import Supervised as Mine  # another\n")
    assert semiseg("train", recipe, "-o", "other", "method=code/mine.py:Mine", "train.steps=4").code == 0
    lines = json.loads(semiseg("compare", "own", "other", "--json").out)
    assert [line["runs"] for line in lines] == [1, 1], "no two draws of one recipe"
    assert all("code=" in line["label"] for line in lines)


def test_files_of_a_run_that_are_gone_or_damaged(semiseg: Command, home: Path, tmp_path: Path) -> None:
    run = tmp_path / "copy"
    shutil.copytree(home / "run", run)
    results = (run / "results.json").read_text()
    (run / "results.json").write_text(results[:40])
    assert "results.json is damaged" in semiseg("compare", run).sentence
    (run / "results.json").write_text(results)
    (run / "results.npz").write_bytes(b"PK")
    assert "results.npz is damaged" in semiseg("compare", run).sentence
    (run / "results.npz").unlink()
    assert "results.npz is missing: finish the run" in semiseg("compare", run).sentence
    with pytest.raises(InputError, match=r"model\.safetensors is missing: remove"):
        copy_model(tmp_path / "nowhere/model", run / "model")


def test_what_a_killed_process_was_writing_goes(tmp_path: Path) -> None:
    names = (".0123456789ab.last.pt", ".0123456789.last.pt", "last.pt")
    for name in names:
        (tmp_path / "checkpoints").mkdir(exist_ok=True)
        (tmp_path / "checkpoints" / name).touch()
    sweep(tmp_path)
    assert {path.name for path in tmp_path.rglob("*.pt")} == set(names[1:])


def test_weights_can_be_read_like_other_new_files(home: Path, tmp_path: Path) -> None:
    (tmp_path / "new").touch()
    modes = {path.stat().st_mode for path in (home / "run" / "model").iterdir()}
    assert modes == {(tmp_path / "new").stat().st_mode}


def test_a_class_without_a_right_pixel_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    results: dict[str, Any] = {"split": "test", "images": 2, "miou": 0.4, "delivered": "last step", "note": None}
    results["verdict"] = None
    cli._print_results(results | {"per_class": {"a": 0.8, "b": 0.0}, "skipped": {}, "seconds": 1.0, "peak_gb": 1.0})
    assert "no pixel right: b. Train longer" in capsys.readouterr().out
    cli._print_results(results | {"per_class": {"a": 0.8, "b": None}, "skipped": {}, "seconds": 1.0, "peak_gb": 1.0})
    assert "no pixel right" not in capsys.readouterr().out


def test_masks_without_any_class(semiseg: Command, recipe: Path, scenes: Path) -> None:
    for path in (scenes / "masks/test").iterdir():
        Image.fromarray(np.full((48, 64), 255, np.uint8)).save(path)
    done = semiseg("train", recipe, "-o", "run", "train.steps=4")
    assert done.code == 0, done.err
    assert "test mIoU not known, as no mask has a class" in done.out


def test_compare_folds(semiseg: Command, recipe: Path, flat: Path, drawn: Path) -> None:
    """The folds of a recipe are one line, of all images together, and paired with those of another one."""
    shutil.copy(drawn / "classes.json", flat)
    recipe.write_text(recipe.read_text().replace("splits", "folder, folds: 2").replace("/scenes", f"/{flat.name}"))
    runs = [f"{method}-{fold}" for method in ("supervised", "fixmatch") for fold in (0, 1)]
    for run in runs:
        method, fold = run.split("-")
        assert semiseg("train", recipe, "-o", run, f"method={method}", f"data.fold={fold}", "train.steps=4").code == 0
    base, other = json.loads(semiseg("compare", *runs, "--json").out)
    assert (base["runs"], other["runs"], other["pairs"], other["spread"]) == (2, 2, 1, None)
    assert other["difference"] == pytest.approx(other["miou"] - base["miou"])
    assert other["miou"] == pytest.approx(100 * joined([load_scores(Path(r, "results.npz")) for r in runs[2:]]).miou)
    assert "in 2 folds" in base["family"]
    apart = json.loads(semiseg("compare", runs[0], runs[3], "--json").out)[1]
    assert (apart["difference"], apart["interval"]) == (None, None), "other images were scored"

    done = semiseg("evaluate", "supervised-1", "--data", flat)
    assert done.out == semiseg("evaluate", "supervised-1").out, "divided as for the training"


@pytest.mark.filterwarnings("ignore")  # the exporter's own, about its own future
def test_export(semiseg: Command, home: Path, drawn: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the export extra is not installed")
    done = semiseg("export", home / "run", "-o", "net/model.onnx")
    assert done.code == 0, done.err
    assert done.out.startswith("net/model.onnx: ")
    assert done.out.count("\n") == 1
    for model, out in ((home / "run", "torch"), (Path("net/model.onnx"), "onnx")):
        assert semiseg("predict", model, drawn / "images/test", "-o", out).code == 0
    pairs = [[pixels(f"{out}/{path.name}") for out in ("torch", "onnx")] for path in Path("onnx").glob("*.png")]
    assert len(pairs) == 6
    assert np.mean([here == there for here, there in pairs]) >= 0.999
    shutil.copytree(home / "run", "copy")
    shutil.copy("net/model.onnx", "copy/model")  # where it is written by default
    assert "on 6 images" in semiseg("evaluate", "copy/model/model.onnx").out
    Path("net/model.json").unlink()
    assert "net/model.json is missing" in semiseg("evaluate", "net/model.onnx").sentence


# ---- interruptions -----------------------------------------------------------------------------------------------


def start(*words: object, cwd: Path) -> subprocess.Popen[str]:
    """The command in a process, and a process group, of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "semiseg", *map(str, words)],
        cwd=cwd,
        env={**os.environ, "SEMISEG_CACHE": str(cwd / ".cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_stopped_run_ends_with_the_same_weights(
    semiseg: Command, home: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """Stopped at a random moment, its reading process with it, and started again by the same command."""
    seed = secrets.randbits(32)
    process = start("train", home / "recipe.yaml", "-o", "run", cwd=tmp_path)
    wait_until(Path("run/checkpoints/last.pt").exists, process)
    time.sleep(random.Random(seed).uniform(0, 0.7))
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (-number, 128 + number, 0), (seed, err)
    finished = Path("run/results.json").exists()
    if process.returncode == 128 + number and not finished:
        assert err.startswith("Stopped"), (seed, err)
        assert err.count("\n") == 1
    done = semiseg("train", home / "recipe.yaml", "-o", "run")
    assert done.code == 0, (seed, done.err)
    assert finished or "going on at step" in done.out
    assert "random weights" not in done.out, "it goes on from its own"
    same_outcome(Path("run"), home / "run")


@pytest.mark.parametrize("method", ["fixmatch", "selftraining"])
def test_a_run_that_starts_from_another(
    semiseg: Command, recipe: Path, scenes: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """It says what it took. Begun, it needs the other run no more, unless a later stage starts there too."""
    names = api.data_of(recipe).classes
    here = [*names[1:], "whatever"]
    assert semiseg("train", recipe, "-o", "first", "train.steps=2").code == 0
    words = ("train", recipe, f"method={method}", "network.weights=first", f"data.classes={json.dumps(here)}", "-o")
    step = Supervised.step if method == "selftraining" else FixMatch.step

    def stopped(trained: Any, clock: Clock, **batches: Any) -> dict[str, torch.Tensor]:
        if clock.step == 4:
            signal.raise_signal(signal.SIGTERM)
        return step(trained, clock, **batches)

    whole = semiseg(*words, "whole")
    assert whole.code == 0, whole.err
    assert "first: the whole network loaded" in whole.out
    assert f"  classes with the same name: {', '.join(names[1:])}\n" in whole.out
    assert "  new classes, whose rows of the last layer are left random: whatever\n" in whole.out
    assert f"  classes of that run that are not used: {names[0]}\n" in whole.out
    with monkeypatch.context() as patch:
        patch.setattr(Supervised if method == "selftraining" else FixMatch, "step", stopped)
        assert semiseg(*words, "run").code == 143
    shutil.rmtree("first")
    again = semiseg(*words, "run")
    if method == "selftraining":
        assert "first is not there" in again.sentence
    else:
        assert "going on at step 5 of 12" in again.out
        same_outcome(Path("run"), Path("whole"))
    assert "holds this run, finished" in semiseg(*words, "whole").out
    assert "network.weights: first is not there (looked for in " in semiseg(*words, "third").sentence
    assert semiseg("evaluate", "whole").code == 0


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="how far a process has come is read from /proc")
def test_ctrl_c_while_it_starts(home: Path, tmp_path: Path) -> None:
    process = start("train", home / "recipe.yaml", "-o", "run", cwd=tmp_path)
    wait_until(lambda: "libtorch" in Path(f"/proc/{process.pid}/maps").read_text(), process)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "Stopped.\n")
    assert not (tmp_path / "run").exists()


def signal_at(call: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with Ctrl-C at the beginning of one call."""
    calls: list[int] = []

    def wrapper(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            signal.raise_signal(signal.SIGINT)
        return function(*args)

    return wrapper


@pytest.mark.parametrize(("call", "step"), [(1, 12), (2, 24)])
def test_ctrl_c_while_val_is_evaluated(
    semiseg: Command, home: Path, monkeypatch: pytest.MonkeyPatch, call: int, step: int
) -> None:
    """The evaluation is cut short, and made up for before the run goes on."""
    words = ("train", home / "recipe.yaml", "-o", "run", "train.workers=0")
    with monkeypatch.context() as patch:
        patch.setattr(session, "evaluate", signal_at(call, session.evaluate))
        done = semiseg(*words)
    assert (done.code, done.err) == (130, f"Stopped at step {step} of 24: the same command goes on from there.\n")
    assert f"step {step}: val mIoU" not in done.out
    assert "run holds a run that is not finished" in semiseg("evaluate", "run").sentence
    done = semiseg(*words)
    assert done.code == 0, done.err
    assert f"step {step}: val mIoU" in done.out
    same_outcome(Path("run"), home / "run")


def test_ctrl_c_while_the_test_images_are_evaluated(
    semiseg: Command, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("train", home / "recipe.yaml", "-o", "run", "train.workers=0")
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "evaluate", signal_at(1, experiment.evaluate))
        done = semiseg(*words)
    assert (done.code, done.err) == (130, "Stopped.\n")
    assert "run holds no finished run" in semiseg("compare", "run").sentence
    done = semiseg(*words)
    assert done.code == 0, done.err
    assert "loss" not in done.out, "nothing is trained again"
    same_outcome(Path("run"), home / "run")
