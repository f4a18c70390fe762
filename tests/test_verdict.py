"""The labelled-only model beside a semi-supervised one: what is said and delivered; runs of several trainings."""

import json
import shutil
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Command
from numpy.typing import NDArray
from PIL import Image
from scipy import stats

from semiseg import api, experiment
from semiseg.config import load_recipe
from semiseg.engine.evaluate import Scores, joined, load_scores
from semiseg.engine.intervals import RESAMPLES, block_length, blocks, classes_over_images, over_images, over_training
from semiseg.engine.verdict import Trained, Verdict, judge
from semiseg.methods import U2PL, Supervised
from semiseg.ops.metrics import iou, miou
from semiseg.types import InputError

PHOTOS = tuple(f"{word}.png" for word in ("oak", "elm", "ash", "fir", "yew", "bay", "box", "gum", "nut", "fig"))


def scores(right: Sequence[float], names: Sequence[str] = PHOTOS) -> Scores:
    """Two classes of 100 px an image; of each so many are right."""
    hits = np.array(right)
    confusions = np.stack([np.stack([hits, 100 - hits], 1), np.stack([100 - hits, hits], 1)], 1)
    return Scores(confusions.astype(np.int64), tuple(names), ("a", "b"))


def trained(right: Sequence[float], val: float | None = None, names: Sequence[str] = PHOTOS) -> Trained:
    return Trained(scores(right, names), val)


# ------------------------------------------------------------------------------------------------------------ intervals


def test_over_training_is_the_paired_t_interval() -> None:
    changes = np.array([1.0, 2.0, 4.0])
    expected = stats.t.interval(0.95, 2, loc=changes.mean(), scale=stats.sem(changes))
    assert over_training(changes) == pytest.approx(expected)
    assert over_training(changes[:1]) is None


def test_over_images_covers_as_often_as_it_says() -> None:
    """Of the intervals of 300 drawn sets of 10 images 95 % hold the true difference: here nearly as many."""
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(300):
        right = rng.normal(70, 8, 10).clip(0, 100)
        better = (right + rng.normal(5, 4, 10)).clip(0, 100)
        interval = over_images(scores(better), scores(right))
        assert interval is not None
        # the difference over very many images: IoU of 75 right of 100 less that of 70
        inside += interval[0] <= 100 * (75 / 125 - 70 / 130) <= interval[1]
    assert 0.9 <= inside / 300 <= 0.99


def test_blocks_are_neighbours_of_one_sequence() -> None:
    names = [f"drive{d}_{frame}.png" for frame in range(20, 0, -1) for d in (1, 2)] + [f"new_{i}.png" for i in range(5)]
    assert block_length(names) == round(45 ** (1 / 3)) == 4
    numbers = blocks(names)
    assert sorted(set(numbers.tolist())) == list(range(12)), "5 and 5 and 2, none left out"
    assert np.bincount(numbers).tolist() == [4] * 10 + [3, 2]
    for block in range(12):
        mine = [names[i] for i in np.flatnonzero(numbers == block)]
        assert len({name.rpartition("_")[0] for name in mine}) == 1, "of one sequence"
        frames = sorted(int(name.rpartition("_")[2].removesuffix(".png")) for name in mine)
        assert frames == list(range(frames[0], frames[0] + len(frames))), "one after the other"


def test_blocks_of_unrelated_names_are_single_images() -> None:
    assert blocks(PHOTOS).tolist() == list(range(10))


def test_frames_that_are_alike_widen_the_interval() -> None:
    """As if each of five images stood there six times: six times the images say no more."""
    rng = np.random.default_rng(1)
    right = rng.normal(60, 10, 9).clip(0, 100)
    better = (right + rng.normal(4, 6, 9)).clip(0, 100)
    many = [f"drive_{i:03d}.png" for i in range(27)]
    apart = [f"{word}{i}x.png" for i in range(3) for word in PHOTOS[:9]]
    wide = over_images(scores(np.repeat(better, 3), many), scores(np.repeat(right, 3), many))
    narrow = over_images(scores(np.tile(better, 3), apart), scores(np.tile(right, 3), apart))
    assert wide is not None
    assert narrow is not None
    assert (wide[1] - wide[0]) / (narrow[1] - narrow[0]) == pytest.approx(3**0.5, rel=0.25)


