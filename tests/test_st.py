"""ST and ST++: what students learn from, how images are ranked, and what each stage is given."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from semiseg import testing
from semiseg.config import build_of
from semiseg.data.rows import Rows
from semiseg.data.sampling import Stream, draws
from semiseg.data.splits import Data
from semiseg.engine import reliability as engine
from semiseg.engine.predict import Predictor
from semiseg.engine.reliability import reliability
from semiseg.engine.session import Session, Trainable, _timetable
from semiseg.methods import ST, STPlusPlus, Supervised
from semiseg.methods.labelled import LossConfig
from semiseg.methods.retraining import Retraining, StrongConfig
from semiseg.methods.stplusplus import halves
from semiseg.ops.metrics import agreement, confusion
from semiseg.types import IGNORE, VIEW, InferenceConfig, InputError, Labelled

CPU = torch.device("cpu")
PLAIN = InferenceConfig()
SEVERAL = InferenceConfig(flip=True, scales=(0.5, 0.75, 1, 1.5, 2))
Label = NDArray[np.uint8]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEMISEG_CACHE", str(tmp_path / "cache"))


# ---- reliability -----------------------------------------------------------------------------------------------------


def of_labels(labels: Sequence[Any], classes: int = 3) -> float:
    *before, last = (torch.tensor(label, dtype=torch.uint8) for label in labels)
    return float(agreement(torch.stack([confusion(label, last, classes) for label in before])).mean())


def slow_reliability(labels: Sequence[Label], classes: int) -> float:
    scores = []
    for label in labels[:-1]:
        found = []
        for c in range(classes):
            one, last = label == c, labels[-1] == c
            if one.any() or last.any():
                found.append((one & last).sum() / (one | last).sum())
        scores.append(sum(found) / len(found) if found else 1.0)
    return float(sum(scores) / len(scores))


def test_reliability_by_hand() -> None:
    """1/2 and 2/3 for the classes of the first snapshot; 1, 1/2, and 0 for one that only the second sees."""
    first, second, last = [[0, 1], [1, 1]], [[0, 0], [2, 1]], [[0, 0], [1, 1]]
    assert of_labels([first, second, last]) == pytest.approx((7 / 12 + 1 / 2) / 2)
    assert of_labels([second, last]) == pytest.approx(1 / 2)


def test_equal_snapshots_are_reliable() -> None:
    assert of_labels([[[0, 1], [2, 2]]] * 3) == 1
    assert of_labels([[[1]]] * 2) == 1
    assert float(agreement(torch.zeros(3, 3, dtype=torch.int64))) == 1


class Net(nn.Module):
    """Labels of colours."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.mix = nn.Conv2d(3, 3, 3, padding=1)
        self.eval()

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.mix(image.float() / 255 - 0.4)
        return logits


@pytest.fixture
def data(tmp_path: Path) -> Data:
    return testing.Case("supervised", tmp_path / "case").data()


def test_reliability_is_that_of_slow_loops(data: Data, tmp_path: Path) -> None:
    nets = [Net(seed) for seed in range(4)]
    ranking = reliability(nets, data.unlabelled, data, tmp_path, PLAIN, CPU)
    assert ranking.names == list(data.unlabelled.names)
    predictors = [Predictor(net, data.classes, data.palette, 3, None, PLAIN, CPU) for net in nets]
    for row, score in zip(data.unlabelled, ranking.array(), strict=True):
        image = engine.read_image(row.image, 3)
        assert score == pytest.approx(slow_reliability([p(image).mask for p in predictors], 3), rel=1e-12)
    assert 0 < ranking.array().min() < ranking.array().max() < 1
    same = reliability([nets[0]] * 3, data.unlabelled, data, tmp_path / "same", PLAIN, CPU)
    assert same.scores == [1.0] * 8


