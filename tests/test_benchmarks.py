"""The scripts behind published numbers: they run on tiny recipes, and the ledger keeps its promises."""

import json
import os
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from scipy import stats
from torch import nn

from semiseg.config import Recipe, load_recipe
from semiseg.data import synthetic
from semiseg.data.splits import load_data
from semiseg.engine.evaluate import Scores, save_scores
from semiseg.files import write_json
from semiseg.methods import fixmatch
from semiseg.networks.net import SegNet
from semiseg.types import InputError

BENCHMARKS = str(Path(__file__).parents[1] / "benchmarks")
if BENCHMARKS not in sys.path:  # as Python does for a script
    sys.path.insert(0, BENCHMARKS)
common, passes, step, data, ledger, summary, accuracy = map(
    import_module, ("common", "passes", "step", "data", "ledger", "summary", "accuracy")
)
mechanism, critic, partition, contrast, centroids, processes = map(
    import_module, ("mechanism", "critic", "partition", "contrast", "centroids", "processes")
)
labelling, schedule, pseudolabels, pool, results, arms, memory = map(
    import_module, ("labelling", "schedule", "pseudolabels", "pool", "results", "arms", "memory")
)

Write = Callable[..., Path]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    synthetic.write(folder, train=6, labelled=4, val=2, test=4, size=(32, 48))
    return folder


@pytest.fixture
def recipe(tmp_path: Path, scenes: Path) -> Write:
    """Writes a tiny recipe; dotted options change it."""

    def write(name: str = "tiny", method: str = "fixmatch", **options: object) -> Path:
        plain: dict[str, dict[str, Any]] = {
            "data": {"root": str(scenes), "format": "splits", "labelled": 2},
            "network": {"name": "fpn", "encoder": "test_resnet", "weights": "random"},
            "method": {"name": method},
            "train": {"steps": 2, "batch": 2, "crop": [32, 32], "threads": 1, "workers": 0, "evaluations": 1},
        }
        for key, value in options.items():
            section, _, option = key.partition("__")
            plain[section][option] = value
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(plain))
        return path

    return write


@pytest.fixture(autouse=True)
def golden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "golden"
    folder.mkdir()
    for name in ("supervised", "fixmatch"):
        (folder / f"{name}.txt").write_text(name)
    monkeypatch.setattr(ledger, "GOLDEN", folder)
    return folder


