"""From one data set to another with other classes: what the teachers' labels are, and what each stage learns from."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from needs import needed
from torch import Tensor, nn

from semiseg import api, testing
from semiseg.config import build_of
from semiseg.data.cache import open_mask
from semiseg.data.rows import Rows
from semiseg.data.sampling import Stream
from semiseg.data.splits import Data, load_data
from semiseg.engine.session import Session, Trainable
from semiseg.methods import Supervised, Transfer, transfer
from semiseg.methods.transfer import class_map
from semiseg.ops.losses import class_weights
from semiseg.ops.pseudo import Merge, Pair
from semiseg.types import IGNORE, InferenceConfig, InputError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEMISEG_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def case(tmp_path: Path) -> testing.Case:
    return testing.Case("transfer", tmp_path, {"least_pixels": 8, **needed("transfer", tmp_path)})


# ---- two teachers ----------------------------------------------------------------------------------------------------


def column(*probs: float) -> Tensor:
    return torch.tensor(probs).view(-1, 1, 1)


@pytest.mark.parametrize(
    ("first", "second", "label", "confidence"),
    [
        ((0.6, 0.2, 0.2), (0.5, 0.4, 0.1), 0, 0.6),  # the first decides, and the second sees nothing new
        ((0.2, 0.5, 0.3), (0.8, 0.1, 0.1), 1, 0.5),  # also where the second is surer of another old class
        ((0.9, 0.1, 0.0), (0.3, 0.1, 0.6), 2, 0.6),  # a new class is the second's, whatever the first says
        ((0.9, 0.1, 0.0), (0.5, 0.1, 0.4), IGNORE, 0.9),  # nearly a new class: nobody decides
        ((0.3, 0.3, 0.4), (0.9, 0.05, 0.05), IGNORE, 0.9),  # the first sees what means no class
        ((0.45, 0.35, 0.2), (0.9, 0.05, 0.05), IGNORE, 0.9),  # both below their thresholds
        ((0.9, 0.05, 0.05), (0.25, 0.25, 0.5), IGNORE, 0.9),  # the new class below its threshold, and too likely
    ],
)
def test_who_decides(first: Sequence[float], second: Sequence[float], label: int, confidence: float) -> None:
    """Old classes 0 and 1, new class 2; the first teacher's third class means none."""
    merge = Merge((0, 1, IGNORE), least=0.5, least_new=0.55, doubt=0.35)
    found, sure = merge(column(*first), column(*second))
    assert (int(found), float(sure)) == (label, pytest.approx(confidence))


def test_classes_that_mean_the_same_one_are_added() -> None:
    label, sure = Merge((1, 0, 1))(column(0.3, 0.4, 0.3), column(0.5, 0.5))
    assert (int(label), float(sure)) == (1, pytest.approx(0.6))


@pytest.mark.parametrize("seed", range(10))
def test_merging_like_a_slow_reference(seed: int) -> None:
    rng = np.random.default_rng(seed)
    theirs, ours = int(rng.integers(2, 7)), int(rng.integers(2, 7))
    to = tuple(int(t) if t < ours else IGNORE for t in rng.integers(0, ours + 2, theirs))
    least, least_new, doubt = rng.uniform(0, 0.6, 3)
    first, second = (rng.dirichlet(np.full(n, 0.5), (5, 4)).transpose(2, 0, 1) for n in (theirs, ours))
    label, _ = Merge(to, least, least_new, doubt)(torch.from_numpy(first), torch.from_numpy(second))
    new = set(range(ours)) - set(to)
    for y, x in np.ndindex(5, 4):
        known = dict.fromkeys((*range(ours), IGNORE), 0.0)
        for k, t in enumerate(to):
            known[t] += first[k, y, x]
        a, b = max(known, key=lambda c: known[c]), int(second[:, y, x].argmax())
        expected = IGNORE
        if b in new and second[b, y, x] >= least_new:
            expected = b
        elif known[a] >= least and sum(second[c, y, x] for c in new) <= doubt:
            expected = a
        assert int(label[y, x]) == expected
        assert expected == b or expected not in new, "the first teacher never writes a new class"


# ---- the stages ------------------------------------------------------------------------------------------------------


