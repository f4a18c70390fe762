"""What a user may get wrong: one clear sentence, exit code 1, and nothing half-written."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from semiseg.engine import evaluate
from semiseg.methods import FixMatch
from semiseg.networks.weights import save_model
from semiseg.types import Clock

Command = Callable[..., Any]
"""The fixture `semiseg` of conftest.py."""

linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux has this file system, and this limit")


@pytest.fixture
def refused(semiseg: Command, recipe: Path, tmp_path: Path) -> Callable[..., str]:
    """Trains by the recipe with overrides, which must be refused: the sentence. Nothing may be left."""

    def train(*overrides: object, source: Path = recipe) -> str:
        before = tree(tmp_path)
        sentence = semiseg("train", source, "-o", "runs/run", *overrides).sentence
        assert tree(tmp_path) == before
        return str(sentence)

    return train


def tree(folder: Path) -> set[str]:
    """Everything below a folder but the cache and an empty runs/."""
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    return {name for name in found if not name.startswith(".cache")} - {"runs"}


def save(path: Path, pixels: np.ndarray) -> None:
    Image.fromarray(pixels).save(path)


# ---- folders and files -------------------------------------------------------------------------------------------


def test_missing_recipe(refused: Command) -> None:
    text = refused(source=Path("nowhere.yaml"))
    assert text == "nowhere.yaml does not exist: name a recipe (a .yaml file) or a folder with images."


def test_missing_folder(refused: Command, semiseg: Command, tmp_path: Path) -> None:
    assert "data.root nowhere is not there" in refused("data.root=nowhere")
    before = tree(tmp_path)
    assert "nowhere is not a folder: name one with" in semiseg("init", "nowhere", "-o", "new.yaml").sentence
    assert "nowhere does not exist: name a recipe" in semiseg("check", "nowhere").sentence
    assert tree(tmp_path) == before


@pytest.mark.parametrize("inside", [(), ("images", "masks")])
def test_empty_folder(refused: Command, semiseg: Command, tmp_path: Path, inside: tuple[str, ...]) -> None:
    for name in ("", *inside):
        (tmp_path / "empty" / name).mkdir()
    expected = "empty has no training image: add some below images/" if inside else "empty/images is not a folder: put"
    assert expected in refused(source=tmp_path / "empty")
    assert expected in refused("data.root=empty", "data.format=folder", "data.classes=[a, b]")
    assert expected in semiseg("init", "empty", "-o", "new.yaml").sentence
    assert expected in semiseg("check", "empty").sentence
    assert not {"new.yaml", "check.png"} & tree(tmp_path)


def test_no_training_image(refused: Command, scenes: Path) -> None:
    for kind in ("images", "masks"):
        shutil.rmtree(scenes / kind / "train")
        (scenes / kind / "train").mkdir()
    assert "has no training image: add some below images/train/" in refused()


def test_no_labelled_image(refused: Command, scenes: Path) -> None:
    shutil.rmtree(scenes / "masks/train")
    assert "has no labelled image: add masks below masks/train/" in refused()


MASK = "masks/train/scene-00003.png"


def test_mask_of_another_size(refused: Command, scenes: Path) -> None:
    save(scenes / MASK, np.zeros((40, 64), np.uint8))
    text = refused()
    assert f"{MASK}: is 64x40 px where its image" in text
    assert "images/train/scene-00003.png is 64x48 px" in text


def test_mask_of_another_size_in_other_data(semiseg: Command, recipe: Path, scenes: Path) -> None:
    """Data that no run has looked at is evaluated with the same care."""
    assert semiseg("train", recipe, "-o", "run", "train.steps=2").code == 0
    save(scenes / "masks/test/scene-00003.png", np.zeros((40, 64), np.uint8))
    text = semiseg("evaluate", "run", "--data", scenes).sentence
    assert "masks/test/scene-00003.png: is 64x40 px where its image" in text


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_mask_values_beyond_the_classes(refused: Command, scenes: Path, split: str) -> None:
    name = f"masks/{split}/scene-00003.png"
    save(scenes / name, np.full((48, 64), 9, np.uint8))
    assert f"{name}: has mask values 9 beyond the 7 classes" in refused()


def test_mask_colours_that_no_class_has(refused: Command, scenes: Path) -> None:
    save(scenes / MASK, np.full((48, 64, 3), (1, 2, 3), np.uint8))
    assert f"{MASK}: has colours (1, 2, 3) that are not in the class file" in refused()


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"no image"])
@pytest.mark.parametrize("name", ["images/train/scene-00003.png", MASK, "images/val/scene-00001.png"])
def test_damaged_file(refused: Command, scenes: Path, name: str, damage: Callable[[bytes], bytes]) -> None:
    (scenes / name).write_bytes(damage((scenes / name).read_bytes()))
    text = refused()
    assert name in text
    assert text.endswith("replace or remove it.")


@pytest.mark.parametrize("split", ["val", "test"])
def test_same_image_twice(refused: Command, scenes: Path, split: str) -> None:
    with Image.open(scenes / "images/train/scene-00003.png") as image:
        image.save(scenes / f"images/{split}/scene-00003.png", compress_level=9)
    text = refused()
    assert f"The labelled and {split} images share some" in text
    assert f"images/train/scene-00003.png = images/{split}/scene-00003.png" in text


def test_more_labels_than_there_are(refused: Command) -> None:
    text = refused("data.labelled=9")
    assert text == "data.labelled asks for 9 images, but 8 training images have a mask: lower it."


def test_damaged_unlabelled_image_is_passed_over(semiseg: Command, recipe: Path, scenes: Path) -> None:
    """Named once in what is printed, counted in results.json; and no reason to refuse."""
    name = "images/train/scene-00010.png"
    (scenes / name).write_bytes(b"no image")
    done = semiseg("train", recipe, "-o", "run")
    assert done.code == 0, done.err
    assert done.out.count(name) == 1
    assert "unlabelled images that could not be read: 1, named in results.json" in done.out
    skipped = json.loads(Path("run/results.json").read_text())["skipped"]
    assert [Path(path).name for path in skipped] == ["scene-00010.png"]
    assert "is not an image" in next(iter(skipped.values()))
    report = semiseg("check", recipe)
    assert report.code == 0
    assert f"warning: Unlabelled images that cannot be read are passed over ({name})." in report.out


# ---- options -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("network.name=fnp", "network.name: fnp is unknown; did you mean fpn?"),
        ("network.encoder=resnet_50", "network.encoder: resnet_50 is unknown; did you mean resnet50 or "),
        ("network.encoder=zzz", "network.encoder: zzz is unknown; no name like it is among the "),
        ("method=fixmach", "method.name: fixmach is unknown; did you mean fixmatch or unimatch"),
        ("method=zzz", "method.name: zzz is unknown; known: advsemiseg, cps, cutmixseg, "),
        ("method=advsemi", "method.name: advsemi is unknown; did you mean advsemiseg?"),
        ("method.jiter=[0,0,0,0]", "method.jiter is unknown; did you mean jitter?"),
        ("method.loss.kid=ce", "method.loss.kid is unknown; did you mean kind?"),
        ("train.stps=4", "train.stps is unknown; did you mean steps?"),
        ("trian.steps=4", "trian.steps=4: there is no section trian; did you mean train?"),
        ("steps=4", "steps=4: name the section too, train.steps=4."),
        ("train=4", "train=4: name the option too, as in train.steps=4."),
        ("steps", "steps: an override has the form section.key=value, such as train.steps=600."),
        ("network.options={pyramid: 64}", "network.options of fpn: pyramid is unknown; known: decoder_dropout, "),
        ("network.encoder_options={foo: 1}", "network.encoder_options: test_resnet has no foo; remove it."),
        ("train.steps=0", "train.steps is 0, but it should be above 0."),
        ("train.batch=0", "train.batch is 0, but it should be above 0."),
        ("train.batch=-8", "train.batch is -8, but it should be above 0."),
        ("train.crop=[0,32]", "train.crop is [0, 32], but each entry should be above 0."),
        ("train.crop=32", "train.crop is 32, but it should be a list such as [320, 320]."),
        ("train.crop=[32]", "train.crop is [32], but it should be a longer list such as [320, 320]."),
        ("train.crop=[32,32,32]", "train.crop is [32, 32, 32], but it should be a list of 2 such as [320, 320]."),
        ("train.steps=many", "train.steps is 'many', but it should be a whole number."),
        ("train.steps=1.5", "train.steps is 1.5, but it should be a whole number."),
        ("train.steps=[", "train.steps=[: the value is not valid YAML (line 1, column 2: "),
        ("train.device=gpu", "train.device is 'gpu', but it should be auto, cpu or cuda."),
        ("optim.lr=nan", "optim.lr is 'nan', but it should be a finite number."),
        ("optim.momentum=1", "optim.momentum is 1, but it should be below 1."),
        ("evaluate.scales=[]", "evaluate.scales is [], but it should be a list of at least 1 such as [1.0]."),
        ("data.size=0", "data.size is 0, but it should be above 0."),
        ("data.size=[0,9]", "data.size is [0, 9], but each entry should be above 0."),
        ("data.labelled=[1]", "data.labelled is [1], but it should be a whole number or text."),
        ("data.labelled=ids.txt", "data.labelled ids.txt is not there (looked for "),
        ("data.labelled=3/2", "data.labelled is 3/2: a share is above 0 and at most 1, such as 1/8."),
        ("data.labelled=1.5", "data.labelled is 1.5: a share is above 0 and at most 1, such as 1/8."),
        ("method.loss={kind: ohem, class_weights: true}", "method.loss.class_weights has no effect on kind: ohem"),
        ("data.scale=[2,1]", "data.scale must be [smallest, largest], not [2.0, 1.0]."),
        ("data.fold=2", "data.fold is 2: set data.folds above it, or lower it."),
        ("data.folds=3", "data.folds is set, but the data is divided into train/val/test: remove the option."),
        ("data.root=", "data.root is empty, but it should be text."),
        ("data.channels=4", "has 3 channels where data.channels is 4; set data.channels to 3."),
        ("data.unlabelled=none", "learns from unlabelled images too, and there is none: change data.unlabelled"),
        ("network.mean=[1,2]", "network.mean has 2 numbers, but images have 3 channels: give 1 or 3."),
        ("network.weights=nowhere", "network.weights: nowhere is not there (looked for in "),
        ("network.weights=scenes", "scenes is a folder without a model: name a run, or a .safetensors file."),
        ("method.name=my.py:Mine", "my.py does not exist: correct the path before the colon."),
    ],
)
def test_option(refused: Command, override: str, expected: str) -> None:
    assert expected in refused(override)


OTHER_CLASSES = """
import segmentation_models_pytorch as smp

