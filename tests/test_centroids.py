"""Where classes are, and epochs in which each gets its share."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from semiseg import parallel, testing
from semiseg.data import centroids as centroids_module
from semiseg.data.centroids import Centroids, class_centroids, places
from semiseg.data.formats import MaskCode
from semiseg.data.loader import Steps
from semiseg.data.rows import Rows
from semiseg.data.sampling import Mixture, Part, Phase, Stream, Timetable, draws
from semiseg.data.splits import Data, load_data
from semiseg.data.transforms import geometry
from semiseg.types import IGNORE, InputError, Labelled


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEMISEG_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def data(tmp_path: Path) -> Data:
    return testing.Case("supervised", tmp_path).data()


def of_counts(counts: list[int], rows: int = 100) -> Centroids:
    """Class c has counts[c] places; row r, and (y, x) = (class, number)."""
    label = np.repeat(np.arange(len(counts)), counts).astype(np.int32)
    number = np.concatenate([np.zeros(0, int), *map(np.arange, counts)]).astype(np.int32)
    first = np.concatenate([[0], np.cumsum(counts)])
    return Centroids((number % rows).astype(np.int32), label, number, first)


def of_pool(centroids: Centroids | None, rows: int, share: float = 0.5) -> Mixture:
    """As many samples as rows."""
    return Mixture((Part(0, rows, rows, centroids, share),))


def test_a_place_a_class_and_tile_by_hand() -> None:
    mask = np.full((5, 7), IGNORE, dtype=np.uint8)
    mask[:2, :3] = 0  # tile (0, 0): rows 0-1, columns 0-2
    mask[4, 6] = 1  # tile (1, 1), which has 1x3 px
    found = places(mask, 2, (4, 4), least=1)
    assert found.tolist() == [[0, 0, 1], [1, 4, 6]]
    assert places(mask, 2, (4, 4), least=6).tolist() == [[0, 0, 1]]
    assert places(mask, 2, (4, 4), least=7).tolist() == []


def test_a_place_is_of_its_class() -> None:
    """Two pixels in a tile of 4x4 (methods.md, case 41): their middle is neither of them."""
    mask = np.ones((4, 4), dtype=np.uint8)
    mask[0, 0] = mask[0, 2] = 0
    found = {int(c): (y, x) for c, y, x in places(mask, 2, (4, 4), least=1)}
    assert found[0] in {(0, 0), (0, 2)}


@pytest.mark.parametrize("seed", range(20))
def test_places_like_a_slow_search(seed: int) -> None:
    rng = np.random.default_rng(seed)
    coarse = rng.choice([0, 1, 2, IGNORE], (5, 6))
    mask = ndimage.zoom(coarse, (7, 9), order=0).astype(np.uint8)[: rng.integers(20, 35), : rng.integers(20, 54)]
    tile, least = (int(rng.integers(5, 20)), int(rng.integers(5, 40))), int(rng.integers(1, 40))
    found = {(c, y // tile[0], x // tile[1]): (y, x) for c, y, x in places(mask, 3, tile, least).tolist()}
    expected = 0
    for top in range(0, mask.shape[0], tile[0]):
        for left in range(0, mask.shape[1], tile[1]):
            part = mask[top : top + tile[0], left : left + tile[1]]
            for c in range(3):
                y, x = np.nonzero(part == c)
                if len(y) < least:
                    continue
                expected += 1
                at = np.array(found[c, top // tile[0], left // tile[1]])
                assert mask[tuple(at)] == c
                middle_y, middle_x = y.mean() + top, x.mean() + left
                if mask[int(middle_y), int(middle_x)] != c:
                    row = min(sorted(set(y + top)), key=lambda i: abs(i - middle_y))
                    column = min(x[y + top == row] + left, key=lambda i: abs(i - middle_x))
                    assert tuple(at) == (row, column)
                else:
                    assert tuple(at) == (int(middle_y), int(middle_x))
    assert len(found) == expected


def test_an_image_smaller_than_a_tile_has_places() -> None:
    assert places(np.zeros((6, 6), dtype=np.uint8), 1, (10, 10), least=1).tolist() == [[0, 2, 2]]


def test_quota_by_hand() -> None:
    """100 rows, half of the crops, 19 classes: 2 a class (methods.md, case 40)."""
    row, at = of_pool(of_counts([5] * 19), 100).epoch(0, 1, 0)
    assert len(row) == len(at) == 100
    assert Counter(at[:, 0].tolist()) == {-1: 62, **dict.fromkeys(range(19), 2)}
    assert sorted(row[at[:, 0] < 0].tolist()) == sorted(set(row[at[:, 0] < 0].tolist())), "no row twice"


def test_an_empty_class_leaves_its_quota_to_the_others() -> None:
    row, at = of_pool(of_counts([5] * 9 + [0] + [5]), 100).epoch(0, 1, 0)
    assert Counter(at[:, 0].tolist()) == {-1: 50, **dict.fromkeys([*range(9), 10], 5)}
    assert len(row) == 100


def test_no_class_anywhere() -> None:
    row, at = of_pool(of_counts([0, 0]), 10).epoch(0, 1, 0)
    assert sorted(row.tolist()) == list(range(10))
    assert (at == -1).all()


def test_places_and_rows_take_turns() -> None:
    """Over many epochs every place of a class, and every row, comes as often as any other, give or take one."""
    centroids = of_counts([7, 3])
    place: Counter[tuple[int, int]] = Counter()
    row: Counter[int] = Counter()
    for number in range(21):
        rows, at = of_pool(centroids, 20).epoch(3, 1, number)
        place.update((int(y), int(x)) for y, x in at if y >= 0)
        row.update(int(r) for r, (y, _) in zip(rows, at, strict=True) if y < 0)
    assert {c: place[0, c] for c in range(7)} == dict.fromkeys(range(7), 15)
    assert {c: place[1, c] for c in range(3)} == dict.fromkeys(range(3), 35)
    assert max(row.values()) - min(row.values()) <= 1
    assert len(row) == 20


def test_epochs_differ_and_repeat() -> None:
    centroids = of_counts([9, 9])
    first = of_pool(centroids, 30).epoch(0, 1, 0)
    for other in ((1, 1, 0), (0, 2, 0), (0, 1, 1)):
        assert not np.array_equal(first[1], of_pool(centroids, 30).epoch(*other)[1])
    assert np.array_equal(first[1], of_pool(of_counts([9, 9]), 30).epoch(0, 1, 0)[1])


def test_a_draw_has_the_places_of_its_epoch() -> None:
    rows = Rows.of("", [f"{i}.png" for i in range(10)], [f"{i}.png" for i in range(10)])
    centroids = of_counts([4, 2], rows=10)
    stream = Stream(rows, (Phase((8, 8), 4),), mixture=of_pool(centroids, 10))
    drawn = [draws(stream, Timetable(stream.phases, 40), "labelled", 0, step) for step in range(10)]
    at = np.concatenate([d.centres for d in drawn])
    assert len(at) == 40
    for epoch in range(4):
        assert Counter(at[epoch * 10 : epoch * 10 + 10, 0].tolist()) == {-1: 6, 0: 2, 1: 2}
    whole = drawn[0]
    assert np.array_equal(whole.block(1, 2).centres, whole.centres[2:])


@pytest.mark.parametrize("scale", [(1.0, 1.0), (0.5, 2.0)])
def test_the_place_is_always_in_the_crop(scale: tuple[float, float]) -> None:
    """10,000 crops (methods.md, case 42): none misses it by a pixel."""
    reach = 0 if scale == (1, 1) else 1  # 3 px where the image is resized, for shrinking leaves out every second one
    rng = np.random.default_rng(0)
    image = torch.zeros(1, 40, 50, dtype=torch.uint8)
    missed = 0
    for number in range(5000):
        y, x = int(rng.integers(40)), int(rng.integers(50))
        near = torch.full((40, 50), 0, dtype=torch.uint8)
        near[max(0, y - reach) : y + reach + 1, max(0, x - reach) : x + reach + 1] = 1
        _, mask, _ = geometry(image, near, (16, 20), scale, True, np.random.default_rng(number), (y, x))
        missed += not (mask == 1).any()
    assert missed == 0


def test_crops_lie_all_around_the_place() -> None:
    image, mask = torch.zeros(1, 100, 100, dtype=torch.uint8), torch.zeros(100, 100, dtype=torch.uint8)
    mask[50, 50] = 1
    at = []
    for number in range(2000):
        _, crop, _ = geometry(image, mask, (10, 10), (1, 1), False, np.random.default_rng(number), (50, 50))
        at.append(tuple(np.argwhere(crop.numpy() == 1)[0]))
    assert {y for y, _ in at} == {x for _, x in at} == set(range(10))
    assert max(Counter(at).values()) < 60  # of 20 on average


def index(data: Data, **options: int) -> Centroids:
    return class_centroids(data.labelled, data, (16, 16), **({"least": 20} | options))


def test_the_index_of_a_pool(data: Data) -> None:
    found = index(data)
    assert found.counts.min() > 0
    assert found.first[-1] == len(found.row)
    for c in range(len(data.classes)):
        for i in range(found.first[c], found.first[c + 1]):
            mask = np.asarray(open_of(data, int(found.row[i])))
            assert mask[found.y[i], found.x[i]] == c


def open_of(data: Data, row: int) -> NDArray[np.uint8]:
    from semiseg.data.cache import open_mask

    return open_mask(data.labelled[row], data.code, data.config.size, cache=False)


def test_the_index_is_kept_until_a_mask_changes(data: Data, tmp_path: Path) -> None:
    before = index(data)
    (kept,) = (tmp_path / "cache" / "centroids").iterdir()
    stamp = kept.stat().st_mtime_ns
    again = index(data)
    assert np.array_equal(before.row, again.row)
    assert kept.stat().st_mtime_ns == stamp
    mask = data.labelled[0].mask
    assert mask is not None
    mask.write_bytes(mask.read_bytes() + b" ")
    index(data)
    assert len(list((tmp_path / "cache" / "centroids").iterdir())) == 2
    index(data, least=21)
    assert len(list((tmp_path / "cache" / "centroids").iterdir())) == 3


def test_workers_find_the_same(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = index(data)
    monkeypatch.setenv("SEMISEG_CACHE", str(tmp_path / "other"))
    other = index(data, workers=2)
    assert np.array_equal(one.row, other.row)
    assert np.array_equal(one.y, other.y)


def test_a_broken_mask_is_named(data: Data) -> None:
    mask = data.labelled[1].mask
    assert mask is not None
    mask.write_bytes(b"x")
    with pytest.raises(InputError, match=mask.name):
        index(data)
    mask.unlink()
    with pytest.raises(InputError, match=mask.name):
        index(data)


def test_batches_are_drawn_around_the_places(data: Data) -> None:
    """With every crop around a place, rare classes are in as many crops as others."""
    shown = {}
    for share in (0.0, 1.0):
        stream = Stream(data.labelled, (Phase((4, 4), 8),), mixture=Mixture((Part(0, 4, 12, index(data), share),)))
        steps = Steps({"labelled": stream}, Timetable(stream.phases, 400), data, seed=0)
        counts = np.zeros(len(data.classes))
        for step in range(50):
            item = steps[step]
            assert not isinstance(item, InputError)
            batch = item.batches["labelled"]
            assert isinstance(batch, Labelled)
            for mask in batch.mask:
                counts += np.isin(np.arange(len(data.classes)), mask.numpy())
        shown[share] = counts / 400
    assert shown[1.0][2] > 1.2 * shown[0.0][2]
    assert shown[1.0].min() > 1 / 3  # a third are drawn around each class


def test_resized_masks(tmp_path: Path) -> None:
    """Places are px at the size that training works on."""
    case = testing.Case("supervised", tmp_path)
    case.data()
    config = case.recipe().data.model_copy(update={"size": (20, 24)})
    found = class_centroids(load_data(config).labelled, load_data(config), (8, 8), least=4)
    assert found.y.max() < 20
    assert found.x.max() < 24


def test_parts_have_their_shares() -> None:
    """10 real rows, each once in two epochs, and 90 others of which 15 come in each: 1 to 3."""
    mixture = Mixture((Part(0, 10, 5), Part(10, 90, 15, of_counts([6, 0, 8], rows=90), 0.4)))
    assert mixture.items == 20
    real: Counter[int] = Counter()
    other: Counter[int] = Counter()
    around: Counter[int] = Counter()
    for number in range(12):
        rows, at = mixture.epoch(0, 1, number)
        assert len(rows) == len(at) == 20
        assert int((rows < 10).sum()) == 5
        assert (at[rows < 10] == -1).all()
        real.update(rows[rows < 10].tolist())
        other.update(rows[(rows >= 10) & (at[:, 0] < 0)].tolist())
        around.update(at[at[:, 0] >= 0, 0].tolist())
    assert real == dict.fromkeys(range(10), 6)
    assert len(other) == 90
    assert set(other.values()) <= {1, 2}
    assert around == {0: 36, 2: 36}


def test_an_epoch_of_a_mixture_is_not_as_long_as_the_pool() -> None:
    rows = Rows.of("", [f"{i}.png" for i in range(10)], [f"{i}.png" for i in range(10)])
    stream = Stream(rows, (Phase((8, 8), 4),), mixture=Mixture((Part(0, 2, 2), Part(2, 8, 4))))
    drawn = np.concatenate([draws(stream, Timetable(stream.phases, 24), "a", 0, step).rows for step in range(6)])
    for epoch in range(4):
        assert Counter((drawn[6 * epoch : 6 * epoch + 6] < 2).tolist()) == {True: 2, False: 4}


@pytest.mark.parametrize(("masks", "classes"), [(12, 11), (21, 11), (4, 3), (1, 2), (3, 19)])
def test_few_masks_take_turns_with_the_classes(masks: int, classes: int) -> None:
    """Half of the crops are around places also where that is less than one a class and epoch."""
    mixture = Mixture((Part(0, masks, masks, of_counts([5] * classes, rows=masks)),))
    around: Counter[int] = Counter()
    total, rows = 0, Counter[int]()
    for number in range(240):
        row, at = mixture.epoch(0, 1, number)
        assert len(row) == masks
        around.update(at[at[:, 0] >= 0, 0].tolist())
        rows.update(row[at[:, 0] < 0].tolist())
        total += masks
    assert abs(sum(around.values()) - total / 2) <= classes
    assert max(around.values()) - min(around.values()) <= 1
    assert len(around) == classes
    assert max(rows.values()) - min(rows.values()) <= 1


@pytest.mark.parametrize("damage", [b"", b"PK", b"other bytes", None])
def test_a_damaged_index_is_made_anew(data: Data, tmp_path: Path, damage: bytes | None) -> None:
    before = index(data)
    (kept,) = (tmp_path / "cache" / "centroids").iterdir()
    kept.write_bytes(kept.read_bytes()[:-40] if damage is None else damage)
    assert np.array_equal(index(data).row, before.row)
    assert np.array_equal(index(data).x, before.x)


def test_plain_masks_have_places_of_their_own(data: Data, tmp_path: Path) -> None:
    """The same files with another code are another index."""
    swapped = replace(data, code=MaskCode(3, values=((0, 1), (1, 0), (2, 2))))
    rows = data.labelled
    plain = rows.with_masks((row.mask or Path() for row in rows), data.code.plain())
    coded, ids = (class_centroids(r, swapped, (16, 16), 20) for r in (rows, plain))
    assert coded.counts.tolist() == ids.counts[[1, 0, 2]].tolist()


def test_one_process_finds_and_tells_the_others(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    """They do not even look for the file: a machine of their own has another cache."""
    told = list[Centroids | None]()
    monkeypatch.setattr(parallel, "first", lambda value: (told.append(value), told[0])[1])
    first = index(data)
    monkeypatch.setattr(parallel, "rank", lambda: 1)
    monkeypatch.setenv("SEMISEG_CACHE", "nowhere")
    monkeypatch.setattr(centroids_module, "_find", lambda *_: pytest.fail("it is told"))
    assert index(data) is first
    assert told == [first, None]


def test_how_many_samples_show_a_class() -> None:
    """By hand: 4 rows; class 0 in all of them, class 1 in row 3 only, class 2 in none."""
    row, label = [0, 1, 2, 3, 3], [0, 0, 0, 0, 1]
    first = np.array([0, 4, 5, 5])
    at = np.zeros(5, np.int32)
    part = Part(0, 4, 40, Centroids(np.array(row, np.int32), at, at, first), 0.5)
    assert label == np.repeat(range(3), np.diff(first)).tolist()
    alike, drawn = part.shown()
    assert alike.tolist() == [40, 10, 0]
    # Around places of 0, each row alike: a quarter shows 1. Around the place of 1: all.
    assert drawn.tolist() == [40, 20 / 40 * 10 + 10 * 0.25 + 10 * 1, 0]


@pytest.mark.parametrize("seed", range(5))
def test_how_many_samples_show_a_class_over_many_epochs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    found = of_counts(rng.integers(0, 9, 4).tolist(), rows=6)
    part = Part(0, 6, 11, found, 0.7)
    shows = np.zeros((6, 4))
    shows[found.row, np.repeat(np.arange(4), found.counts)] = 1
    rows = np.concatenate([Mixture((part,)).epoch(0, 1, number)[0] for number in range(400)])
    assert np.allclose(part.shown()[1], shows[rows].sum(0) / 400, atol=0.15)


@pytest.mark.parametrize(("real", "pseudo", "batch"), [(46, 138, 8), (46, 100, 8), (3, 50, 4), (7, 7, 5), (200, 9, 16)])
def test_an_even_mixture(real: int, pseudo: int, batch: int) -> None:
    """Every batch has the epoch's share, off by one at most; and an epoch the same samples as without."""
    parts = (Part(0, real, real), Part(real, pseudo, pseudo))
    even, mixed = Mixture(parts, even=True), Mixture(parts)
    orders = [even.epoch(3, 1, number)[0] for number in range(40)]
    for number, order in enumerate(orders):
        assert sorted(order) == sorted(mixed.epoch(3, 1, number)[0])
    kinds = np.concatenate(orders) < real
    kinds = kinds[: len(kinds) // batch * batch].reshape(-1, batch)
    wanted = batch * real / (real + pseudo)
    assert np.abs(kinds.sum(1) - wanted).max() <= 1
    assert not np.array_equal(orders[0], orders[1])
    firsts = Counter(int(order[order < real][0]) for order in orders)
    assert len(firsts) > min(real, 40) / 3  # which sample comes when is random


def test_places_are_where_pseudo_labels_are_sure(data: Data, tmp_path: Path) -> None:
    mask, sure = np.zeros((40, 48), np.uint8), np.full((40, 48), 127, np.uint8)
    mask[:, 24:] = 1
    sure[8:20, 24:] = 128
    Image.fromarray(mask).save(tmp_path / "mask.png")
    Image.fromarray(sure).save(tmp_path / "sure.png")
    rows = data.labelled[:1]
    pseudo = rows.with_masks([tmp_path / "mask.png"], data.code.plain(), [tmp_path / "sure.png"])
    found = class_centroids(pseudo, data, (40, 48), 8)
    assert found.counts.tolist() == [0, 1, 0]
    assert (int(found.y[0]), int(found.x[0])) == (13, 35)
    found = class_centroids(replace(pseudo, confidence=None), data, (40, 48), 8)
    assert found.counts.tolist() == [1, 1, 0]
