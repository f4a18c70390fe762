"""Pseudo-labels on the disk: the pixels of `predict`, whole files only, known by what they depend on."""

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from semiseg import parallel, testing
from semiseg.data.cache import open_confidence, open_image, open_mask, open_soft, resize_mask
from semiseg.data.formats import MaskCode, read_mask, write_planes
from semiseg.data.loader import Steps
from semiseg.data.rows import Rows
from semiseg.data.sampling import Phase, Stream, Timetable
from semiseg.data.splits import Data
from semiseg.engine import pseudo
from semiseg.engine.evaluate import probabilities, to_tensor
from semiseg.engine.predict import Job, Predictor, predict_files
from semiseg.engine.pseudo import fingerprint, pseudo_label
from semiseg.ops.pseudo import Merge, Pair
from semiseg.types import IGNORE, InferenceConfig, InputError, Labelled

CPU = torch.device("cpu")
PLAIN = InferenceConfig()


class Net(nn.Module):
    """Probabilities from colours, the same in eval mode only."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.mix = nn.Conv2d(3, classes, 3, padding=1)
        self.norm = nn.BatchNorm2d(classes)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = 4 * self.norm(self.mix(image.float() / 255))
        return logits


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEMISEG_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def data(tmp_path: Path) -> Data:
    return testing.Case("supervised", tmp_path / "case").data()


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    made = Net()
    assert made.norm.running_mean is not None
    made.norm.running_mean.fill_(0.1)
    return made


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*.*")) if p.is_file()}


def label(net: nn.Module, data: Data, folder: Path, least: float = 0.0) -> tuple[Rows, list[str]]:
    rows, report = pseudo_label(net, data.unlabelled, data, folder, PLAIN, CPU, least)
    return rows, report.remarks(least)


def test_labels_are_those_of_predict(net: Net, data: Data, tmp_path: Path) -> None:
    net.train()
    rows, remarks = label(net, data, tmp_path / "labels")
    assert net.training
    assert net.norm.training
    (told,) = remarks
    assert told.startswith("every pixel has a pseudo-label (a tenth of the pixels have a confidence below 0.")
    assert len(rows) == len(data.unlabelled)
    predictor = Predictor(net.eval(), data.classes, data.palette, 3, None, PLAIN, CPU)
    predict_files(predictor, [row.image for row in data.unlabelled], tmp_path / "out", confidence=True)
    for number, row in enumerate(rows):
        assert row.image == data.unlabelled[number].image
        assert row.mask is not None
        assert row.mask.read_bytes() == (tmp_path / "out" / f"{row.image.stem}.png").read_bytes()
        confidence = tmp_path / "labels" / "confidence" / row.mask.parent.name / row.mask.name
        assert confidence.read_bytes() == (tmp_path / "out" / "confidence" / f"{row.image.stem}.png").read_bytes()


def test_killed_at_any_file_and_continued(net: Net, data: Data, tmp_path: Path) -> None:
    label(net, data, tmp_path / "whole", 0.5)
    move, count = os.replace, 0

    def replace_or_die(*args: str) -> None:
        nonlocal count
        count += 1
        if count % 4 == 0:
            raise KeyboardInterrupt
        move(*args)

    for _ in range(50):
        try:
            with mock.patch("os.replace", replace_or_die):
                rows, remarks = label(net, data, tmp_path / "killed", 0.5)
            break
        except KeyboardInterrupt:
            pass
    assert count > 8
    killed, whole = (files(tmp_path / name) for name in ("killed", "whole"))
    assert killed.pop("report.json")
    assert whole.pop("report.json")
    assert killed == whole
    assert len(rows) == len(data.unlabelled)
    assert remarks == label(net, data, tmp_path / "whole", 0.5)[1]


def test_what_is_there_is_not_made_again(net: Net, data: Data, tmp_path: Path) -> None:
    first, _ = label(net, data, tmp_path)
    with mock.patch.object(Predictor, "__call__", side_effect=AssertionError("predicted again")):
        second, _ = label(net, data, tmp_path)
    assert list(first) == list(second)


def test_labels_of_another_teacher_are_refused(net: Net, data: Data, tmp_path: Path) -> None:
    label(net, data, tmp_path)
    with pytest.raises(
        InputError, match=r"pseudo-labels that differ in least: remove the folder to make them anew, or"
    ):
        label(net, data, tmp_path, 0.5)
    with pytest.raises(InputError, match="differ in images:"):
        pseudo_label(net, data.unlabelled[1:], data, tmp_path, PLAIN, CPU)
    with pytest.raises(InputError, match="differ in inference:"):
        pseudo_label(net, data.unlabelled, data, tmp_path, InferenceConfig(flip=True), CPU)
    with torch.no_grad():
        net.norm.weight += 1e-6
    with pytest.raises(InputError, match="differ in teacher:"):
        label(net, data, tmp_path)


def test_pixels_below_the_least_confidence_are_ignored(net: Net, data: Data, tmp_path: Path) -> None:
    rows, (told,) = label(net, data, tmp_path, 0.6)
    kept = total = 0
    for row in rows:
        assert row.mask is not None
        mask = read_mask(row.mask, MaskCode(3))
        confidence = np.asarray(Image.open(tmp_path / "confidence" / row.mask.parent.name / row.mask.name))
        assert (mask[confidence < 152] == IGNORE).all()
        assert (mask[confidence > 154] != IGNORE).all()
        kept, total = kept + (mask != IGNORE).sum(), total + mask.size
    assert 0 < kept < total
    share = float(told.partition(" %")[0])
    assert share == pytest.approx(100 * kept / total, abs=0.051)  # one decimal is told


@pytest.mark.parametrize("least", [0.998, 1.0])
def test_what_is_told_is_counted_in_the_labels(net: Net, data: Data, tmp_path: Path, least: float) -> None:
    """Stored confidences are rounded to 1 / 255: they would tell of labels where there is none."""
    with torch.no_grad():
        net.norm.weight.zero_()
        net.norm.bias.copy_(torch.tensor([7.0, 0.0, 0.0])[: len(net.norm.bias)])
    _, (told,) = label(net, data, tmp_path, least)
    kept = np.mean([np.asarray(Image.open(p)) != IGNORE for p in (tmp_path / "labels").rglob("*.png")])
    assert told.startswith("NO pixel" if kept == 0 else f"{100 * kept:.1f} %")


def test_the_limit_that_is_advised_keeps_half(net: Net, data: Data, tmp_path: Path) -> None:
    _, (told,) = label(net, data, tmp_path / "none", 1.0)
    limit = float(told.rpartition("; ")[2].split()[0])
    _, (told,) = label(net, data, tmp_path / "half", limit)
    assert float(told.partition(" %")[0]) >= 50


def test_two_teachers_neither_of_which_may_decide(net: Net, data: Data, tmp_path: Path) -> None:
    pair = Pair(net, net, Merge((0, 1, 2), least=1.0))
    _, (told,) = label(pair, data, tmp_path / "none")
    assert told.startswith("NO pixel has a pseudo-label, neither teacher may decide anywhere: a tenth of")
    pair = Pair(net, net, Merge((0, 1, IGNORE), doubt=0.3))
    _, (told,) = label(pair, data, tmp_path / "some")
    kept = np.mean([np.asarray(Image.open(p)) != IGNORE for p in (tmp_path / "some/labels").rglob("*.png")])
    assert 0 < kept < 1
    assert told.startswith(f"{100 * kept:.1f} % of the pixels have a pseudo-label (a tenth")


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("labels/0000/0000001.png", None, "0000001.png or what belongs to it is missing: remove .* to make the labels"),
        ("confidence/0000/0000001.png", None, "0000001.png or what belongs to it is missing"),
        ("report.json", b"{", "report.json is damaged: remove .* to make the labels anew"),
        ("report.json", b"{}", "report.json is damaged: remove"),
        ("labels.json", b"{", "labels.json is damaged: remove"),
        ("labels.json", None, "holds pseudo-labels, but labels.json is missing: remove the folder to make them anew"),
    ],
)
def test_damaged_labels_are_refused(
    net: Net, data: Data, tmp_path: Path, name: str, content: bytes | None, told: str
) -> None:
    label(net, data, tmp_path)
    (tmp_path / name).unlink() if content is None else (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=told):
        label(net, data, tmp_path)


def test_a_damaged_map_is_refused_before_the_report(net: Net, data: Data, tmp_path: Path) -> None:
    label(net, data, tmp_path)
    (tmp_path / "report.json").unlink()
    (tmp_path / "confidence/0000/0000001.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"0000001\.png is damaged: remove"):
        label(net, data, tmp_path)


def test_no_pixel_is_sure_enough(net: Net, data: Data, tmp_path: Path) -> None:
    with torch.no_grad():
        net.norm.weight.zero_()
        net.norm.bias.zero_()
    rows, (told,) = label(net, data, tmp_path, 0.9)
    assert told == (
        "NO pixel has a pseudo-label, none reaches a confidence of 0.9: a tenth of the pixels have a confidence below "
        "0.33, half below 0.33, nine tenths below 0.33; 0.33 keeps half"
    )
    assert all((read_mask(row.mask, MaskCode(3)) == IGNORE).all() for row in rows if row.mask is not None)


def test_an_image_that_cannot_be_read_is_left_out(net: Net, data: Data, tmp_path: Path) -> None:
    broken = data.unlabelled[2].image
    broken.write_bytes(b"x")
    rows, (told, _) = label(net, data, tmp_path / "labels")
    assert broken.name in told
    assert len(rows) == len(data.unlabelled) - 1
    assert broken not in [row.image for row in rows]
    broken.write_bytes(data.unlabelled[3].image.read_bytes())  # a pool that grew would change the student's draws
    again, (told_again, _) = label(net, data, tmp_path / "labels")
    assert list(again) == list(rows)
    assert told_again == told


def test_many_files_lie_in_folders(net: Net, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pseudo, "SHARD", 3)
    rows, _ = label(net, data, tmp_path)
    assert sorted(p.name for p in (tmp_path / "labels").iterdir()) == ["0000", "0001", "0002"]
    assert rows[7].mask == (tmp_path / "labels/0002/0000007.png").absolute()


def test_processes_share_the_images(net: Net, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    label(net, data, tmp_path / "one")
    monkeypatch.setattr(parallel, "world", lambda: 2)
    monkeypatch.setattr(parallel, "wait", lambda: None)
    monkeypatch.setattr(parallel, "gather", lambda value: [value])
    monkeypatch.setattr(parallel, "first", lambda value: value)
    monkeypatch.setattr(Job, "done", lambda _: False)  # both begin at the same time
    for rank in (0, 1):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        (tmp_path / "two" / "report.json").unlink(missing_ok=True)
        with mock.patch.object(pseudo, "_counted", return_value=(np.zeros(256, np.int64), 0)):
            if rank == 0:
                label(net, data, tmp_path / "two")
            else:
                with pytest.raises(FileNotFoundError):  # process 0 would write the report now
                    label(net, data, tmp_path / "two")
        assert len(files(tmp_path / "two" / "labels")) == 4 * (rank + 1)
    one, two = (files(tmp_path / name) for name in ("one", "two"))
    assert one.pop("report.json")
    assert one == two


@pytest.mark.parametrize(
    "code",
    [MaskCode(3), MaskCode(3, values=((7, 0), (8, 1), (9, 2))), MaskCode(3, colours=((1, 1, 1), (2, 2, 2), (3, 3, 3)))],
    ids=["ids", "values", "colours"],
)
def test_a_pool_of_masks_and_pseudo_labels(net: Net, data: Data, tmp_path: Path, code: MaskCode) -> None:
    """However the data's own masks are coded, labels are ids."""
    rows, _ = label(net, replace(data, code=code), tmp_path / "labels")
    both = data.labelled + rows
    assert [row.code for row in both] == [None] * 4 + [code.plain()] * 8
    assert [row.code for row in both[::-1][:9]] == [code.plain()] * 8 + [None]
    assert both[:4][0].code is None
    last = both[-1]
    assert last.mask is not None
    assert last.confidence is not None
    assert [row.confidence is None for row in both] == [True] * 4 + [False] * 8
    assert last.confidence == Path(str(last.mask).replace("labels/0", "confidence/0"))
    assert np.array_equal(open_confidence(last, None), np.asarray(Image.open(last.confidence)))
    assert np.array_equal(open_mask(last, code, None, cache=False), read_mask(last.mask, MaskCode(3)))
    if code == data.code:
        steps = Steps({"labelled": Stream(both, (Phase((32, 32), 4),))}, Timetable((Phase((32, 32), 4),), 12), data, 0)
        batches = [
            item.batches["labelled"] for item in (steps[0], steps[1], steps[2]) if not isinstance(item, InputError)
        ]
        assert sorted(int(r) for b in batches if isinstance(b, Labelled) for r in b.row) == list(range(12))