def test_the_interval_is_that_of_whole_confusion_matrices() -> None:
    """As slowly as it can be said; one class is in few images, one in none."""
    rng = np.random.default_rng(2)
    shown = np.array([1, 1, 1, 0])[:, None] * np.ones(4, int)
    a, b = (Scores(rng.integers(0, 50, (8, 4, 4)) * shown, PHOTOS[:8], ("a", "b", "c", "d")) for _ in range(2))
    a.confusions[3:, 2] = b.confusions[3:, 2] = 0
    drawn = np.random.default_rng(0).multinomial(8, np.full(8, 1 / 8), size=RESAMPLES)
    both = [np.stack([(times[:, None, None] * s.confusions).sum(0) for times in drawn]) for s in (a, b)]
    changes, classes = (
        100 * (f(torch.from_numpy(both[0])) - f(torch.from_numpy(both[1]))).numpy() for f in (miou, iou)
    )
    outside = 100 * stats.norm.cdf(stats.t.ppf(0.025, 7) * (8 / 7) ** 0.5)
    assert over_images(a, b) == pytest.approx(tuple(np.percentile(changes, [outside, 100 - outside])))
    found = classes_over_images(a, b)
    assert found[0] == pytest.approx(tuple(np.percentile(classes[:, 0], [outside, 100 - outside])))
    assert found[2:] == [None, None], "in three images, and in none"


def test_too_few_images_give_no_interval() -> None:
    assert over_images(scores([60] * 4, PHOTOS[:4]), scores([50] * 4, PHOTOS[:4])) is None


# ---------------------------------------------------------------------------------------------------------------- words


def verdict_of(*pairs: tuple[Trained, Trained], how: Any = "one") -> Verdict:
    verdict = judge(pairs, "fixmatch", "test", how)
    assert verdict is not None
    return verdict


def test_a_gain() -> None:
    right = np.linspace(50, 70, 10)
    verdict = verdict_of((trained(right + 9, 0.6), trained(right, 0.5)))
    assert (verdict.wins, verdict.outcome) == (True, "gain")
    assert verdict.difference == pytest.approx(100 * (69 / 131 - 60 / 140), abs=0.5)
    assert verdict.interval is not None
    assert 0 < verdict.interval[0] < verdict.difference < verdict.interval[1]
    before, after = f"{verdict.labelled_only:.2f}", f"{verdict.method:.2f}"
    start = f"{verdict.difference:+.2f} mIoU over labelled-only ({before} -> {after} on test, 10 images). 95 % interval"
    assert verdict.words.startswith(start)
    assert verdict.words.endswith("it does not cover the noise of training (use --seeds 3).")
    assert verdict.why == "Delivered: the fixmatch model; val has 50.00 -> 60.00."


def test_no_difference_and_a_loss() -> None:
    right, other = np.linspace(50, 70, 10), np.linspace(70, 50, 10)
    alike = verdict_of((trained(right), trained(other)))
    assert alike.words.startswith("Not distinguishable from labelled-only: +0.00")
    assert alike.outcome == "not distinguishable"
    worse = verdict_of((trained(right - 9), trained(right)))
    assert worse.words.startswith("No gain over labelled-only: -")
    assert (worse.wins, worse.outcome) == (False, "no gain")
    assert worse.why.startswith("Delivered: the labelled-only model; chosen on the same images")


def test_val_chooses_where_test_is_reported() -> None:
    """Else the reported number would choose what it is reported for."""
    right = np.linspace(50, 70, 10)
    verdict = verdict_of((trained(right + 9, 0.5), trained(right, 0.6)))
    assert verdict.difference > 0
    assert not verdict.wins
    assert verdict.why == "Delivered: the labelled-only model; val has 60.00 -> 50.00."


def test_seeds_cover_training() -> None:
    pairs = [(trained([60 + gain] * 10), trained([60.0] * 10)) for gain in (2, 4, 9)]
    verdict = verdict_of(*pairs, how="seeds")
    changes = [100 * (a.scores.miou - b.scores.miou) for a, b in pairs]
    assert (verdict.interval, verdict.covers) == (over_training(np.array(changes)), "training")
    assert verdict.difference == pytest.approx(np.mean(changes))
    assert "10 images, means of 3 seeds)" in verdict.words
    assert "it does not cover the choice of images" in verdict.words


