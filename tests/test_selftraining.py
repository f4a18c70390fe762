"""Self-training: what each stage learns from, and what a run of several stages tells."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from semiseg import api, testing
from semiseg.config import build_of
from semiseg.data.loader import Steps
from semiseg.data.rows import Rows
from semiseg.data.sampling import Stream, draws
from semiseg.data.splits import Data
from semiseg.engine import session
from semiseg.engine.session import Session, Trainable, _timetable
from semiseg.methods import SelfTraining, Supervised
from semiseg.types import InferenceConfig, InputError

CASE = {"least_pixels": 8}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEMISEG_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def case(tmp_path: Path) -> testing.Case:
    return testing.Case("selftraining", tmp_path, CASE)


class Noted(Session):
    """Notes what is trained; pseudo-labels are the masks of the labelled images."""

    def train(
        self,
        method: Trainable,
        data: Data,
        streams: Mapping[str, Stream] | None = None,
        keep: Sequence[float] = (),
    ) -> nn.Module:
        assert streams is not None
        assert isinstance(method, Supervised)
        self.trained.append(self)
        notes.append((self.folder.name, method, streams["labelled"]))
        return method.predictor()

    def pseudo_label(
        self, net: nn.Module, rows: Rows, data: Data, inference: InferenceConfig, least: float = 0.0, top: int = 1
    ) -> Rows:
        taught.append((self.folder.name, net, inference, least))
        masks = (data.labelled[i % len(data.labelled)].mask or Path() for i in range(len(rows)))
        return rows.with_masks(masks, data.code.plain())


notes: list[tuple[str, Supervised, Stream]] = []
taught: list[tuple[str, nn.Module, InferenceConfig, float]] = []


def fitted(case: testing.Case, **options: Any) -> nn.Module:
    notes.clear()
    taught.clear()
    case = case.with_options(options)
    recipe, data = case.recipe(), case.data()
    build = build_of(recipe, data, torch.device("cpu"), case.base)
    session = Noted(case.folder / "run", recipe.train, recipe.evaluate, torch.device("cpu"))
    assert isinstance(recipe.method.options, SelfTraining.Config)
    return SelfTraining(recipe.method.options, build).fit(session, data)


def test_stages(case: testing.Case) -> None:
    """Each student is the teacher of the next, and has random numbers of its own."""
    net = fitted(case, rounds=2, flip=True, scales=[0.5, 1.0], least=0.3)
    assert [name for name, _, _ in notes] == ["teacher", "round-1", "round-2"]
    networks = [method.predictor() for _, method, _ in notes]
    assert net is networks[-1]
    assert [(name, teacher) for name, teacher, _, _ in taught] == list(
        zip(("round-1", "round-2"), networks, strict=False)
    )
    assert all(i == InferenceConfig(flip=True, scales=(0.5, 1.0)) and least == 0.3 for _, _, i, least in taught)
    heads = [n.state_dict()["head.weight"] for n in networks]
    assert not any(torch.equal(heads[i], heads[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def epochs(stream: Stream, number: int) -> list[Counter[bool]]:
    """How many of the samples of each epoch are pseudo-labelled."""
    assert stream.mixture is not None
    size = stream.mixture.items
    timetable = _timetable({"labelled": stream}, number * size + 4)
    rows = np.concatenate([draws(stream, timetable, "labelled", 0, step).rows for step in range(timetable.steps)])
    return [Counter((rows[i * size : (i + 1) * size] >= 4).tolist()) for i in range(number)]


@pytest.mark.parametrize(("ratio", "pseudo"), [(None, 8), (1.0, 4), (3.0, 12), (0.01, 1)])
def test_the_ratio_of_an_epoch(case: testing.Case, ratio: float | None, pseudo: int) -> None:
    fitted(case, ratio=ratio)
    (_, _, teacher), (_, _, student) = notes
    assert len(teacher.rows) == 4
    assert len(student.rows) == 12
    assert [row.code is None for row in student.rows] == [True] * 4 + [False] * 8
    assert epochs(teacher, 3) == [Counter({False: 4})] * 3
    assert epochs(student, 5) == [Counter({False: 4, True: pseudo})] * 5


def test_a_teacher_with_another_network(case: testing.Case, tmp_path: Path) -> None:
    fitted(case, teacher_network={"name": "unet", "encoder": "test_resnet", "weights": "random"}, rounds=2)
    kinds = [type(getattr(method.predictor(), "decoder", None)).__name__ for _, method, _ in notes]
    assert kinds[0] == "UnetDecoder"
    assert kinds[1] == kinds[2] != "UnetDecoder"


def test_no_unlabelled_image_can_be_read(case: testing.Case, tmp_path: Path) -> None:
    data = case.data()
    for row in data.unlabelled:
        row.image.write_bytes(b"no image")
    with pytest.raises(InputError, match="No unlabelled image can be read"):
        api.train(case.recipe(steps=2, save_every=2, evaluations=1), tmp_path / "run")


@pytest.mark.parametrize(
    ("network", "sentence"),
    [
        ({"encodr": "x"}, r"method\.teacher_network\.encodr is unknown; did you mean encoder"),
        ({"frozen_norm": "some"}, r"method\.teacher_network\.frozen_norm is 'some', but it should be"),
        ({"name": "unett"}, r"method\.teacher_network: network\.name: unett is unknown"),
    ],
)
def test_a_wrong_network_of_the_teacher(case: testing.Case, network: dict[str, str], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        fitted(case, teacher_network={"weights": "random", **network})


def test_soft_labels(case: testing.Case) -> None:
    """As many classes as there are at most; the teacher's stage has masks alone."""
    fitted(case, top=9)
    assert [stream.top for _, _, stream in notes] == [1, 3]
    with pytest.raises(InputError, match=r"top needs loss\.kind: ce or ce\+dice"):
        case.with_options({"top": 2, "loss": {"kind": "ohem"}}).recipe()