def test_the_images_of_a_card(net: Net, data: Data, tmp_path: Path) -> None:
    """They are hashed in parts, and are those of one text."""
    names = [f"folder/{i}.png" for i in range(2500)]
    for count in (0, 1, 1000, 1001, 2500):
        card = fingerprint(net, Rows.of(tmp_path, names[:count]), data, InferenceConfig())
        whole = hashlib.sha256("\n".join(names[:count]).encode()).hexdigest()[:16]
        assert card["images"] == f"{count}, {whole}"


def test_two_classes_of_which_a_label_shows_one(tmp_path: Path) -> None:
    """A mask of 0 and 255 is refused as ambiguous; a pseudo-label is not."""
    image, mask = tmp_path / "a.png", tmp_path / "m.png"
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(image)
    Image.fromarray(np.array([[0, 255]] * 2, np.uint8)).save(mask)
    rows = Rows.of(tmp_path, ["a.png"]).with_masks([mask], MaskCode(2).plain())
    assert open_mask(rows[0], MaskCode(2), None, cache=False).tolist() == [[0, 255]] * 2
    with pytest.raises(InputError, match="0 and 255 only"):
        open_mask(replace(rows, code=None)[0], MaskCode(2), None, cache=False)


def test_the_card_says_what_labels_depend_on(net: Net, data: Data, tmp_path: Path) -> None:
    label(net, data, tmp_path)
    card = json.loads((tmp_path / "labels.json").read_text())
    assert card.keys() == {"teacher", "images", "classes", "size", "inference", "least", "top", "merge"}