def test_folds_are_scored_together() -> None:
    pairs = [(trained([70] * 5, names=part), trained([60] * 5, names=part)) for part in (PHOTOS[:5], PHOTOS[5:])]
    verdict = verdict_of(*pairs, how="folds")
    assert verdict.method == pytest.approx(100 * joined([a.scores for a, _ in pairs]).miou)
    assert "on test, 10 images, each out of fold)" in verdict.words


def test_masks_without_any_class_give_no_verdict() -> None:
    nothing = Trained(Scores(np.zeros((10, 2, 2), np.int64), PHOTOS, ("a", "b")), None)
    assert judge([(nothing, nothing)], "fixmatch", "test") is None
    verdict = judge([(replace(nothing, val=0.5), replace(nothing, val=0.6))], "fixmatch", "test")
    assert verdict.words == "No verdict: no mask of test has a class."
    assert (verdict.wins, verdict.interval) == (False, None)
    assert verdict.why == "Delivered: the labelled-only model; val has 60.00 -> 50.00."


# ----------------------------------------------------------------------------------------------------------------- runs


def results_of(run: Path | str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(run) / "results.json").read_text())
    return found


def weights_of(run: Path | str) -> bytes:
    return (Path(run) / "model/model.safetensors").read_bytes()


def test_a_run_has_the_labelled_only_model_beside_it(semiseg: Command, recipe: Path) -> None:
    """The method's weights are what they are without it, and model/ is that of the two that is better on val."""
    done = semiseg("train", recipe, "-o", "both", "baseline=true")
    assert done.code == 0, done.err
    assert semiseg("train", recipe, "-o", "alone").code == 0
    assert semiseg("train", recipe, "-o", "labelled", "method=supervised").code == 0
    delivered = "checkpoints/delivered.safetensors"
    assert (Path("both") / delivered).read_bytes() == (Path("alone") / delivered).read_bytes()
    assert weights_of("both/baseline") == weights_of("labelled")

    results, beside = results_of("both"), results_of("both/baseline")
    verdict = results["verdict"]
    assert results["miou"] == results_of("alone")["miou"], "the numbers of a run are its method's"
    assert verdict["difference"] == pytest.approx(100 * (results["miou"] - beside["miou"]))
    assert verdict["wins"] == (results["val_best"]["miou"] > beside["val_best"]["miou"])
    assert weights_of("both") == weights_of("alone" if verdict["wins"] else "labelled")
    assert f"verdict: {verdict['words']}\n{verdict['why']}\n" in done.out
    lines = json.loads(semiseg("compare", "both/baseline", "both", "--json").out)
    assert lines[1]["difference"] == pytest.approx(verdict["difference"])
    assert lines[1]["interval"] == pytest.approx(verdict["interval"])