class Noted(Session):
    """Notes what is trained and what labels; pseudo-labels are the masks of the labelled images."""

    def train(
        self,
        method: Trainable,
        data: Data,
        streams: Mapping[str, Stream] | None = None,
        keep: Sequence[float] = (),
    ) -> nn.Module:
        assert isinstance(method, Supervised)
        self.trained.append(self)
        notes.append((self.folder.name, method, data, streams))
        return method.predictor()

    def pseudo_label(
        self, net: nn.Module, rows: Rows, data: Data, inference: InferenceConfig, least: float = 0.0, top: int = 1
    ) -> Rows:
        assert isinstance(net, Pair)
        taught.append((net, rows, inference))
        masks = (data.labelled[i % len(data.labelled)].mask or Path() for i in range(len(rows)))
        return rows.with_masks(masks, data.code.plain())


notes: list[tuple[str, Supervised, Data, Mapping[str, Stream] | None]] = []
taught: list[tuple[Pair, Rows, InferenceConfig]] = []


def fitted(case: testing.Case, **options: Any) -> nn.Module:
    notes.clear()
    taught.clear()
    case = case.with_options(options)
    data, recipe = case.data(), case.recipe()
    build = build_of(recipe, data, torch.device("cpu"), case.base)
    session = Noted(case.folder / "run", recipe.train, recipe.evaluate, torch.device("cpu"))
    assert isinstance(recipe.method.options, Transfer.Config)
    return Transfer(recipe.method.options, build).fit(session, data)


def test_stages(case: testing.Case) -> None:
    net = fitted(case, least=0.1, least_new=0.2, doubt=0.3, flip=True)
    assert [name for name, *_ in notes] == ["source", "target", "student"]
    (_, first, source, _), (_, second, target, _), (_, student, _, streams) = notes
    assert source.classes == ("floor", "object", "odd")
    assert target.classes == ("ground", "thing", "rare")
    assert net is student.predictor()
    (pair, rows, inference) = taught[0]
    assert (pair.first, pair.second) == (first.predictor(), second.predictor())
    assert pair.merge == Merge((0, 1, IGNORE), 0.1, 0.2, 0.3)
    assert inference.flip
    assert len(rows) == 8

    # Two samples in three are of masks: the source's as the target's classes, the new one ignored.
    assert streams is not None
    stream = streams["labelled"]
    assert stream.mixture is not None
    assert [(part.first, part.rows, part.items) for part in stream.mixture.parts] == [(0, 6, 6), (6, 4, 6), (10, 8, 6)]
    row, own = stream.rows[0], source.labelled[0]
    assert row.mask == own.mask
    raw = open_mask(own, source.code, None, cache=False)
    assert {0, 1, 2} <= set(np.unique(raw).tolist())
    mapped = open_mask(row, target.code, None, cache=False)
    assert np.array_equal(mapped, np.where(raw == 2, IGNORE, raw))
    assert stream.mixture.parts[0].centroids is not None
    assert stream.mixture.parts[0].centroids.counts[2] == 0 < stream.mixture.parts[0].centroids.counts[0]


def test_the_second_teacher_starts_from_the_first(case: testing.Case) -> None:
    fitted(case)
    first, second, student = (method.predictor().state_dict() for _, method, *_ in notes)
    for name, tensor in second.items():
        same = torch.equal(tensor, first[name])
        assert same or name.startswith("head."), name
        if name.startswith("head."):
            assert torch.equal(tensor[:2], first[name][:2])
            assert name == "head.bias" or not torch.equal(tensor[2], first[name][2])
    assert not all(torch.equal(tensor, student[name]) for name, tensor in second.items())


def test_real_masks_win(case: testing.Case) -> None:
    """An image with a mask gets no pseudo-label, also where all training images are the unlabelled ones."""
    data = case.data()
    recipe = case.recipe()
    assert isinstance(recipe.method.options, Transfer.Config)
    build = build_of(recipe, data, torch.device("cpu"), case.base)
    notes.clear()
    taught.clear()
    session = Noted(case.folder / "run", recipe.train, recipe.evaluate, torch.device("cpu"))
    everything = replace(data, unlabelled=(data.labelled + data.unlabelled).without_masks())
    Transfer(recipe.method.options, build).fit(session, everything)
    assert sorted(taught[0][1].names) == sorted(data.unlabelled.names)
    with pytest.raises(InputError, match="labels unlabelled images, and there is none"):
        Transfer(recipe.method.options, build).fit(session, replace(data, unlabelled=data.labelled.without_masks()))