def test_soft_labels_have_the_probabilities_of_the_best_classes(net: Net, data: Data, tmp_path: Path) -> None:
    """Written, read and cropped like the mask, with the class where its probability is; a real mask is certain."""
    hard, _ = label(net, data, tmp_path / "hard")
    rows, _ = pseudo_label(net, data.unlabelled, data, tmp_path / "soft", PLAIN, CPU, top=3)
    probs = probabilities(net.eval(), to_tensor(open_image(rows[2], 3, None, cache=False)), PLAIN)[0].double()
    mask = open_mask(rows[2], data.code, None, cache=False)
    soft = open_soft(rows[2], None)
    assert hard[2].mask is not None
    assert np.array_equal(mask, read_mask(hard[2].mask, MaskCode(3)))
    assert soft.shape == (5, *mask.shape)
    order = probs.argsort(0, descending=True).numpy()
    assert np.array_equal(np.concatenate([mask[None], soft[3:]]), order)
    assert np.abs(soft[:3] - 255 * np.take_along_axis(probs.numpy(), order, 0)).max() < 0.51
    assert np.array_equal(open_confidence(rows[2], None), soft[0])
    for cache in (False, True, True):  # resized, and kept
        small = open_soft(rows[2], (20, 24), cache)
        assert np.array_equal(small, np.stack([resize_mask(np.ascontiguousarray(plane), (20, 24)) for plane in soft]))
    rows[2].soft.write_bytes(rows[2].soft.read_bytes()[:100])
    with pytest.raises(InputError, match="remove the folder of labels, and they are made anew"):
        open_soft(rows[2], None)
    write_planes(rows[2].soft, soft[1:].transpose(1, 2, 0))

    both, phase = data.labelled + rows, Phase((32, 32), 12)
    config = data.config.model_copy(update={"scale": (0.5, 2.0)})
    timetable = Timetable((phase,), 12)
    items = [
        Steps({"labelled": Stream(both, (phase,), top=top)}, timetable, replace(data, config=config), 0)[0]
        for top in (1, 3)
    ]
    one, three = (item.batches["labelled"] for item in items if not isinstance(item, InputError))
    assert isinstance(one, Labelled)
    assert isinstance(three, Labelled)
    assert three.soft is not None
    assert one.soft is None
    assert torch.equal(one.mask, three.mask)
    assert torch.equal(one.image, three.image)
    real = three.row < 4
    there = three.valid[real][:, None].expand(-1, 5, -1, -1)
    certain = torch.tensor([255, 0, 0, 0, 0], dtype=torch.uint8).view(1, 5, 1, 1).expand(there.shape)
    assert torch.equal(three.soft[real][there], certain[there])
    pseudo = three.valid & ~real[:, None, None]
    ids = torch.cat([three.mask[:, None], three.soft[:, 3:]], 1).movedim(1, -1)[pseudo]
    assert torch.equal(ids.sort(1).values, torch.arange(3, dtype=torch.uint8).expand(len(ids), 3))


def test_soft_labels_are_made_again_where_one_file_is_missing(net: Net, data: Data, tmp_path: Path) -> None:
    rows, _ = pseudo_label(net, data.unlabelled, data, tmp_path, PLAIN, CPU, top=2)
    before = files(tmp_path)
    rows[3].soft.unlink()
    (tmp_path / "report.json").unlink()
    pseudo_label(net, data.unlabelled, data, tmp_path, PLAIN, CPU, top=2)
    after = files(tmp_path)
    assert before.pop("report.json")
    assert after.pop("report.json")
    assert before == after