def test_the_better_model_is_delivered(semiseg: Command, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever it is: here val is said to have been better or worse."""
    assert semiseg("train", recipe, "-o", "run", "baseline=true").code == 0
    folder = Path("run")
    for wins in (False, True):
        (folder / "results.json").unlink()
        decided = judge(
            [(trained(np.arange(60, 70), float(wins)), trained(np.arange(50, 60), 0.5))], "fixmatch", "test"
        )
        monkeypatch.setattr(experiment, "judge", lambda *_, decided=decided: decided)
        done = semiseg("train", recipe, "-o", "run", "baseline=true")
        assert done.code == 0, done.err
        assert ("test mIoU of fixmatch" in done.out) == (not wins), "whose score it is, if not the delivered model's"
        assert (weights_of(folder) == weights_of(folder / "baseline")) == (not wins)
        assert results_of(folder)["delivered"].startswith("labelled-only, ") == (not wins)
        assert api.load(folder).card["method"] == ("fixmatch" if wins else "supervised")


def test_the_labelled_only_model_has_the_same_loss(recipe: Path) -> None:
    ours = load_recipe(recipe, ["method={name: u2pl, loss: {kind: ce+dice}, alpha: 10}", "train.steps=7"])
    base = experiment.labelled_only(ours)
    assert base.method.name == "supervised"
    assert isinstance(base.method.options, Supervised.Config)
    assert isinstance(ours.method.options, U2PL.Config)
    assert base.method.options.loss == ours.method.options.loss
    assert (base.train, base.data, base.network, base.optim) == (ours.train, ours.data, ours.network, ours.optim)


def test_no_baseline_where_nothing_can_be_scored(semiseg: Command, recipe: Path, flat: Path, drawn: Path) -> None:
    shutil.copy(drawn / "classes.json", flat)
    recipe.write_text(recipe.read_text().replace("splits", "folder").replace("/scenes", f"/{flat.name}"))
    done = semiseg("train", recipe, "-o", "run", "baseline=true", "train.steps=2")
    assert done.code == 0, done.err
    assert not Path("run/baseline").exists()
    assert "o image is held out" in done.out


def test_seeds(semiseg: Command, recipe: Path) -> None:
    words = ("train", recipe, "-o", "run", "baseline=true", "--seeds", "2", "train.steps=4", "train.seed=3")
    done = semiseg(*words)
    assert done.code == 0, done.err
    results, runs = results_of("run"), [Path("run/seed-3"), Path("run/seed-4")]
    assert results["miou"] == pytest.approx(np.mean([results_of(run)["miou"] for run in runs]))
    assert results["verdict"]["covers"] == "training"
    changes = [100 * (results_of(run)["miou"] - results_of(run / "baseline")["miou"]) for run in runs]
    assert results["verdict"]["difference"] == pytest.approx(np.mean(changes))
    arm = [run if results["verdict"]["wins"] else run / "baseline" for run in runs]
    best = max(arm, key=lambda run: results_of(run)["val_best"]["miou"])
    assert weights_of("run") == weights_of(best), "of the better method the training that is best on val"
    assert "means of 2 trainings" in results["note"]
    line = json.loads(semiseg("compare", "run", "--json").out)[0]
    assert (line["runs"], line["miou"]) == (2, pytest.approx(100 * results["miou"])), "a run of seeds is its trainings"
    assert semiseg(*words).out.startswith("run holds this run, finished.")
    assert "seeds=2" in semiseg("train", recipe, "-o", "run", "train.steps=4", "train.seed=3", "baseline=true").sentence


@pytest.mark.parametrize("wins", [True, False])
def test_the_seeds_say_together_what_is_delivered(
    semiseg: Command, recipe: Path, monkeypatch: pytest.MonkeyPatch, wins: bool
) -> None:
    """Not each alone: the method may be worse on val in the very seed where it is best."""
    decided = verdict_of((trained(np.arange(60, 70), float(wins)), trained(np.arange(50, 60), 0.5)))
    monkeypatch.setattr(experiment, "judge", lambda *_: decided)
    assert semiseg("train", recipe, "-o", "run", "baseline=true", "--seeds", "2", "train.steps=2").code == 0
    assert api.load("run").card["method"] == ("fixmatch" if wins else "supervised")
    for seed in ("run/seed-0", "run/seed-1"):
        assert api.load(seed).card["method"] == "fixmatch"
        assert results_of(seed)["verdict"] is None


def test_val_without_any_class_chooses_nothing(semiseg: Command, recipe: Path, scenes: Path) -> None:
    for path in (scenes / "masks/val").iterdir():
        Image.fromarray(np.full((48, 64), 255, np.uint8)).save(path)
    done = semiseg("train", recipe, "-o", "run", "baseline=true", "--seeds", "2", "train.steps=2")
    assert done.code == 0, done.err
    verdict = results_of("run")["verdict"]
    assert "chosen on the same images" in verdict["why"]
    assert weights_of("run") == weights_of("run/seed-0" if verdict["wins"] else "run/seed-0/baseline")


def test_what_is_wrong_with_the_method_is_said_before_anything_is_trained(semiseg: Command, recipe: Path) -> None:
    done = semiseg("train", recipe, "-o", "run", "baseline=true", "data.unlabelled=none")
    assert "learns from unlabelled images too, and there is none" in done.sentence
    assert not Path("run").exists(), "nor is anything written"


def test_code_that_is_edited_meanwhile(
    semiseg: Command, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainings of a run have one method."""
    code = tmp_path / "code" / "mine.py"
    code.parent.mkdir()
    text = "from semiseg.methods.fixmatch import FixMatch as Mine\n"
    code.write_text(text)
    words = ("train", recipe, "-o", "run", "--seeds", "2", "train.steps=2", "method=code/mine.py:Mine")
    train = experiment.Session.train

    def edited(session: Any, *given: Any, **named: Any) -> torch.nn.Module:
        code.write_text(f"{text}# edited\n")
        return train(session, *given, **named)

    monkeypatch.setattr(experiment.Session, "train", edited)
    assert "mine.py is not what run began with" in semiseg(*words).sentence
    monkeypatch.setattr(experiment.Session, "train", train)
    assert not Path("run/seed-1/recipe.yaml").exists()
    code.write_text(text)
    assert semiseg(*words).code == 0


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are counted as Linux lists them")
def test_a_method_is_gone_from_memory_before_the_next_training(
    semiseg: Command, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, methods, alive, files = experiment.Session.train, [], [], []

    def watched(session: Any, method: torch.nn.Module, *given: Any, **named: Any) -> torch.nn.Module:
        alive.append(sum(known() is not None for known in methods))
        methods.append(weakref.ref(method))
        files.append(len(list(Path("/proc/self/fd").iterdir())))
        return train(session, method, *given, **named)

    monkeypatch.setattr(experiment.Session, "train", watched)
    words = ("train", recipe, "-o", "run", "baseline=true", "--seeds", "2", "train.steps=2", "train.workers=1")
    assert semiseg(*words).code == 0
    assert alive == [0, 0, 0, 0]
    assert files[1:] == [files[1]] * 3, "as many open files each time"


def test_a_run_from_before_there_were_verdicts(semiseg: Command, recipe: Path) -> None:
    assert semiseg("train", recipe, "-o", "run", "train.steps=2").code == 0
    old = {key: value for key, value in results_of("run").items() if key != "verdict"}
    Path("run/results.json").write_text(json.dumps(old))
    done = semiseg("train", recipe, "-o", "run", "train.steps=2")
    assert done.code == 0, done.err
    assert "test mIoU" in done.out


def test_data_that_has_changed_between_the_two_trainings(semiseg: Command, recipe: Path, scenes: Path) -> None:
    assert semiseg("train", recipe, "-o", "run", "baseline=true", "train.steps=2").code == 0
    Path("run/results.json").unlink()
    for kind in ("images", "masks"):
        next((scenes / kind / "test").iterdir()).unlink()
    assert "the data has changed" in semiseg("train", recipe, "-o", "run", "baseline=true", "train.steps=2").sentence


def test_masks_that_have_changed_between_the_two_trainings(semiseg: Command, recipe: Path, scenes: Path) -> None:
    """The names of the images are the same."""
    words = ("train", recipe, "-o", "run", "baseline=true", "train.steps=2")
    assert semiseg(*words).code == 0
    Path("run/results.json").unlink()
    mask = next((scenes / "masks/test").iterdir())
    Image.fromarray(1 - np.minimum(np.array(Image.open(mask)), 1)).save(mask)
    assert "the data has changed since the run began" in semiseg(*words).sentence


def test_masks_that_come_between_two_folds(semiseg: Command, recipe: Path, flat: Path, drawn: Path) -> None:
    """Folds are drawn anew then: some masks would be scored twice, some never."""
    shutil.copy(drawn / "classes.json", flat)
    recipe.write_text(recipe.read_text().replace("splits", "folder, folds: 2").replace("/scenes", f"/{flat.name}"))
    words = ("train", recipe, "-o", "run", "train.steps=2", "baseline=false")
    assert semiseg(*words).code == 0
    for part in ("run", "run/fold-1", "run/final"):
        Path(part, "results.json").unlink()
    bare = next(path for path in sorted((flat / "images").iterdir()) if not (flat / "masks" / path.name).exists())
    shutil.copy(next((flat / "masks").iterdir()), flat / "masks" / bare.name)
    assert "run/fold-0 was scored on other images than there are now" in semiseg(*words).sentence


def test_folds(semiseg: Command, recipe: Path, flat: Path, drawn: Path) -> None:
    """Every mask is scored once, by a model that has not seen it; then one learns from all."""
    shutil.copy(drawn / "classes.json", flat)
    recipe.write_text(recipe.read_text().replace("splits", "folder, folds: 3").replace("/scenes", f"/{flat.name}"))
    done = semiseg("train", recipe, "-o", "run", "baseline=true", "train.steps=2")
    assert done.code == 0, done.err
    results, runs = results_of("run"), [Path(f"run/fold-{k}") for k in range(3)]
    masks = len(list((flat / "masks").iterdir()))
    assert results["images"] == masks == results["labelled"] == results_of("run/final")["labelled"]
    parts = [load_scores(run / "results.npz") for run in runs]
    assert len({name for part in parts for name in part.names}) == masks
    assert results["miou"] == pytest.approx(joined(parts).miou)
    assert results["verdict"]["method"] == pytest.approx(100 * joined(parts).miou)
    assert weights_of("run") == weights_of("run/final")
    wanted = "fixmatch" if results["verdict"]["wins"] else "supervised"
    assert results_of("run/final")["method"] == wanted
    assert not Path("run/final/baseline").exists()
    assert semiseg("predict", "run", flat / "images", "-o", "masks").code == 0


@pytest.mark.parametrize("place", ["baseline", "seed-1/baseline"])
def test_stopped_in_any_training_it_goes_on(
    semiseg: Command, recipe: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    words = ("train", recipe, "baseline=true", "train.steps=4", *(() if place == "baseline" else ("--seeds", "2")))
    assert semiseg(*words, "-o", "whole").code == 0
    train = experiment.Session.train

    def interrupted(session: Any, *given: Any, **named: Any) -> torch.nn.Module:
        if session.folder == Path("run") / place:
            raise InputError("the disk is full")
        return train(session, *given, **named)

    monkeypatch.setattr(experiment.Session, "train", interrupted)
    assert semiseg(*words, "-o", "run").code == 1
    monkeypatch.setattr(experiment.Session, "train", train)
    assert semiseg(*words, "-o", "run").code == 0
    free = ("seconds", "peak_gb")
    found, expected = (
        {key: value for key, value in results_of(run).items() if key not in free} for run in ("run", "whole")
    )
    assert found == expected
    assert weights_of("run") == weights_of("whole")
    names: list[NDArray[Any]] = [
        np.array(sorted(path.relative_to(run).as_posix() for path in Path(run).rglob("*"))) for run in ("run", "whole")
    ]
    assert names[0].tolist() == names[1].tolist()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("seeds=0", "seeds is 0, but it should be at least 1."),
        ("baseline=maybe", "baseline is 'maybe', but it should be true or false."),
    ],
)
def test_bad_input(semiseg: Command, recipe: Path, text: str, sentence: str) -> None:
    assert semiseg("train", recipe, "-o", "run", text).sentence == sentence


def test_seeds_and_folds_exclude_each_other(semiseg: Command, recipe: Path) -> None:
    recipe.write_text(recipe.read_text().replace("splits", "folder, folds: 3"))
    assert "seeds and data.folds exclude each other" in semiseg("train", recipe, "-o", "run", "seeds=2").sentence


def test_check_looks_at_every_fold(semiseg: Command, recipe: Path, flat: Path, drawn: Path) -> None:
    """The same image twice, so that it is in two folds, or in one."""
    shutil.copy(drawn / "classes.json", flat)
    recipe.write_text(recipe.read_text().replace("splits", "folder, folds: 8").replace("/scenes", f"/{flat.name}"))
    assert semiseg("check", recipe).code == 0
    for kind in ("images", "masks"):
        place = flat / kind
        shutil.copy(place / "scene-00000.png", place / "scene-00001.png")
    done = semiseg("check", recipe)
    assert done.code == 1
    assert "scene-00000" in done.out
    assert semiseg("train", recipe, "-o", "run").code == 1
    assert not Path("run/recipe.yaml").exists(), "nothing is written"