def test_shares(case: testing.Case) -> None:
    fitted(case, shares=[0, 1, 2], centred=0)
    streams = notes[2][3]
    assert streams is not None
    mixture = streams["labelled"].mixture
    assert mixture is not None
    assert [(part.rows, part.items, part.centroids) for part in mixture.parts] == [(4, 6, None), (8, 12, None)]
    with pytest.raises(InputError, match="shares are all 0"):
        fitted(case, shares=[0, 0, 0])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("floor: ground\nobject: thing\n", "lacks odd: give each of the source's classes a line"),
        (
            "floor: ground\nobject: thing\nodd: null\nsky: null\n",
            "names sky, which is no class of the source; known: floor, object, odd",
        ),
        (
            "floor: ground\nobject: thin\nodd: null\n",
            r"names thin, which is no class of the data; did you mean thing\?",
        ),
        ("- floor\n", "is no map of classes: write a line"),
        ("floor: [ground]\nobject: thing\nodd: null\n", "is no map of classes"),
        ("floor: [", "cannot be read as YAML"),
        ("floor: ground\nobject: thing\nodd: null\nfloor: thing\n", "names floor twice: give each"),
        ("floor: null\nobject: ~\nodd:\n", "gives every class null, so that nothing of the source can be used"),
    ],
)
def test_a_wrong_file_of_classes(case: testing.Case, text: str, sentence: str) -> None:
    (case.folder / "classes.yml").write_text(text)
    with pytest.raises(InputError, match=sentence):
        fitted(case)


def test_names_that_yaml_takes_for_something_else(tmp_path: Path) -> None:
    path = tmp_path / "classes.yml"
    path.write_text("0: 1\nno: 'null'\n1.0: null\n")
    assert class_map(path, ("0", "no", "1.0"), ("null", "1")) == (1, 0, IGNORE)


def test_the_source_is_not_there(case: testing.Case) -> None:
    with pytest.raises(InputError, match=r"method\.source: .*nowhere"):
        fitted(case, source={**case.options["source"], "root": "nowhere"})


def test_images_of_val_among_the_source(case: testing.Case) -> None:
    data, source = case.data(), case.folder / "source"
    picture, mask = data.val[0].image, data.val[0].mask
    assert isinstance(picture, Path)
    assert mask is not None
    (source / "images/train" / picture.name).write_bytes(picture.read_bytes())
    (source / "masks/train" / mask.name).write_bytes(mask.read_bytes())
    with pytest.raises(InputError, match=r"method\.source: The labelled and val images share"):
        fitted(case)
    (case.folder / "recipe.yaml").write_text(yaml.safe_dump(case.recipe().dump()))
    (problem,) = api.check(case.folder / "recipe.yaml").problems
    assert problem.startswith("method.source: The labelled and val images share")


def test_check_looks_at_the_classes(case: testing.Case) -> None:
    case.data()
    path = case.folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(case.recipe().dump()))
    report = api.check(path)
    assert not report.problems
    assert report.method[1:] == (
        "  floor is ground, object is thing",
        "  new classes, which it does not show: rare",
        "  not used of it: odd",
    )
    assert "source: 6 labelled images\n  floor is ground" in report.text()
    (case.folder / "classes.yml").write_text("floor: grund\nobject: thing\nodd: null\n")
    (problem,) = api.check(path).problems
    assert "names grund, which is no class of the data; did you mean ground?" in problem


def test_a_network_in_one_piece_is_refused_before_a_stage(case: testing.Case, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n\ndef net(classes, channels):\n    return nn.Conv2d(channels, classes, 1)\n"
    )
    case = replace(case, network={"name": f"{tmp_path / 'mine.py'}:net"})
    with pytest.raises(InputError, match=r"^method: transfer: the teacher of the source has other classes"):
        fitted(case)
    assert not notes