def test_what_a_pseudo_label_counts(case: testing.Case) -> None:
    """Only in the students, and from the first row that has one."""
    fitted(case, pseudo_weight=0.25)
    assert [method.pseudo for _, method, _ in notes] == [None, (4, 0.25)]
    with pytest.raises(InputError, match=r"pseudo_weight needs loss\.kind: ce or ce\+dice"):
        case.with_options({"pseudo_weight": 0.5, "loss": {"kind": "ohem"}}).recipe()


def test_a_ratio_a_batch(case: testing.Case) -> None:
    fitted(case, ratio=3.0, per_batch=True)
    student = notes[1][2]
    for step in range(12):
        rows = draws(student, _timetable({"labelled": student}, 48), "labelled", 0, step).rows
        assert int((rows < 4).sum()) == 1


def test_crops_around_places(case: testing.Case) -> None:
    fitted(case, ratio=10.0, centred=0.6)
    assert notes[1][2].mixture is not None
    rows, at = notes[1][2].mixture.epoch(0, 1, 0)
    around = at[:, 0] >= 0
    assert int(around[rows >= 4].sum()) == 24  # 8 of each of three classes
    many = [notes[1][2].mixture.epoch(0, 1, number) for number in range(30)]
    real = sum(int(((at[:, 0] >= 0) & (rows < 4)).sum()) for rows, at in many)
    assert real == pytest.approx(0.6 * 4 * 30, abs=3)  # less than one a class and epoch: classes take turns
    fitted(case, centred=0.0)
    assert all(part.centroids is None for _, _, s in notes if s.mixture is not None for part in s.mixture.parts)