def three(channels, classes):
    return smp.FPN("tu-test_resnet", encoder_weights=None, in_channels=channels, classes=3)
"""


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ("method.threshold=1.01", "method.threshold is 1.01, but it should be at most 1."),
        ("method.threshold=-0.1", "method.threshold is -0.1, but it should be at least 0."),
        ("method.semi_start=1", "method.semi_start is 1, but it should be below 1."),
        ("method.lambda_adv=-1", "method.lambda_adv is -1, but it should be at least 0."),
        ("method.critic=patch", "method.critic is 'patch', but it should be pixel or image."),
        ("method.critic_scale=0", "method.critic_scale is 0, but it should be above 0."),
        ("method.critic_scale=1000", "method.critic_scale is 1000, but it should be at most 16."),
        ("method.critic_lr=0", "method.critic_lr is 0, but it should be above 0."),
        ("method.real_smoothing=1", "method.real_smoothing is 1, but it should be below 1."),
        (
            "data.unlabelled=none method.lambda_semi=0.1",
            "method.lambda_semi is given, but data.unlabelled is none: remove the one or the other.",
        ),
        (
            "train.crop=[16,48]",
            "train.crop: 16x48 px, times method.critic_scale=1, are less than the 32 px that the critic needs: ",
        ),
        (
            "network.name=own.py:three",
            "network.name: the network gives 3 classes, the data has 7.",
        ),
    ],
)
def test_option_of_advsemiseg(refused: Command, tmp_path: Path, overrides: str, expected: str) -> None:
    (tmp_path / "own.py").write_text(OTHER_CLASSES)
    assert refused("method=advsemiseg", *overrides.split()).startswith(expected)


@pytest.mark.parametrize(
    ("method", "override", "expected"),
    [
        ("fixmatch", "cutmix_area=[0.6,0.4]", "cutmix_area goes from 0.6 down to 0.4: put the smaller number first."),
        ("cutmixseg", "area=[0.6,0.4]", "area goes from 0.6 down to 0.4: put the smaller number first."),
        ("meanteacher", "weight=-1", "weight is -1, but it should be at least 0."),
        ("meanteacher", "ramp=2", "ramp is 2, but it should be at most 1."),
        ("meanteacher", "ema=1", "ema is 1, but it should be below 1."),
        ("cutmixseg", "threshold=1.01", "threshold is 1.01, but it should be at most 1."),
        ("cutmixseg", "confidence=image", "confidence is 'image', but it should be batch, pixel or none."),
        ("cutmixseg", "mask=box", "mask is 'box', but it should be cutmix or cutout."),
        ("u2pl", "warm_up=1", "warm_up is 1, but it should be below 1."),
        ("u2pl", "alpha=101", "alpha is 101, but it should be at most 100."),
        ("u2pl", "temperature=0", "temperature is 0, but it should be above 0."),
        ("st", "strong.cutout=2", "strong.cutout is 2, but it should be at most 1."),
        (
            "st",
            "strong.cutout_area=[0.4,0.02]",
            "strong.cutout_area goes from 0.4 down to 0.02: put the smaller number first.",
        ),
        ("st", "snapshots=3", "snapshots is unknown; known: flip, loss, scales, strong."),
        ("st", "scales=[0]", "scales is [0], but each entry should be above 0."),
        ("st++", "snapshots=1", "snapshots is 1, but it should be at least 2."),
        ("st++", "strong.blurr=1", "strong.blurr is unknown; did you mean blur?"),
    ],
)
def test_option_of_another_method(refused: Command, method: str, override: str, expected: str) -> None:
    assert refused(f"method={method}", f"method.{override}") == f"method.{expected}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "r.yaml is not a recipe: write sections such as data, method and train into it."),
        ("[1, 2]", "r.yaml is not a recipe: write sections"),
        ("data: {root: x", "r.yaml is not valid YAML (line 1, column 15: expected ',' or '}', but got"),
        ("data: x", "r.yaml: data is 'x', but it should be a group of the form {option: value}."),
        ("train: {steps: 5}", "r.yaml: data is missing: write it there."),
        ("data: {format: folder}", "r.yaml: data.root is missing: write it there."),
        ("data: {root: x}\nfoo: 1", "r.yaml: foo is unknown; known: baseline, data, evaluate, "),
        (
            "data: {root: x}\nmethod: 3",
            "r.yaml: method has no name: give one, supervised or fixmatch or advsemiseg or ",
        ),
        ("data: {root: x}\nmethod: {ema: 2}", "r.yaml: method.ema is 2, but it should be below 1."),
        ("data: {root: x}\noptim: {rate: 2}", "r.yaml: optim.rate is unknown; did you mean "),
    ],
)
def test_recipe(refused: Command, tmp_path: Path, text: str, expected: str) -> None:
    """What is wrong in a file is looked for in that file."""
    (tmp_path / "r.yaml").write_text(text)
    assert expected in refused(source=Path("r.yaml"))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"no weights at all", "weights.safetensors cannot be read as safetensors ("),
        (
            {"a.b": torch.zeros(3)},
            "weights.safetensors: none of its 1 tensors (a.b) fits the encoder; set network.encoder",
        ),
    ],
)
def test_weights(refused: Command, tmp_path: Path, content: bytes | dict[str, torch.Tensor], expected: str) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content) if isinstance(content, bytes) else save_file(content, path)
    assert expected in refused("network.weights=weights.safetensors")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            torch.nn.ReLU(),
            "w.pth holds torch.nn.modules.activation.ReLU, but only tensors are opened: store the ",
        ),
        ({"epoch": 3}, "w.pth holds something else than tensors by name: name a file of a network's weights."),
        (b"no weights at all", "w.pth is damaged, or not in torch's format: store the tensors alone, or name another "),
        ({"a.b": torch.zeros(3)}, "w.pth: none of its 1 tensors (a.b) fits the encoder; set network.encoder"),
    ],
    ids=["object", "numbers", "text", "other network"],
)
def test_weights_of_torch(refused: Command, tmp_path: Path, content: object, expected: str) -> None:
    path = tmp_path / "w.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    assert expected in refused("network.weights=w.pth")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, "other is a folder without a model: name a run, or a .safetensors file."),
        (
            {"recipe.yaml": ""},
            "other holds a run that is not finished: the same `semiseg train` command goes on with it.",
        ),
        ({"model/model.json": "{"}, "other/model/model.json is damaged ("),
        ({"model.json": "{}"}, "other/model.safetensors cannot be read as safetensors ("),
    ],
    ids=["empty", "unfinished", "damaged", "half"],
)
def test_another_run(refused: Command, tmp_path: Path, files: dict[str, str], expected: str) -> None:
    (tmp_path / "other" / "model").mkdir(parents=True)
    for name, text in files.items():
        (tmp_path / "other" / name).write_text(text)
    if "model/model.json" not in files:
        (tmp_path / "other" / "model").rmdir()
    assert expected in refused("network.weights=other")


@pytest.mark.parametrize(
    ("network", "channels", "expected"),
    [
        (
            {"name": "unet"},
            3,
            "other has network.name=unet, this recipe network.name=fpn: make the network that one, or name another ",
        ),
        ({}, 1, "other is for images of 1 channels, but data.channels is 3: name a run on images like yours."),
        ({}, 3, "other holds another network (normalise.mean, normalise.std, "),
    ],
)
def test_another_run_of_another_network(
    refused: Command, tmp_path: Path, network: dict[str, Any], channels: int, expected: str
) -> None:
    known = {"name": "fpn", "encoder": "test_resnet", "options": {}, "encoder_options": {}}
    card = {"network": known | network, "classes": ["a", "b"], "channels": channels}
    save_model(tmp_path / "other" / "model", {"a.b": torch.zeros(3)}, card)
    assert expected in refused("network.weights=other")


# ---- memory ------------------------------------------------------------------------------------------------------

LITTLE_MEMORY = """
import resource, sys
import segmentation_models_pytorch, timm, torch
import semiseg.api
torch.nn.Conv2d(3, 3, 3)(torch.zeros(1, 3, 8, 8)).sum().backward()
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[1]), resource.RLIM_INFINITY))
from semiseg.cli import main
del sys.argv[1]
main()
"""


@linux
def test_refused_memory(recipe: Path, tmp_path: Path) -> None:
    """The system's own refusal, on a CPU: 600 MB more than the packages need, for images of 50 MB a batch."""
    words = ["600000000", "train", recipe, "-o", "run", "train.batch=16", "train.crop=[512,512]"]
    command = [sys.executable, "-c", LITTLE_MEMORY, *map(str, words)]
    before = tree(tmp_path)
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "SEMISEG_CACHE": ".cache"},
        capture_output=True,
        text=True,
        check=False,
    )
    sentence = "Out of memory with train.batch=16 and train.crop=[512, 512]: try train.batch=8 or train.crop=[384,384]."
    assert (done.returncode, done.stderr) == (1, f"error: {sentence}\n")
    assert tree(tmp_path) == before