def test_the_file_of_classes_may_not_change_meanwhile(case: testing.Case, tmp_path: Path) -> None:
    case.data()
    recipe = case.recipe(steps=2, save_every=2, evaluations=1)
    api.train(recipe, tmp_path / "run")
    assert (tmp_path / "run/classes.yml").read_text() == (tmp_path / "classes.yml").read_text()
    (tmp_path / "run/results.json").unlink()
    (tmp_path / "classes.yml").write_text("floor: thing\nobject: ground\nodd: null\n")
    with pytest.raises(InputError, match=r"classes\.yml is not what .*run began with"):
        api.train(recipe, tmp_path / "run")


def test_foreign_images_of_the_same_names(case: testing.Case, tmp_path: Path) -> None:
    """A pool of another place: what has a mask is known by where it lies, not by its name there."""
    data = case.data()
    testing.write_data(tmp_path / "foreign", 6)
    more = Rows.of(tmp_path / "foreign", data.unlabelled.names[:3].tolist())
    every = (data.labelled + data.unlabelled).without_masks() + more
    left = every.without(data.labelled)
    assert len(left) == len(data.unlabelled) + 3
    assert not len(data.labelled.without(every))
    assert len(more.without(data.unlabelled)) == 3


def test_weights_of_a_class_that_only_the_source_shows(case: testing.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {4: torch.tensor([30.0, 0.0, 10.0]), 6: torch.tensor([300.0, 100.0, 0.0])}
    monkeypatch.setattr(transfer, "class_pixels", lambda data: counts[len(data.labelled)].double())
    fitted(case, loss={"kind": "ce", "class_weights": True})
    student = notes[-1][1]
    assert student.loss.weight is not None
    torch.testing.assert_close(student.loss.weight, class_weights(torch.tensor([30.0, 10.0, 10.0])))


def test_channels_differ(case: testing.Case) -> None:
    with pytest.raises(
        InputError, match=r"method\.source has images of 1 channels, data of 3: set channels to the same"
    ):
        fitted(case, source={**case.options["source"], "channels": 1})


# ---- whole runs ------------------------------------------------------------------------------------------------------


def test_runs_that_start_from_a_teacher(case: testing.Case, tmp_path: Path) -> None:
    """A run on the source is the first teacher of a transfer, and one on the data that of self-training."""
    case.data()
    recipe = case.recipe(steps=2, save_every=2, evaluations=1)
    assert isinstance(recipe.method.options, Transfer.Config)
    source = recipe.model_copy(update={"data": recipe.method.options.source})
    first = api.train(source, tmp_path / "first", method="supervised")
    assert first.classes == ("floor", "object", "odd")

    teacher = {**case.options, "teacher": str(tmp_path / "first")}
    model = api.train(recipe, tmp_path / "run", method={"name": "transfer", **teacher})
    assert model.classes == ("ground", "thing", "rare")
    assert not (tmp_path / "run/source").exists()
    card = json.loads((tmp_path / "run/student/pseudo/labels.json").read_text())
    assert card["merge"] == "Merge(to=(0, 1, 255), least=0.0, least_new=0.0, doubt=0.2)"

    again = api.train(recipe, tmp_path / "again", method={"name": "selftraining", "teacher": tmp_path / "run"})
    assert again.classes == model.classes
    assert not (tmp_path / "again/teacher").exists()
    for name, options in (("selftraining", {}), ("transfer", case.options)):
        wrong = tmp_path / ("first" if name == "selftraining" else "run")
        with pytest.raises(InputError, match=rf"method\.teacher: .*{wrong.name} knows"):
            api.train(recipe, tmp_path / "wrong", method={"name": name, **options, "teacher": wrong})
    with pytest.raises(InputError, match=r"method\.teacher: nowhere is not there \(looked for in"):
        api.train(recipe, tmp_path / "wrong", method={"name": "selftraining", "teacher": "nowhere"})


def test_the_source_is_the_one_that_is_named(case: testing.Case) -> None:
    fitted(case)
    assert isinstance(case.recipe().method.options, Transfer.Config)
    assert load_data(case.recipe().method.options.source).config.root == str(case.folder / "source")