def test_a_finished_ranking_is_kept(data: Data, tmp_path: Path) -> None:
    nets = [Net(seed) for seed in range(3)]
    with mock.patch("os.replace", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        reliability(nets, data.unlabelled, data, tmp_path, PLAIN, CPU)
    assert list(tmp_path.glob("*.json")) == []
    first = reliability(nets, data.unlabelled, data, tmp_path, PLAIN, CPU)
    with mock.patch.object(Predictor, "__call__", side_effect=AssertionError("predicted again")):
        assert reliability(nets, data.unlabelled, data, tmp_path, PLAIN, CPU) == first
        for changed, rows in ((nets[1:], data.unlabelled), (nets, data.unlabelled[::-1])):
            with pytest.raises(InputError, match=r"reliability\.json ranks images by other \w+: remove it"):
                reliability(changed, rows, data, tmp_path, PLAIN, CPU)
    kept = json.loads((tmp_path / "reliability.json").read_text(encoding="utf-8"))
    assert dict(zip(kept["names"], kept["scores"], strict=True)).keys() == set(data.unlabelled.names)
    low, half, high = np.quantile(first.array(), (0.25, 0.5, 0.75))
    assert first.remark() == (
        f"8 unlabelled images ranked by reliability: a quarter are below {low:.3f}, half below {half:.3f}, "
        f"three quarters below {high:.3f}"
    )


def test_an_image_that_cannot_be_read_is_the_least_reliable(data: Data, tmp_path: Path) -> None:
    data.unlabelled[2].image.write_bytes(b"no image")
    ranking = reliability([Net(0), Net(1)], data.unlabelled, data, tmp_path, PLAIN, CPU)
    assert np.isnan(ranking.array()).tolist() == [i == 2 for i in range(8)]
    assert list(ranking.failed) == [str(data.unlabelled[2].image)]
    assert ranking.remark().startswith("7 unlabelled images ranked")
    assert 2 in halves(ranking.array())[1]


def test_processes_share_the_ranking(data: Data) -> None:
    rows = data.unlabelled[:5]
    predictors = [Predictor(Net(seed), data.classes, data.palette, 3, None, PLAIN, CPU) for seed in (0, 1)]
    whole, _ = engine._scores(predictors, rows)

    def scores_of(rank: int, other: Sequence[float | None]) -> list[float | None]:
        """What process `rank` of two finds where the other one tells it its scores, and no failures."""

        def gather(mine: Any) -> list[Any]:
            theirs = other if isinstance(mine, list) else {}
            return [mine, theirs] if rank == 0 else [theirs, mine]

        with mock.patch.multiple(engine.parallel, rank=lambda: rank, world=lambda: 2, gather=gather):
            return engine._scores(predictors, rows)[0]

    assert scores_of(0, whole[1::2]) == whole
    assert scores_of(1, whole[0::2]) == whole


@pytest.mark.parametrize("count", [2, 3, 7, 100])
def test_halves(count: int) -> None:
    score = np.random.default_rng(count).random(count)
    reliable, unreliable = halves(score)
    assert (len(reliable), len(unreliable)) == (count // 2, count - count // 2)
    assert sorted([*reliable, *unreliable]) == list(range(count))
    assert score[reliable].min() > score[unreliable].max()


def test_halves_of_equal_scores() -> None:
    assert [half.tolist() for half in halves(np.ones(5))] == [[0, 1], [2, 3, 4]]
    assert [half.tolist() for half in halves(np.array([np.nan, 0.2, 0.1]))] == [[1], [0, 2]]


# ---- the student -----------------------------------------------------------------------------------------------------


def student(case: testing.Case, view: StrongConfig, pseudo: int = 8) -> tuple[Retraining, Data]:
    """4 real and so many pseudo-labelled images."""
    data = case.data()
    build = build_of(case.recipe(), data, CPU, case.base)
    masks = [data.labelled[0].mask or Path()] * 8
    return Retraining(
        LossConfig(), view, build, data.labelled, data.unlabelled.with_masks(masks, data.code.plain())[:pseudo]
    ), data


@pytest.fixture
def case(tmp_path: Path) -> testing.Case:
    return testing.Case("st", tmp_path)


def batch(rows: Sequence[int], **columns: float) -> Labelled:
    """Random images whose strong views have the given numbers, else 0.6."""
    draw = torch.Generator().manual_seed(0)
    count, size = len(rows), 32
    table = torch.full((count, 1, len(VIEW)), 0.6)
    for name, value in columns.items():
        table[:, 0, VIEW.index(name)] = value
    image = torch.randint(256, (count, 3, size, size), generator=draw, dtype=torch.uint8)
    mask = torch.randint(3, (count, size, size), generator=draw, dtype=torch.uint8)
    return Labelled(image, mask, torch.ones_like(mask, dtype=torch.bool), table, torch.tensor(rows))


def test_only_pseudo_labelled_images_are_seen_strongly(case: testing.Case) -> None:
    method, _ = student(case, StrongConfig(cutout=1.0))
    labelled = batch([0, 4, 3, 11], mix=0.3, blur=0.1)
    image, mask = method.views(labelled)
    plain = labelled.image.float() / 255
    assert image.shape == plain.shape
    for i, pseudo in enumerate((False, True, False, True)):
        assert torch.equal(image[i], plain[i]) is not pseudo
        assert torch.equal(mask[i], labelled.mask[i]) is not pseudo
    outside = mask[1] != IGNORE
    assert not torch.equal(image[1][:, outside], plain[1][:, outside])  # colours too


def test_a_hole_has_no_label(case: testing.Case) -> None:
    method, _ = student(case, StrongConfig(cutout=0.5, cutout_area=(0.25, 0.25), jitter=(0, 0, 0, 0), blur=0.0))
    on, off = (batch([5, 1], mix=mix, ratio=0.5, top=0.999, left=0.0, grey=0.9) for mix in (0.4, 0.5))
    image, mask = method.views(on)
    hole = torch.zeros(32, 32, dtype=torch.bool)
    hole[16:, :16] = True
    assert torch.equal(mask[0] == IGNORE, hole)
    assert torch.equal(mask[0][~hole], on.mask[0][~hole])
    mean = method.student.normalise.mean.view(3, 1)
    assert torch.equal(image[0][:, hole], mean.expand(3, int(hole.sum())))
    torch.testing.assert_close(image[0][:, ~hole], (on.image[0].float() / 255)[:, ~hole])
    assert torch.equal(mask[1], on.mask[1])
    assert torch.equal(method.views(off)[1], off.mask)


@pytest.mark.parametrize(("pseudo", "times"), [(8, 2), (5, 2), (4, 1), (3, 1)])
def test_the_epoch_of_a_student(case: testing.Case, pseudo: int, times: int) -> None:
    """Every pseudo-labelled image once, and every real one as often as it takes to be as many."""
    method, data = student(case, StrongConfig(), pseudo)
    stream = method.streams(data, 4, (32, 32))["labelled"]
    assert [row.code is None for row in stream.rows] == [True] * 4 + [False] * pseudo
    size = 4 * times + pseudo
    assert stream.epoch == size
    timetable = _timetable({"labelled": stream}, 3 * size + 4)
    rows = np.concatenate([draws(stream, timetable, "labelled", 0, step).rows for step in range(timetable.steps)])
    wanted = Counter({i: times if i < 4 else 1 for i in range(4 + pseudo)})
    assert [Counter(rows[i * size : (i + 1) * size].tolist()) for i in range(3)] == [wanted] * 3


# ---- the stages ------------------------------------------------------------------------------------------------------


class Noted(Session):
    """Notes what it is asked for; pseudo-labels are the masks of the labelled images."""

    def train(
        self,
        method: Trainable,
        data: Data,
        streams: Mapping[str, Stream] | None = None,
        keep: Sequence[float] = (),
    ) -> nn.Module:
        assert streams is None
        notes.append((self.folder.name, "train", method, tuple(keep)))
        return method.predictor()

    def kept(self, share: float, net: nn.Module) -> nn.Module:
        notes.append((self.folder.name, "kept", share, net))
        return nn.Linear(1, 1)

    def reliability(
        self, nets: Sequence[nn.Module], rows: Rows, data: Data, inference: InferenceConfig
    ) -> NDArray[np.float64]:
        notes.append((self.folder.name, "reliability", len(nets), list(rows.names), inference))
        return np.array([0.1, 0.9, 0.2, 0.8, 0.3, 0.7, 0.4, 0.6])[: len(rows)]

    def pseudo_label(
        self, net: nn.Module, rows: Rows, data: Data, inference: InferenceConfig, least: float = 0.0
    ) -> Rows:
        assert not rows.masked.any()
        notes.append((self.folder.name, "label", net, list(rows.names), inference, least))
        masks = (Path(f"{self.folder.name}-{name.replace('/', '-')}") for name in rows.names)
        return rows.with_masks(masks, data.code.plain())


notes: list[tuple[Any, ...]] = []


def fitted(case: testing.Case, unlabelled: int = 8) -> tuple[nn.Module, Data]:
    notes.clear()
    recipe, data = case.recipe(), case.data()
    data = replace(data, unlabelled=data.unlabelled[:unlabelled])
    build = build_of(recipe, data, CPU, case.base)
    session = Noted(case.folder / "run", recipe.train, recipe.evaluate, CPU)
    kind = {"st": ST, "st++": STPlusPlus}[case.method]
    return kind(recipe.method.options, build).fit(session, data), data


def heads_differ(networks: Sequence[nn.Module]) -> bool:
    heads = [net.state_dict()["head.weight"] for net in networks]
    return not any(torch.equal(a, b) for i, a in enumerate(heads) for b in heads[:i])


def test_stages_of_st(case: testing.Case) -> None:
    net, data = fitted(case)
    (_, _, teacher, _), label, (_, _, learner, _) = notes
    assert [note[:2] for note in notes] == [("teacher", "train"), ("student", "label"), ("student", "train")]
    assert isinstance(teacher, Supervised)
    assert isinstance(learner, Retraining)
    assert label[2:] == (teacher.predictor(), list(data.unlabelled.names), SEVERAL, 0.0)
    assert net is learner.predictor()
    assert learner.real == 4
    assert len(learner.rows) == 12
    assert heads_differ([teacher.predictor(), net])


def test_stages_of_st_plus_plus(case: testing.Case) -> None:
    """The first round labels images 1, 3, 5 and 7, the second one the others; both are learned from in the end."""
    net, data = fitted(replace(case, method="st++", options={"flip": False, "scales": [1.0, 2.0]}))
    several = InferenceConfig(scales=(1, 2))
    names = list(data.unlabelled.names)
    teacher, one, two = (note[2] for note in notes if note[1] == "train")
    first = teacher.predictor()
    assert notes == [
        ("teacher", "train", teacher, (1 / 3, 2 / 3, 1.0)),
        *[("teacher", "kept", share, first) for share in (1 / 3, 2 / 3, 1.0)],
        ("teacher", "reliability", 3, names, PLAIN),
        ("reliable", "label", first, names[1::2], several, 0.0),
        ("reliable", "train", one, ()),
        ("all", "label", one.predictor(), names[::2], several, 0.0),
        ("all", "train", two, ()),
    ]
    assert net is two.predictor()
    assert heads_differ([first, one.predictor(), net])
    assert (one.real, two.real) == (4, 4)

    def labels(method: Retraining) -> list[str]:
        return [Path(mask).name.partition("-")[0] for mask in method.rows.mask[4:]]

    assert labels(one) == ["reliable"] * 4
    assert labels(two) == ["reliable"] * 4 + ["all"] * 4
    assert [Path(image).name for image in two.rows.image[4:]] == [Path(n).name for n in names[1::2] + names[::2]]


def test_too_few_unlabelled_images(case: testing.Case) -> None:
    with pytest.raises(InputError, match="labels unlabelled images, and there is none: change data"):
        fitted(case, 0)
    for count, said in ((0, "none"), (1, "1")):
        with pytest.raises(InputError, match=f"needs two, and there is {said}: change data.unlabelled or method"):
            fitted(replace(case, method="st++"), count)
    assert notes == []
    fitted(replace(case, method="st++"), 2)
    assert [len(note[3]) for note in notes if note[1] == "label"] == [1, 1]


def test_no_unlabelled_image_can_be_read(case: testing.Case) -> None:
    for row in case.data().unlabelled:
        row.image.write_bytes(b"no image")
    for method in ("st", "st++"):
        with pytest.raises(InputError, match="No unlabelled image can be read"):
            testing.run(replace(case, method=method), method, steps=2, evaluations=1)


def killed_at(steps: set[int]) -> testing.Around:
    """The teacher's stage ends once at each of these steps, as by a kill."""

    def around(moment: testing.Moment) -> dict[str, Tensor]:
        if moment.stage.name == "teacher" and moment.clock.step in steps:
            steps.remove(moment.clock.step)
            raise KeyboardInterrupt
        return moment.go()

    return around


def tensors(folder: Path) -> Iterator[tuple[str, dict[str, Tensor]]]:
    return ((path.name, load_file(path)) for path in sorted(folder.glob("*.safetensors")))


def test_snapshots_and_ranking_after_kills(case: testing.Case) -> None:
    """At 4, 8 and 12 of 12 steps, checkpoints at 3, 6, 9 and 12: the steps after 3 and 6 are taken twice."""
    case = replace(case, method="st++", options={"scales": [1.0]})
    whole = testing.run(case, "whole").folder / "teacher"
    around = killed_at({5, 8, 11})
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            testing.run(case, "killed", around)
    killed = testing.run(case, "killed", around).folder / "teacher"
    one, other = (list(tensors(folder / "kept")) for folder in (whole, killed))
    assert [name for name, _ in one] == ["0.333333.safetensors", "0.666667.safetensors", "1.safetensors"]
    assert [name for name, _ in other] == [name for name, _ in one]
    for (_, a), (_, b) in zip(one, other, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    first, last = one[0][1], one[-1][1]
    assert any(not torch.equal(first[name], last[name]) for name in first)
    rankings = [json.loads((folder / "reliability.json").read_text(encoding="utf-8")) for folder in (whole, killed)]
    assert rankings[0]["scores"] == rankings[1]["scores"]
    assert len(set(rankings[0]["scores"])) > 1

    (killed / "kept" / "1.safetensors").unlink()
    with pytest.raises(InputError, match=r"1\.safetensors is missing: remove .*teacher to train that stage anew"):
        testing.run(case, "killed")


def test_what_a_run_tells(case: testing.Case, capsys: pytest.CaptureFixture[str]) -> None:
    case = replace(case, method="st++", options={"scales": [1.0]})
    recipe, data = case.recipe(steps=2, evaluations=1), case.data()
    session = Session(case.folder / "run", recipe.train, recipe.evaluate, CPU)
    assert isinstance(recipe.method.options, STPlusPlus.Config)
    STPlusPlus(recipe.method.options, build_of(recipe, data, CPU)).fit(session, data)
    assert "8 unlabelled images ranked by reliability: a quarter are below" in capsys.readouterr().out
    kept = json.loads((case.folder / "run/teacher/reliability.json").read_text(encoding="utf-8"))
    stages = [stage._progress().seconds for stage in session.trained]
    assert [stage.folder.name for stage in session.trained] == ["teacher", "reliable", "all"]
    reports = [json.loads((case.folder / f"run/{s}/pseudo/report.json").read_text()) for s in ("reliable", "all")]
    assert session.progress().seconds == pytest.approx(
        sum(stages) + kept["seconds"] + sum(report["seconds"] for report in reports)
    )
    header = (case.folder / "run/all/metrics.csv").read_text(encoding="utf-8").partition("\n")[0].split(",")
    names = ["step", "loss", "rate", "images_per_second", "waiting"]
    assert [name for name in header if not name.startswith("val_")] == names