ALLOCATOR = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to ..."
SMALLER = "Out of memory with train.batch=4 and train.crop=[32, 32]: try train.batch=2 or a smaller network.encoder."


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total ..."), SMALLER),
        (RuntimeError(ALLOCATOR), SMALLER),
        (MemoryError(), SMALLER),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "lower train.workers."),
    ],
)
def test_out_of_memory(refused: Command, monkeypatch: pytest.MonkeyPatch, error: Exception, expected: str) -> None:
    def step(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(FixMatch, "step", step)
    assert refused().endswith(expected)


def test_image_too_large_for_the_memory(
    semiseg: Command, recipe: Path, scenes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert semiseg("train", recipe, "-o", "run", "train.steps=2").code == 0

    def whole(net: Any, image: torch.Tensor, *_: Any) -> torch.Tensor:
        raise RuntimeError(ALLOCATOR)

    usual = evaluate._probabilities
    monkeypatch.setattr(evaluate, "_probabilities", whole)
    expected = (
        "Out of memory on an image of 64x48 px: let it be seen in parts by evaluate.window=[32,32] in a recipe, "
        "or --window 32 of evaluate and predict."
    )
    assert semiseg("evaluate", "run").sentence == expected
    assert semiseg("predict", "run", scenes / "images/test", "-o", "out").sentence == expected
    assert [path.name for path in Path("out").iterdir()] == ["predicted.json"]
    monkeypatch.setattr(evaluate, "_probabilities", usual)
    assert semiseg("predict", "run", scenes / "images/test", "-o", "out", "--window", "32").code == 0, "as it was told"


# ---- where the run goes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["file/run", "file", pytest.param("/proc/run", marks=linux)])
def test_folder_that_cannot_be_written(semiseg: Command, recipe: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("mine")
    before = tree(tmp_path)
    text = semiseg("train", recipe, "-o", place).sentence
    assert text.startswith(f"{place} ")
    assert text.endswith("choose another --out.")
    assert tree(tmp_path) == before
    assert (tmp_path / "file").read_text() == "mine"


def test_other_files_that_cannot_be_written(semiseg: Command, recipe: Path, scenes: Path, tmp_path: Path) -> None:
    assert semiseg("train", recipe, "-o", "run", "train.steps=2").code == 0
    (tmp_path / "file").write_text("mine")
    for words in (
        ("init", scenes, "-o", "file/recipe.yaml"),
        ("check", recipe, "--sheet", "file/check.png"),
        ("predict", "run", scenes / "images/test", "-o", "file/out"),
        ("export", "run", "-o", "file/model.onnx"),
    ):
        text = semiseg(*words).sentence
        assert text.startswith("file/"), text
        assert "could not be written (a part of its path is a file): choose another folder." in text


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_folder_of_somebody_else(refused: Command, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def touch(path: Path, *_: Any) -> None:
        raise OSError(number, os.strerror(number), path)

    monkeypatch.setattr(Path, "touch", touch)
    assert refused() == f"runs/run cannot be written ({os.strerror(number)}): choose another --out."


def test_folder_with_something_else(semiseg: Command, recipe: Path, scenes: Path) -> None:
    before = tree(scenes)
    assert (
        "scenes holds something that is not a run: choose another --out."
        in semiseg("train", recipe, "-o", "scenes").sentence
    )
    assert tree(scenes) == before


def test_folder_with_a_run_of_another_recipe(semiseg: Command, recipe: Path) -> None:
    words = ("train", recipe, "-o", "run", "train.steps=2")
    assert semiseg(*words).code == 0
    before = {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")}
    for override, expected in {
        "train.steps=3": "train.steps=2, not 3: choose another --out, or remove that folder.",
        "method=supervised": "method.name=fixmatch, not supervised: ",
        "method.ema=0.9": "method.ema=0.99, not 0.9: ",
        "train.threads=2": "train.threads=1, not 2: ",
        "train.crop=[64,32]": "train.crop=[32, 32], not [64, 32]: ",
        "data.labelled=3": "data.labelled=null, not 3: ",
    }.items():
        assert f"run holds a run with {expected}" in semiseg(*words, override).sentence
    assert {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")} == before
    assert semiseg(*words, "train.workers=1", "train.save_every=7").code == 0, "what cannot change the weights is free"


@contextmanager
def files_end_at(size: int) -> Iterator[None]:
    """No file of this process can grow beyond `size` bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_disk_full_at_the_start(refused: Command) -> None:
    with files_end_at(100):
        text = refused()
    assert (
        text == "runs/run/recipe.yaml could not be written (File too large): free some space or choose another folder."
    )


def test_disk_full_on_the_way(semiseg: Command, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint before stays good, and the same command goes on from it to the same weights."""
    assert semiseg("train", recipe, "-o", "whole").code == 0
    step = FixMatch.step

    def stopped(method: FixMatch, clock: Clock, **batches: Any) -> dict[str, torch.Tensor]:
        if clock.step == 4:
            signal.raise_signal(signal.SIGTERM)
        return step(method, clock, **batches)

    with monkeypatch.context() as patch:
        patch.setattr(FixMatch, "step", stopped)
        assert semiseg("train", recipe, "-o", "run").code == 143
    before = {path: path.read_bytes() for path in Path("run/checkpoints").iterdir()}
    with files_end_at(300_000):
        text = semiseg("train", recipe, "-o", "run").sentence
    assert text.startswith("run/checkpoints/")
    assert text.endswith("free some space or choose another folder.")
    assert {path: path.read_bytes() for path in Path("run/checkpoints").iterdir()} == before
    assert not list(Path("run").rglob(".*")), "a temporary file was left"
    done = semiseg("train", recipe, "-o", "run")
    assert "going on at step 5 of 12" in done.out
    assert Path("run/model/model.safetensors").read_bytes() == Path("whole/model/model.safetensors").read_bytes()


def test_loss_that_is_not_finite(refused: Command, semiseg: Command, recipe: Path) -> None:
    text = refused("optim.lr=1e30", "train.log_every=1")
    assert "The loss is not finite at step 1; there is no checkpoint yet; lower optim.lr or look at" in text
    assert text.count("images/train/scene-000") == 8, "the images of both streams are named"
    text = semiseg("train", recipe, "-o", "run", "optim.lr=1e30", "train.save_every=1").sentence
    assert "the last good checkpoint is of step 1" in text
    assert torch.load("run/checkpoints/last.pt", weights_only=True)["step"] == 1