def test_without_unlabelled_images(case: testing.Case) -> None:
    case.data()
    recipe = case.recipe()
    build = build_of(recipe, case.data(), torch.device("cpu"))
    data = replace(case.data(), unlabelled=case.data().unlabelled[:0])
    session = Session(case.folder / "run", recipe.train, recipe.evaluate, torch.device("cpu"))
    with pytest.raises(
        InputError, match=r"labels unlabelled images, and there is none: change data\.unlabelled or method"
    ):
        SelfTraining(SelfTraining.Config(), build).fit(session, data)


def test_a_run_from_the_recipe_to_the_model(
    case: testing.Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case.data()
    recipe = case.with_options({"least": 0.4}).recipe(steps=4, save_every=4, evaluations=1)
    model = api.train(recipe, tmp_path / "run")
    results = json.loads((tmp_path / "run/results.json").read_text())
    labelling = json.loads((tmp_path / "run/round-1/pseudo/report.json").read_text())["seconds"]
    stages = [torch.load(tmp_path / f"run/{s}/checkpoints/last.pt", weights_only=True) for s in ("teacher", "round-1")]
    assert results["seconds"] == pytest.approx(sum(state["progress"]["seconds"] for state in stages) + labelling)
    assert results["val_last"] == stages[1]["progress"]["last"]
    assert results["stages"] == {
        s: state["progress"]["best"] for s, state in zip(("teacher", "round-1"), stages, strict=True)
    }
    assert results["miou"] == results["val_best"]["miou"]
    said = capsys.readouterr().out
    assert "of the pixels have a pseudo-label, of a confidence of at least 0.4" in said
    assert said.count("starts from") == 1
    assert "with crops around places, of the " in said
    shown = json.loads((tmp_path / "run/round-1/sampling.json").read_text())
    assert shown["samples"] == 12
    assert list(shown["classes"]) == ["ground", "thing", "rare"]
    delivered = load_file(tmp_path / "run/round-1/checkpoints/delivered.safetensors")
    assert isinstance(model.predictor.net, nn.Module)
    tensors: dict[str, Tensor] = model.predictor.net.state_dict()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in delivered.items())
    before = (tmp_path / "run/teacher/checkpoints/last.pt").stat().st_mtime_ns
    api.train(recipe, tmp_path / "run")
    assert (tmp_path / "run/teacher/checkpoints/last.pt").stat().st_mtime_ns == before


def test_labels_of_a_teacher_that_was_trained_anew(case: testing.Case) -> None:
    """A stage whose folder was removed is made again; what it had labelled is not taken for its own."""
    testing.run(case, "run", steps=3, evaluations=1)
    folder = case.folder / "run"
    for path in sorted((folder / "teacher").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    with pytest.raises(
        InputError, match="holds pseudo-labels that differ in teacher: remove the folder to make them anew"
    ):
        testing.run(case, "run", steps=4, evaluations=1)


def test_statistics_are_refreshed_from_what_was_learned_from(
    case: testing.Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the shares of real and pseudo-labelled images that the student had, with crops anywhere."""
    case.data()
    seen = []

    def steps(streams: Mapping[str, Stream], *rest: Any) -> Steps:
        seen.append(streams["labelled"])
        return Steps(streams, *rest)

    monkeypatch.setattr(session, "Steps", steps)
    monkeypatch.setattr(session, "REFRESH", 2)
    recipe = case.with_options({"ratio": 2}).recipe(steps=4, evaluations=1, schedule="fine2coarse", crop=[32, 32])
    api.train(recipe, tmp_path / "run")
    trained, refreshed = seen[-2:]
    assert trained.mixture is not None
    assert refreshed.mixture is not None
    assert len(trained.phases) == 2
    assert [phase.crop for phase in refreshed.phases] == [(32, 32)]
    assert [(p.first, p.rows, p.items) for p in refreshed.mixture.parts] == [(0, 4, 4), (4, 8, 8)]
    assert [(p.first, p.rows, p.items) for p in trained.mixture.parts] == [(0, 4, 4), (4, 8, 8)]
    assert all(p.centroids is None for p in refreshed.mixture.parts)
    assert all(p.centroids is not None for p in trained.mixture.parts)