def printed(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


# ---- what all have in common


def test_every_benchmark_ends_with_machine_versions_and_commit(capsys: pytest.CaptureFixture[str]) -> None:
    common.finish({"value": float("nan")}, "text", True)
    result = printed(capsys)
    assert result.keys() == {"value", "machine", "threads", "versions", "commit"}
    assert result["value"] is None
    common.finish({}, "text", False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "text"
    assert f"torch {torch.__version__.partition('+')[0]}" in lines[-1]
    assert "commit" in lines[-1]


def test_a_run_is_stopped_when_its_time_is_over(recipe: Write, tmp_path: Path) -> None:
    assert not common.train(recipe(), tmp_path / "runs" / "one", [], 0.01)


def test_a_failed_run_says_where_to_look(recipe: Write, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"failed, see .*one\.log: error: .*network.encoder"):
        common.train(recipe(), tmp_path / "one", ["network.encoder=nonesuch"], None)


# ---- step.py


def test_step_measures_both_methods(recipe: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(train__threads=torch.get_num_threads())
    step.main([str(path), "--rounds", "1", "--no-memory", "--device", "cpu", "--json"])
    found = printed(capsys)["steps"]
    lines = {line["method"]: line for line in found}
    assert lines.keys() == {"supervised", "fixmatch"}
    assert lines["supervised"]["over_labelled_only"] == 1
    for line in lines.values():
        assert line["ratio"] == pytest.approx(line["step_ms"] / line["least_ms"])
        assert {"forward", "backward", "targets and loss", "optimiser", "rest"} <= line["parts_ms"].keys()
        assert sum(line["parts_ms"].values()) > 0
    assert {"photometry", "teacher's forward", "teacher's update"} <= lines["fixmatch"]["parts_ms"].keys()
    names = {f"{precision}{last}" for precision in ("fp32", "bf16") for last in ("", " channels_last")}
    assert {option["option"] for option in lines["fixmatch"]["options"]} == names
    assert len(step.as_text(found).splitlines()) == 14


def test_passes_are_timed_compiled_too(recipe: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def compile_(net: SegNet) -> None:
        compiled.append(net)

    monkeypatch.setattr(SegNet, "compile", compile_)
    one = load_recipe(recipe())
    options = step.by_option(one, Path(), torch.device("cpu"), 1, True)
    assert len(options) == 5
    assert "compiled" in {option["option"] for option in options}
    assert len(compiled) == 2  # student and teacher


def test_peak_is_one_number(recipe: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(train__threads=torch.get_num_threads())
    step.main([str(path), "--device", "cpu", "--method", "supervised", "--peak", "least"])
    value = printed(capsys)
    assert value is None or value >= 0


# ---- memory.py


@pytest.mark.parametrize(
    ("crop", "side", "network", "smaller"),
    [((513, 513), 0.5, "deeplabv3plus", (257, 257)), ((128, 192), 0.5, "deeplabv2", (64, 96)),
     ((518, 518), 0.5, "dpt", (252, 252)), ((801, 801), 1.0, "deeplabv3plus", (801, 801))],
)  # fmt: skip
def test_crops_that_memory_is_measured_with(
    crop: tuple[int, int], side: float, network: str, smaller: tuple[int, int]
) -> None:
    assert memory.smaller(crop, side, network) == smaller


def test_memory_follows_from_two_peaks(recipe: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """0.3 GB once and 2 GB a megapixel, half of it in bf16."""
    asked = []

    def peak(path: Path, overrides: list[str], method: str, device: str, side: str) -> float:
        found = load_recipe(path, overrides).train
        asked.append((found.precision, found.batch, found.crop))
        return 300 + (2000 if found.precision == "fp32" else 1000) * found.batch * found.crop[0] * found.crop[1] / 1e6

    monkeypatch.setattr(memory, "peak_apart", peak)
    line = memory.measure(recipe(train__batch=16, train__crop=[128, 192]), [], 0.5, (2, 4), True)
    own = 16 * 128 * 192 / 1e6
    for precision, slope in (("fp32", 2.0), ("bf16", 1.0)):
        found = line[precision]
        assert found["once_gb"] == pytest.approx(0.3)
        assert found["gb_a_megapixel"] == pytest.approx(slope)
        assert found["gb"] == pytest.approx(found["measured_gb"]) == pytest.approx(0.3 + slope * own)
    assert asked[:3] == [("fp32", 2, (64, 96)), ("fp32", 4, (64, 96)), ("fp32", 16, (128, 192))]
    assert memory.as_text([line]).count("\n") == 3


@pytest.mark.parametrize(("forward", "sizes"), [("apart", [2, 2]), ("joint", [4])])
def test_least_passes_are_forwards_and_backward_only(recipe: Write, forward: str, sizes: list[int]) -> None:
    path = recipe(method__forward=forward)
    bench = passes.prepare(load_recipe(path), torch.device("cpu"), path.parent)
    seen: dict[str, list[int]] = {"student": [], "teacher": []}
    for name, net in bench.method.named_children():
        if name in seen:
            net.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(len(args[0])))
    before = [w.detach().clone() for w in bench.method.student.parameters()]
    reached = []
    for weight in bench.method.student.parameters():
        weight.register_hook(lambda gradient: reached.append(bool(gradient.any())))
    bench.least()()
    assert seen == {"student": sizes, "teacher": [2]}
    assert len(reached) >= len(before)
    assert all(torch.equal(a, b) for a, b in zip(before, bench.method.student.parameters(), strict=True))
    assert all(w.grad is None for w in bench.method.student.parameters())


@pytest.mark.parametrize(("unlabelled", "critic", "sizes"), [("rest", False, [2, 2, 4]), ("none", False, [2, 4]),
                                                             ("rest", True, [2, 2, 6])])  # fmt: skip
def test_least_passes_of_a_method_with_a_critic(recipe: Write, unlabelled: str, critic: bool, sizes: list[int]) -> None:
    path = recipe(method__name="advsemiseg", method__critic_unlabelled=critic, data__unlabelled=unlabelled)
    bench = passes.prepare(load_recipe(path), torch.device("cpu"), path.parent)
    seen: list[int] = []
    bench.method.critic.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    bench.least()()
    assert seen == sizes
    assert all(w.grad is None for w in bench.method.parameters())
    bench.whole()


@pytest.mark.parametrize(
    ("method", "student", "teacher"),
    [("meanteacher", [4], [4]), ("cutmixseg", [2, 2], [2]), ("u2pl", [4], [4])],
)
def test_least_passes_of_methods_with_a_teacher(
    recipe: Write, method: str, student: list[int], teacher: list[int]
) -> None:
    options: dict[str, Any] = {"method__queue": 64, "method__queue_first": 64, "method__push": 64}
    path = recipe(method__name=method, **(options if method == "u2pl" else {}))
    bench = passes.prepare(load_recipe(path), torch.device("cpu"), path.parent)
    seen: dict[str, list[int]] = {"student": [], "teacher": []}
    for name, found in seen.items():
        net = getattr(bench.method, name)
        net.register_forward_pre_hook(lambda _, args, found=found: found.append(len(args[0])))
    bench.least()()
    assert seen == {"student": student, "teacher": teacher}
    assert all(w.grad is None for w in bench.method.parameters())
    bench.whole()
    assert "contrastive part" in step.breakdown(bench, 1) or method != "u2pl"


def test_breakdown_leaves_nothing_changed(recipe: Write) -> None:
    path = recipe()
    bench = passes.prepare(load_recipe(path), torch.device("cpu"), path.parent)
    before = fixmatch.strong, torch.Tensor.backward
    step.breakdown(bench, 1)
    assert (fixmatch.strong, torch.Tensor.backward) == before
    assert "forward" not in vars(bench.method.student)


def test_a_method_without_least_passes_is_named(recipe: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = recipe()
    bench = passes.prepare(load_recipe(path), torch.device("cpu"), path.parent)
    monkeypatch.delitem(passes.LEAST, "fixmatch")
    with pytest.raises(InputError, match="least passes of fixmatch"):
        bench.least()


def test_functions_take_turns() -> None:
    calls: list[str] = []
    functions = {name: (lambda name=name: calls.append(name)) for name in ("a", "b")}
    times = step.take_turns(functions, lambda: None, 2)
    assert calls == ["b", "a", "a", "b"] * 2 or calls == ["a", "b", "b", "a"] * 2
    assert [len(t) for t in times.values()] == [2, 2]


# ---- data.py


def test_data_measures_three_states(recipe: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(train__threads=torch.get_num_threads(), data__size=32)
    before = os.environ.get("SEMISEG_CACHE")
    data.main([str(path), "--workers", "0", "--steps", "2", "--json"])
    result = printed(capsys)
    assert [line["state"] for line in result["loader"]] == ["uncached", "first pass", "cached"]
    assert all(line["ratio"] > 0 for line in result["loader"])
    assert result["images_per_step"] == 4
    assert os.environ.get("SEMISEG_CACHE") == before


def test_data_reads_jpegs_that_it_makes(recipe: Write, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(recipe(data__root="nowhere")), "--workers", "0", "--steps", "2", "--made", "48", "96"]
    data.main([*words, "--json"])
    result = printed(capsys)
    assert (result["size"], result["images_per_step"]) == ([48, 96], 4)
    assert result["images_per_second"] > 0
    data.main(words)
    assert "from JPEGs of 48x96" in capsys.readouterr().out


# ---- accuracy.py


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Stands in for training: every run scores at once; the list tells which were started."""
    started: list[tuple[str, int]] = []

    def train(path: Path, folder: Path, overrides: list[str], seconds: float | None) -> bool:
        r: Recipe = load_recipe(path, overrides)
        started.append((path.stem, r.train.seed))
        found = load_data(r.data, path.parent)
        matrix = np.zeros((len(found.test), 7, 7), dtype=np.int64)
        matrix[:, 0, 0], matrix[:, 1, 1], matrix[:, 1, 0] = 10, 5, np.arange(len(matrix))
        scores = Scores(matrix, tuple(found.test.names), found.classes)
        save_scores(folder / "results.npz", scores)
        results = {"split": "test", "labelled": len(found.labelled), "miou": scores.miou, "per_class": scores.per_class}
        write_json(folder / "results.json", results | {"val_best": None, "seconds": 60.0, "peak_gb": 1.0})
        return True

    monkeypatch.setattr(accuracy, "train", train)
    return started


@pytest.fixture
def run_queue(tmp_path: Path) -> Callable[..., int]:
    def call(*arguments: object) -> int:
        places = ["--results", str(tmp_path / "results.csv"), "--runs", str(tmp_path / "runs")]
        return int(accuracy.main([*map(str, arguments), *places]))

    return call


def test_a_row_that_stands_is_not_run_again(
    recipe: Write, trained: list[tuple[str, int]], run_queue: Callable[..., int], tmp_path: Path, golden: Path
) -> None:
    a, b = recipe("a", "supervised"), recipe("b")
    assert run_queue(a, b, "--seeds", "0-1") == 0
    assert trained == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    rows = common.read_csv(tmp_path / "results.csv")
    assert [(r["method"], r["seed"], r["labelled"], r["masks"]) for r in rows[:2]] == [
        ("supervised", "0", "2", "4"),
        ("fixmatch", "0", "2", "4"),
    ]
    assert json.loads(rows[0]["per_class"])["water"] is None

    run_queue(a, b, "--seeds", "0-2")
    assert trained[4:] == [("a", 2), ("b", 2)]
    (golden / "fixmatch.txt").write_text("changed")
    run_queue(a, b, "--seeds", "0")
    assert trained[6:] == [("b", 0)]
    assert len(common.read_csv(tmp_path / "results.csv")) == 7


def test_what_makes_another_experiment(recipe: Write, tmp_path: Path) -> None:
    def job(**options: object) -> Any:
        return ledger.Job.of(recipe("one", **options), 0, tmp_path)

    first = ledger.flat_options(job().recipe)
    row = {"method_hash": ledger.method_hash("fixmatch"), "seed": "0", "options": json.dumps(first)}
    assert job(train__workers=3, train__threads=5, train__save_every=7, train__seed=9, data__split_seed=9).stands(row)
    assert not job(train__steps=3).stands(row)
    assert not job(method__threshold=0.5).stands(row)
    assert not job().stands(row | {"seed": "1"})
    assert not job().stands(row | {"method_hash": "other"})
    assert "data.root" in first
    assert "/" not in first["data.root"]


def test_an_option_that_is_newer_than_a_row_counts_as_its_default(recipe: Write, tmp_path: Path) -> None:
    job = ledger.Job.of(recipe(), 0, tmp_path)
    options = ledger.flat_options(job.recipe)
    older = {name: value for name, value in options.items() if name != "method.ema"}
    row = {"method_hash": job.method_hash, "seed": "0", "recipe_hash": "older", "options": json.dumps(older)}
    assert job.stands(row)
    assert job.recipe_hash([row]) == "older"  # the seeds that are still to come belong to the same experiment
    other = ledger.Job.of(recipe(method__ema=0.5), 0, tmp_path)
    assert not other.stands(row)
    assert other.recipe_hash([row]) == ledger.digest(ledger.flat_options(other.recipe))
    assert not job.stands(row | {"options": json.dumps(options | {"method.gone": 1})})


def test_without_golden_losses_nothing_is_run(
    recipe: Write, trained: list[tuple[str, int]], run_queue: Callable[..., int], golden: Path
) -> None:
    (golden / "fixmatch.txt").unlink()
    with pytest.raises(InputError, match=r"fixmatch\.txt is missing"):
        run_queue(recipe())
    assert trained == []


def test_what_did_not_fit_or_failed_stands_in_todo(
    recipe: Write,
    trained: list[tuple[str, int]],
    run_queue: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    a, todo = recipe("a"), tmp_path / "todo.txt"
    todo.write_text("other.yaml --seeds 3\n")
    assert run_queue(a, "--seeds", "0,2", "--minutes", "0") == 0
    assert todo.read_text().splitlines() == ["other.yaml --seeds 3", f"{a} --seeds 0", f"{a} --seeds 2"]
    run_queue(a, "--seeds", "0")
    assert todo.read_text().splitlines() == ["other.yaml --seeds 3", f"{a} --seeds 2"]

    def fails(*_: object) -> bool:
        raise InputError("no space")

    capsys.readouterr()
    monkeypatch.setattr(accuracy, "train", fails)
    assert run_queue(a, "--seeds", "0-2", "--json") == 1
    result = printed(capsys)
    assert result["failed"] == ["no space"] * 2
    assert result["left"] == [f"{a} --seeds 1", f"{a} --seeds 2"]
    assert trained == [("a", 0)]


def test_subsets_are_added_to_rows_that_stand(
    recipe: Write, trained: list[tuple[str, int]], run_queue: Callable[..., int], tmp_path: Path, scenes: Path
) -> None:
    a = recipe("a")
    first = min((scenes / "images" / "test").iterdir()).stem
    run_queue(a, "--seeds", "0")
    run_queue(a, "--seeds", "0", "--subset", f"first={first}", "--subset", "none=nonesuch")
    (row,) = common.read_csv(tmp_path / "results.csv")
    assert trained == [("a", 0)]
    assert float(row["miou_first"]) == 100
    assert float(row["miou"]) < 100
    assert "miou_none" not in row


def arm(recipe: str, method: str, labelled: int, miou: list[float], **columns: str) -> list[dict[str, str]]:
    plain = {"recipe": recipe, "method": method, "labelled": str(labelled), "masks": "8", "data": "x", "split": "test"}
    plain |= {"setting": "s", "recipe_hash": "h", "method_hash": "m", "val_best": "", "minutes": "1", "gb": "2"}
    return [plain | columns | {"seed": str(seed), "miou": str(value)} for seed, value in enumerate(miou)]


def test_table_by_hand() -> None:
    rows = arm("few", "supervised", 2, [40, 42, 44]) + arm("all", "supervised", 8, [60, 62, 64])
    rows += arm("better", "fixmatch", 2, [44, 47, 50, 99]) + arm("elsewhere", "fixmatch", 2, [1, 2], setting="t")
    found = {line["recipe"]: line for line in summary.lines(rows, set())}
    better = found["better"]
    assert (better["miou"], better["pairs"]) == (60, 3)  # the fourth seed has no partner
    assert better["difference"] == pytest.approx(5)
    half = stats.t.ppf(0.975, 2) * 1 / np.sqrt(3)
    assert better["interval"] == pytest.approx([5 - half, 5 + half])
    assert better["gap_closed"] == pytest.approx(0.25)
    assert found["few"]["difference"] is None
    assert found["few"]["miou_spread"] == pytest.approx(2)
    assert found["all"]["difference"] is None
    assert found["elsewhere"]["difference"] is None
    assert "25 %" in summary.as_text(list(found.values()))


def test_table_leaves_out_rows_of_an_earlier_method() -> None:
    rows = arm("a", "fixmatch", 2, [10, 20], method_hash="old") + arm("a", "fixmatch", 2, [30])
    (line,) = summary.lines(rows, {"a"})
    assert (line["miou"], line["seeds"]) == (30, [0])


# ---- mechanism.py


class Constant(nn.Module):
    """Says class 0 everywhere: surely in the upper half of an image, hardly in the lower one."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(image), 7, *image.shape[2:])
        logits[:, 0, : image.shape[2] // 2], logits[:, 0, image.shape[2] // 2 :] = 50, 0.1
        return logits


def test_mechanism_compares_with_the_masks_that_exist(recipe: Write) -> None:
    path = recipe()
    found, rows = mechanism.with_masks(load_recipe(path), path.parent)
    assert len(found.unlabelled) == 4
    assert not found.unlabelled.masked.any()
    assert set(rows.names) < set(found.unlabelled.names)  # two of these have no mask
    assert rows.masked.all()
    every, sure = mechanism.measure(Constant(), rows, found, 0.9, torch.device("cpu"))
    assert every[:, 1:].sum() == 0
    assert 0 < sure.sum() <= len(rows) * 16 * 48
    point = mechanism.Point(0.5, every, sure).plain(found.classes)
    assert point["sure"] == pytest.approx(sure.sum() / every.sum())
    assert point["right"] == pytest.approx(sure[0, 0] / sure.sum())
    assert point["per_class"]["labels_right"]["sky"] == pytest.approx(point["right"])
    assert np.isnan(point["per_class"]["labels_right"]["sign"])


def test_mechanism_from_training_to_files(recipe: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(recipe(method__threshold=0.2)), "--out", str(tmp_path / "m.json"), "--runs", str(tmp_path / "r")]
    mechanism.main([*arguments, "--shares", "1", "0.5", "--images", "1", "--seed", "3", "--json"])
    result = printed(capsys)
    assert [p["share"] for p in result["points"]] == [0.5, 1.0]
    assert (result["seed"], result["images"]) == (3, 1)
    assert json.loads((tmp_path / "m.json").read_text())["points"] == result["points"]
    assert (tmp_path / "m.png").stat().st_size > 10_000


def test_mechanism_needs_a_threshold(recipe: Write, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="supervised has no threshold"):
        mechanism.run(recipe(method="supervised"), 0, [1.0], None, tmp_path)


# ---- critic.py


def judged(wrong: Mapping[int, int], right: Mapping[int, int]) -> Any:
    counts = np.zeros((2, critic.BINS), dtype=np.int64)
    for row, bins in enumerate((wrong, right)):
        for place, count in bins.items():
            counts[row, place] = count
    return critic.Judged(counts)


@pytest.mark.parametrize(
    ("wrong", "right", "auroc"),
    [({100: 3}, {900: 5}, 1.0), ({900: 3}, {100: 5}, 0.0), ({500: 3}, {500: 5}, 0.5), ({1: 1, 3: 1}, {2: 1}, 0.5),
     ({1: 2, 3: 1}, {2: 3}, 2 / 3)],
)  # fmt: skip
def test_auroc(wrong: Mapping[int, int], right: Mapping[int, int], auroc: float) -> None:
    assert judged(wrong, right).auroc() == pytest.approx(auroc)


def test_pixels_from_a_threshold_on_are_selected() -> None:
    found = judged({100: 3, 200: 1}, {199: 1, 200: 3}).at(0.2)
    assert found == {"selected": 0.5, "selected_right": 0.75, "rejected_right": 0.25}
    assert np.isnan(judged({}, {500: 1}).at(0.2)["rejected_right"])


def test_critic_measures_a_run(recipe: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = recipe(method="advsemiseg"), tmp_path / "critic.json"
    arguments = [str(path), "--out", str(out), "--runs", str(tmp_path / "runs"), "--only", "as it is", "T_semi 1"]
    critic.main([*arguments, "--json"])
    one, other = printed(capsys)["variants"]
    assert one["own"]["selected"] == one["at"]["0.2"]["selected"]
    assert other["threshold"] == 1
    assert 0 <= one["auroc"] <= 1
    assert 0 <= one["miou"] <= 1
    assert one["images"] == 2
    assert out.with_suffix(".png").stat().st_size > 1000
    assert json.loads(out.read_text())["variants"][0]["auroc"] == one["auroc"]
    assert "| as it is" in critic.as_text([one, other])
    with pytest.raises(InputError, match="--only nothing is unknown"):
        critic.main([*arguments[:-2], "nothing"])


@pytest.mark.parametrize("photo", [True, False])
def test_a_picture_without_the_data_set(tmp_path: Path, photo: bool) -> None:
    image, label = np.full((2, 3, 3), 10, dtype=np.uint8), np.array([[0, 1, 255]] * 2)
    found = common.coloured(image if photo else None, label, [(200, 0, 0), (0, 100, 0)])
    assert found.shape == (2, 3, 3)
    assert found[0].tolist() == (
        [[105, 5, 5], [5, 55, 5], [10] * 3] if photo else [[200, 0, 0], [0, 100, 0], [255] * 3]
    )
    common.draw_panels(tmp_path / "a.png", [("label", found), ("map", np.zeros((2, 3)))], (0.0, 1.0))
    assert (tmp_path / "a.png").stat().st_size > 1000


# ---- partition.py and contrast.py


def test_partition_measures_a_run(recipe: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"queue": 64, "queue_first": 64, "push": 32, "width": 8, "warm_up": 0.0, "least": 0.0}
    path = recipe(
        train__steps=4, train__log_every=1, method__name="u2pl", **{f"method__{k}": v for k, v in options.items()}
    )
    out = tmp_path / "u2pl.json"
    arguments = [str(path), "--out", str(out), "--runs", str(tmp_path / "runs"), "--only", "as it is", "no partition"]
    partition.main([*arguments, "--json"])
    one, other = printed(capsys)["variants"]
    assert [point["step"] for point in one["over_time"]] == [1, 2, 4]
    for line in (one, other):
        assert line["images"] == 2
        assert all(0 <= p[key] <= 1 for p in line["over_time"] for key in ("reliable_right", "unreliable_right"))
        assert all(p["least_other"] <= p["other"] <= 1 for p in line["over_time"])
    assert 0 <= one["nearest"] <= 1
    assert out.with_suffix(".png").stat().st_size > 1000
    assert "| as it is" in partition.as_text([one, other])
    with pytest.raises(InputError, match="--only nothing is unknown"):
        partition.main([*arguments[:-2], "nothing"])
    with pytest.raises(InputError, match="fixmatch has no partition"):
        partition.main([str(recipe("other")), *arguments[1:5], "--only", "as it is"])


def test_negatives_by_hand() -> None:
    """Three classes, ranks 1 to 2: an unreliable pixel is a negative of its second class."""
    taught = object.__new__(partition.Taught)
    taught.classes, taught.ranks, taught.limit = 3, (1, 2), torch.tensor(0.5)
    taught.masks, taught.nats = torch.tensor([0, 1, 2, 255]), torch.tensor([0.6, 0.7, 0.1, 0.9])
    taught.probs = torch.tensor([[0.5, 0.4, 0.1], [0.5, 0.4, 0.1], [0.1, 0.2, 0.7], [0.2, 0.5, 0.3]])
    taught.labels = taught.probs.argmax(1)
    assert taught.partition() == {"reliable_right": 1.0, "unreliable_right": 0.5}
    found = taught.negatives("unreliable")
    assert found == pytest.approx({"other": 0.5, "at_random": 2 / 3, "least_other": 0.5})
    assert taught.negatives("all") == pytest.approx(dict.fromkeys(("other", "at_random", "least_other"), 2 / 3))


def test_contrast_is_measured(recipe: Write, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"queue": 64, "queue_first": 64, "push": 64}
    path = recipe(method__name="u2pl", **{f"method__{name}": value for name, value in options.items()})
    sizes = ["--classes", "5", "--images", "4", "--side", "16", "--width", "8", "--queue", "2000", "--rounds", "1"]
    contrast.main([*sizes, "--device", "cpu", "--step", str(path), "--json"])
    found = printed(capsys)
    assert found["faster"] == pytest.approx(found["loop_ms"] / found["ours_ms"])
    assert 0.5 <= found["queues_in_float32"] < 0.51
    assert found["part_of_step"] > 0
    assert "times faster" in contrast.as_text(found)


# ---- centroids.py


def test_centroids_are_timed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEMISEG_CACHE", "changed and put back")
    centroids.main(["--maps", "23", "--height", "40", "--width", "80", "--classes", "5", "--workers", "0", "--json"])
    found = printed(capsys)
    assert found["maps"] == 23
    assert found["places"] > 23
    assert found["maps_per_second"] == pytest.approx(23 / found["seconds"])
    assert "target: 3000 maps" in centroids.as_text(found)


# ---- labelling.py, schedule.py and pseudolabels.py


def test_labelling_is_measured(recipe: Write, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--size", "32", "48", "--images", "2", "--rounds", "2", "--threads", str(torch.get_num_threads())]
    labelling.main([str(recipe()), *sizes, "--pools", "2", "6", "--json"])
    found = printed(capsys)
    assert found["speed"]["images"] == 2
    assert found["speed"]["images_per_second"].keys() == {"bare", "predicted", "labelled"}
    assert 0 < found["speed"]["ratio"] < 2
    assert found["speed"]["kb_an_image"] > 0
    assert found["memory"]["pools"] == [2, 6]
    assert len(found["memory"]["peak_mb_above_start"]) == 2
    assert "for 10,000 images more" in labelling.as_text(found)


def test_schedules_are_measured(recipe: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(method="supervised", train__batch=8, train__threads=torch.get_num_threads())
    schedule.main([str(path), "--crop", "64", "64", "--rounds", "1", "--steps", "6", "--json"])
    found = printed(capsys)
    assert found["passes"].keys() == found["reading"].keys() == set(schedule.SCHEDULES)
    predicted = {name: line["predicted"] for name, line in found["passes"].items()}
    assert predicted["baseline"] == 1
    assert predicted["coarse2fine"] == predicted["fine2coarse+"] == pytest.approx(2)
    assert 1 < predicted["alternate"] < 1.6
    for side in (found["passes"], found["reading"]):
        assert side["baseline"]["ratio"] == 1
        assert side["alternate"]["ratio"] == pytest.approx(side["baseline"]["ms"] / side["alternate"]["ms"])
    assert "| coarse2fine+ " in schedule.as_text(found)


def test_a_schedule_is_trained_and_compared(
    recipe: Write, trained: list[tuple[str, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = accuracy.train

    def train(path: Path, folder: Path, overrides: list[str], seconds: float | None) -> bool:
        first = 0.2 if load_recipe(path, overrides).train.schedule == "baseline" else 0.5
        common.write_csv(
            folder / "metrics.csv", [{"step": "0", "val_miou": str(first)}, {"step": "1", "val_miou": "0.4"}]
        )
        return bool(quick(path, folder, overrides, seconds))

    monkeypatch.setattr(accuracy, "train", train)
    given = (recipe(method="supervised"), ["optim.lr=0.1"], "coarse2fine+", [0, 1], tmp_path / "runs")
    found = schedule.compared_by_training(*given)
    assert trained == [("tiny", seed) for seed in (0, 0, 1, 1)]
    assert (found["pairs"], found["difference"], found["interval"]) == (2, 0, (0, 0))
    assert found["minutes"] == {"baseline": 1, "coarse2fine+": 1}
    assert found["minutes_to_goal"] == {"baseline": [1, 1], "coarse2fine+": [0.5, 0.5]}
    schedule.compared_by_training(*given)
    assert len(trained) == 4


# ---- arms.py


@pytest.fixture
def compare_arms(recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    monkeypatch.setattr(arms, "LEDGER", tmp_path / "results.csv")

    def call(*arguments: str) -> None:
        path = str(recipe())
        two = ["--arm", "one", path, "--arm", "other", path, "optim.lr=0.1", "data.split_seed={seed}"]
        arms.main([*two, "--seeds", "0-1", "--runs", str(tmp_path / "arms"), *arguments])

    return call


def test_arms_are_trained_and_compared(
    compare_arms: Callable[..., None], trained: list[tuple[str, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    compare_arms("--group", "two=sky,ground", "--json")
    one, other = printed(capsys)["arms"]
    assert trained == [("tiny", seed) for seed in (0, 0, 1, 1)]
    assert (one["arm"], other["arm"], other["difference"], other["pairs"]) == ("one", "other", 0, 2)
    assert one["miou"].keys() == {"0", "1"}
    first, second = (one["per_class"][name] for name in ("sky", "ground"))
    assert one["groups"]["two"]["0"] == pytest.approx((first + second) / 2)
    compare_arms()
    told = capsys.readouterr().out
    assert len(trained) == 4
    assert "| other " in told
    assert "| +0.00 " in told


def test_arms_take_rows_of_the_ledger(
    compare_arms: Callable[..., None], recipe: Write, trained: list[tuple[str, int]], run_queue: Callable[..., int]
) -> None:
    run_queue(recipe(), "--seeds", "0-1")
    trained.clear()
    compare_arms()
    assert trained == [("tiny", 0), ("tiny", 1)]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--group", "two"], "two is not of the form NAME=CLASS,CLASS"),
        (["--arm", "third"], "--arm third lacks its recipe"),
        (["--arm", "one", "x.yaml"], "two arms have the same name"),
    ],
)
def test_arms_that_mean_nothing(
    compare_arms: Callable[..., None], capsys: pytest.CaptureFixture[str], more: list[str], told: str
) -> None:
    with pytest.raises(SystemExit):
        compare_arms(*more)
    assert told in capsys.readouterr().err


def test_a_group_of_classes_that_are_not_there(compare_arms: Callable[..., None], trained: list[object]) -> None:
    with pytest.raises(InputError, match="--group one: no class is called cow; there are sky, ground, "):
        compare_arms("--group", "one=cow")
    assert not trained


def test_pseudolabels_of_a_run(recipe: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = recipe(method="selftraining", method__least_pixels=1), tmp_path / "labels.json"
    more = ["--out", str(out), "--runs", str(tmp_path / "runs"), "--crops", "6"]
    pseudolabels.main([str(path), *more, "--no-photo", "--json"])
    found = printed(capsys)
    assert found["images"] == 2  # two others have no mask
    assert 0 <= found["right"] <= 1
    assert sum(one["share"] for one in found["per_class"].values()) == pytest.approx(1)
    assert np.mean([one["right"] for one in found["tenths"]]) == pytest.approx(found["right"])
    assert [side["centred"] for side in found["crops"]] == [0, 0.5]
    for side in found["crops"]:
        assert side["crops"] == 6
        assert 0 <= side["wrong"] <= 1
        assert sum(side["classes"]) == pytest.approx(1)
    assert out.with_suffix(".png").stat().st_size > 1000
    run = tmp_path / "runs" / found["run"]
    pseudolabels.main([str(run), *more])
    assert "wrong in 6 crops" in capsys.readouterr().out
    assert json.loads(out.read_text())["confusion"] == found["confusion"]
    with pytest.raises(InputError, match=r"round-2.*report\.json is missing: finish the run"):
        pseudolabels.main([str(run), *more, "--round", "2"])


def test_a_run_without_pseudo_labels_is_refused(recipe: Write, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="fixmatch writes no pseudo-labels"):
        pseudolabels.pools(load_recipe(recipe()), tmp_path, 1)


def test_tenths_by_hand() -> None:
    """60 sure pixels are right, 40 others take the second class for the first."""
    counts = np.zeros((2, 2, 256), dtype=np.int64)
    counts[0, 0, 255], counts[0, 1, 51] = 60, 40
    found = pseudolabels.tenths(counts)
    assert [one["right"] for one in found] == pytest.approx([0] * 4 + [1] * 6)
    assert [one["upto"] for one in found] == pytest.approx([0.2] * 4 + [1] * 6)
    assert pseudolabels.by_class(counts, "ab")["a"] == {
        "share": 1, "share_of_masks": 0.6, "labels_right": 0.6, "found": 1
    }  # fmt: skip


# ---- processes.py


@pytest.mark.slow
def test_processes_are_measured(recipe: Write, capsys: pytest.CaptureFixture[str]) -> None:
    processes.main([str(recipe(train__batch=8)), "--steps", "15", "--json"])
    found = printed(capsys)
    assert found["images_per_second"].keys() == {"1", "2", "2 runs apart"}
    assert found["ratio"] == pytest.approx(found["images_per_second"]["2"] / found["images_per_second"]["1"])
    with pytest.raises(InputError, match="--steps 14 leaves nothing"):
        processes.main(["--steps", "14"])


# ---- the page --------------------------------------------------------------------------------------------------------


def test_the_page_is_what_the_ledger_says() -> None:
    assert results.main(["--check"]) == 0


def test_the_ratio_interval_ends_where_the_ratio_would_be_refused() -> None:
    rng = np.random.default_rng(0)
    below = rng.normal(3, 0.5, 5)
    above = 0.5 * below + rng.normal(0, 0.3, 5)
    ends = summary.ratio_interval(above, below)
    assert ends[0] < above.mean() / below.mean() < ends[1]
    for end in ends:
        left = above - end * below
        assert abs(left.mean()) / stats.sem(left) == pytest.approx(stats.t.ppf(0.975, 4))
    assert summary.ratio_interval(above, rng.normal(0, 1, 5)) is None, "of a gap that may be none"


def test_curves_and_ranks(tmp_path: Path) -> None:
    def line(data: str, method: str, labelled: int, miou: float) -> dict[str, Any]:
        shared = {"data": data, "setting": "tiny", "split": "test", "masks": 400, "seeds": [0, 1], "subsets": {}}
        shared |= {"val_best": 50.0, "val_best_spread": 1.0, "miou_spread": 1.0, "minutes": 3.0, "gap_pairs": 1}
        shared |= {"interval": None, "gap_closed": 0.5, "gap_interval": None, "gb": 1.0, "pairs": 2}
        shared |= {"difference": None if method == "supervised" else miou - 45}
        return {"method": method, "labelled": labelled, "miou": miou, **shared}

    found = [
        *(line("camvid", "supervised", n, 40 + n / 10) for n in (23, 46, 92)),
        *(line("camvid", "fixmatch", n, 42 + n / 10) for n in (23, 46, 92)),
        line("camvid", "u2pl", 46, 60.0),
        line("camvid", "fixmatch", 46, 99.0) | {"setting": "longer", "seeds": [0, 2, 3]},
        *(line(data, m, n, s) for data, n in (("idd_lite", 88), ("dsb2018", 29)) for m, s in RANKED.items()),
    ]
    assert list(results.curves(found)) == ["supervised", "fixmatch"], "one number of labels is no curve"
    paired = [found[0], *found[1:4], found[4] | {"difference": 1.0, "miou_spread": None}, *found[5:6]]
    points = results.heights(paired)
    assert points["supervised"] == [(n, 40 + n / 10, 1.0) for n in (23, 46, 92)]
    assert points["fixmatch"][1] == (46, 44.6 + 1.0, None), "above labelled-only by the paired difference"
    results.draw(paired, tmp_path / "c.svg")
    results.draw(found, tmp_path / "a.svg")
    results.draw(found, tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    text = results.page(found)
    assert "labels-camvid.svg" in text
    assert "| 0, 2, 3 " in text, "no seed 1"
    assert "50 % " in text
    assert "(no end)" not in text, "one seed has no interval"
    ranks = [row for row in text.partition("## The default")[2].splitlines() if row.startswith("| ")]
    assert [row.split("|")[1].strip() for row in ranks] == ["method", "supervised", "fixmatch"], (
        "u2pl is not everywhere"
    )
    assert ranks[1].rstrip(" |").endswith("1.33")
    assert "default is `fixmatch`. `supervised` ranks first" in text
    assert "semi-supervised methods" not in text, "it is the first of these"


RANKED = {"supervised": 52.0, "fixmatch": 44.0}  # a gain of 3 on CamVid, losses of 1 elsewhere


@pytest.mark.parametrize("kind", ["files", "tar", "parquet"])
def test_a_pool_of_each_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """Pools of as many images as asked for, of which each is one that was written, and their lines."""
    if kind == "parquet":
        pytest.importorskip("pyarrow", reason="the parquet extra is not installed")
    monkeypatch.setattr(pool, "SHARD", 20)
    seen: list[tuple[int, int, set[bytes]]] = []

    def measured(scenes: Path, folder: Path, cache: Path, count: int) -> dict[str, Any]:
        data = load_data(pool.recipe_of(scenes, folder).data)
        extra = data.unlabelled[4:]
        seen.append((len(extra), count, {row.image.read_bytes() for row in extra}))
        return {"start": 1.0, "memory": len(extra), "reader": 3.0, "steps": [0.5, 0.6], "read": 0.001}

    monkeypatch.setattr(pool, "measured", measured)
    monkeypatch.setenv("SEMISEG_CACHE", str(tmp_path))
    words = ["--images", "10", "70", "--kinds", kind, "--size", "16", "24", "--folder", str(tmp_path)]
    pool.main([*words, "--json"])
    result = printed(capsys)
    assert [(images, count) for images, count, _ in seen] == [(10, 0), (10, 15), (70, 0), (70, 15)]
    pictures = set(pool.pictures((16, 24)))
    assert all(found <= pictures and len(found) == min(images, 20 if kind != "files" else 64)
               for images, _, found in seen)  # fmt: skip
    assert [(line["pool"], line["more_mb"], line["first_more_mb"]) for line in result["pools"]] == [
        (10, 0, 0),
        (70, 60, 60),
    ]
    assert not list(tmp_path.glob("tmp*")), "the pools are gone"
    pool.main(words)
    assert "| 70" in capsys.readouterr().out


def test_what_is_measured_of_a_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "WARM", 1)
    monkeypatch.setattr(pool, "READ", 3)
    synthetic.write(tmp_path / "scenes", train=8, labelled=4, val=0, test=0, size=(32, 48))
    pool.make(tmp_path / "pool", "tar", 5, (32, 48))
    plain = pool.recipe_of

    def smaller(*folders: Path) -> Recipe:
        recipe = plain(*folders)
        return recipe.model_copy(update={"train": recipe.train.model_copy(update={"crop": (32, 32)})})

    monkeypatch.setattr(pool, "recipe_of", smaller)
    monkeypatch.setenv("SEMISEG_CACHE", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    found = pool.measure(tmp_path / "scenes", tmp_path / "pool", 2)
    torch.set_num_threads(threads)
    assert found["images"] == 9
    assert len(found["steps"]) == 2
    assert min(found["start"], found["read"], found["memory"], *found["steps"]) > 0
    assert pool.measure(tmp_path / "scenes", tmp_path / "pool", 0)["steps"] == []
