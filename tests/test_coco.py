"""ADE20K, and COCO in its forms, as they lie on the disk: which images, and every pixel of the masks."""

import builtins
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from semiseg.data import coco as coco_module
from semiseg.data.cache import open_mask, open_pair
from semiseg.data.centroids import class_centroids
from semiseg.data.check import check, class_pixels, leaks
from semiseg.data.formats import mask_file, write_mask
from semiseg.data.layouts import CLASSES
from semiseg.data.rows import Row
from semiseg.data.splits import Data, DataConfig, default_palette, load_data
from semiseg.types import IGNORE, InputError

Mask = NDArray[np.uint8]
Maker = Callable[..., Path]
H, W = 12, 16


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SEMISEG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def save(path: Path, pixels: NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def put(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def load(root: Path | str, **options: Any) -> Data:
    return load_data(DataConfig(root=str(root), **options))


def mask_of(data: Data, row: Row) -> Mask:
    return open_mask(row, data.code, None, False)


def read_all(root: Path | str, **options: Any) -> None:
    data = load(root, **options)
    for row in (*data.labelled, *data.val):
        mask_of(data, row)


def fails(what: str, root: Path | str, **options: Any) -> None:
    """The sentence, of loading or of reading every mask."""
    with pytest.raises(InputError) as caught:
        read_all(root, **options)
    message = str(caught.value)
    assert what in message
    assert message.endswith(".")
    assert "\n" not in message


# -------------------------------------------------------------------------------------------------------------- ADE20K

ADE = {
    "training": ["ADE_train_00000001", "ADE_train_00000002", "ADE_train_00000003"],
    "validation": ["ADE_val_00000001"],
}


def ade_raw() -> Mask:
    """Every value of ADE20K's masks: 0 for what has no class, 1 to 150."""
    return (np.arange(H * W) % 151).astype(np.uint8).reshape(H, W)


@pytest.fixture
def ade(tmp_path: Path) -> Maker:
    def make(raw: Mask | None = None, inside: str = "ADEChallengeData2016") -> Path:
        noise = np.random.default_rng(0)
        for split, names in ADE.items():
            for name in names:
                save(
                    tmp_path / inside / f"images/{split}/{name}.jpg", noise.integers(0, 256, (H, W, 3), dtype=np.uint8)
                )
                save(tmp_path / inside / f"annotations/{split}/{name}.png", ade_raw() if raw is None else raw)
        return tmp_path / inside

    return make


def test_ade20k(ade: Maker) -> None:
    data = load(ade(), format="ade20k", labelled=1)
    assert (len(data.labelled), len(data.unlabelled), len(data.val), len(data.test)) == (1, 2, 1, 0)
    assert data.val.image.tolist() == ["images/validation/ADE_val_00000001.jpg"]
    assert data.family == "ADEChallengeData2016 official train/val, 1 of 3 labelled drawn with seed 0"
    assert len(data.classes) == 150
    named = {0: "wall", 1: "building", 12: "person", 89: "television", 130: "screen", 149: "flag"}
    assert {label: data.classes[label] for label in named} == named
    raw = ade_raw()
    np.testing.assert_array_equal(mask_of(data, data.val[0]), np.where(raw == 0, IGNORE, raw - 1))
    assert not check(data).problems


@pytest.mark.parametrize("root", ["ADEChallengeData2016", "."])
def test_where_ade20k_was_unpacked(ade: Maker, tmp_path: Path, root: str) -> None:
    ade()
    assert len(load(tmp_path / root, format="ade20k").labelled) == 3
    assert len(load(tmp_path / root, format="ade20k", labelled=_list(tmp_path)).labelled) == 2


def _list(folder: Path) -> str:
    """Of the form that UniMatch V2 publishes."""
    lines = [f"images/training/{name}.jpg annotations/training/{name}.png" for name in ADE["training"][:2]]
    (folder / "labeled.txt").write_text("\n".join(lines))
    return str(folder / "labeled.txt")


def test_ade20k_whose_masks_were_made_anew(ade: Maker) -> None:
    """As published for UniMatch V2: read as the original ones, each class would be its neighbour."""
    raw = ade_raw()
    root = ade(np.where(raw == 0, IGNORE, raw - 1).astype(np.uint8))
    problems = check(load(root, format="ade20k")).problems
    assert len(problems) == 1
    assert "have the value 255, which ADE20K's own have not" in problems[0]
    assert problems[0].endswith("set data.values: {0: 0, 1: 1, ..., 149: 149}.")
    data = load(root, format="ade20k", values={i: i for i in range(150)})
    np.testing.assert_array_equal(mask_of(data, data.val[0]), np.where(raw == 0, IGNORE, raw - 1))
    assert not check(data).problems


def test_wrong_ade20k(ade: Maker, tmp_path: Path) -> None:
    root = ade()
    for name in ("folder", "splits"):
        fails(
            "has images/training, but no folder masks: set data.format: ade20k in a recipe.",
            root,
            format=name,
        )
        fails(
            "but no folder images: set data.format: ade20k in a recipe.",
            tmp_path,
            format=name,
        )
    fails("cache has no folder images/training: let data.root name ADEChallengeData2016", _made(tmp_path / "cache"),
          format="ade20k")  # fmt: skip
    save(root / "annotations/training/ADE_train_00000001.png", np.full((H, W), 151, np.uint8))
    fails("has mask values 151 that data.values does not list", root, format="ade20k")
    for path in (root / "annotations/training").iterdir():
        path.unlink()
    fails("annotations/training has no mask NAME.png of a training image", root, format="ade20k")


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


# ---------------------------------------------------------------------------------------------------------------- COCO

IMAGES = {"train2017": {9: "000000000009", 25: "000000000025", 30: "000000000030"}, "val2017": {139: "000000000139"}}
THINGS = ((1, "person"), (17, "cat"), (67, "dining table"), (90, "toothbrush"))


def box(top: int, left: int, bottom: int, right: int) -> list[float]:
    """A polygon around whole pixels, bottom and right excluded."""
    return [float(n) for n in (left, top, right, top, right, bottom, left, bottom)]


def counts(drawn: NDArray[np.bool_]) -> list[int]:
    """COCO's runs of 0 and of 1, column by column."""
    flat = drawn.T.ravel()
    edges = np.flatnonzero(np.diff(flat.astype(np.int8), prepend=0)).tolist()
    return np.diff([0, *edges, flat.size]).tolist()


def area(*where: tuple[slice, slice]) -> NDArray[np.bool_]:
    drawn = np.zeros((H, W), bool)
    for place in where:
        drawn[place] = True
    return drawn


@pytest.fixture
def images(tmp_path: Path) -> Maker:
    """Makes the images alone: unpacked beside annotations, or `below` images."""

    def make(inside: str = "coco", below: str = "") -> Path:
        noise = np.random.default_rng(0)
        for split, names in IMAGES.items():
            for name in names.values():
                place = tmp_path / inside / below / split / f"{name}.jpg"
                place.parent.mkdir(parents=True, exist_ok=True)
                save(place, noise.integers(0, 256, (H, W, 3), dtype=np.uint8))
        return tmp_path / inside

    return make


def described(split: str, **more: Any) -> dict[str, Any]:
    known = IMAGES[split].items()
    listed = [{"id": i, "file_name": f"{name}.jpg", "height": H, "width": W, "license": 1} for i, name in known]
    return {"info": {}, "licenses": [], "images": listed[::-1]} | more


def categories(pairs: tuple[tuple[int, str], ...] = THINGS) -> list[dict[str, Any]]:
    return [{"id": i, "name": name, "supercategory": "x"} for i, name in pairs]


def instance(number: int, image: int, category: int, segmentation: object, crowd: int = 0) -> dict[str, Any]:
    base = {"id": number, "image_id": image, "category_id": category, "iscrowd": crowd, "bbox": [0, 0, 1, 1]}
    return base | {"segmentation": segmentation, "area": 1.0}


@pytest.fixture
def instances(images: Maker) -> Maker:
    """Two images of all forms of instances; 30 has none. A cat of two polygons lies on the table that comes later."""
    pytest.importorskip("pycocotools", reason="the coco extra is not installed")

    def make(inside: str = "coco", below: str = "", train: object = None, **more: Any) -> Path:
        from pycocotools.mask import encode

        root = images(inside, below)
        crowd = area(np.s_[0:4, 10:16])
        packed = encode(np.asfortranarray(area(np.s_[8:12, 12:16]).astype(np.uint8)))
        found = [
            instance(1, 9, 17, [box(2, 2, 5, 5), box(6, 2, 7, 5)]),
            instance(2, 9, 67, [box(1, 1, 10, 9)]),
            instance(3, 9, 1, {"size": [H, W], "counts": counts(crowd)}, crowd=1),
            instance(4, 9, 1, [box(0, 8, 3, 12)]),
            instance(5, 25, 90, {"size": [H, W], "counts": packed["counts"].decode()}),
        ]
        put(
            root / "annotations/instances_train2017.json",
            described("train2017", categories=categories()[::-1], annotations=found if train is None else train) | more,
        )
        val = [instance(6, 139, 1, [box(0, 0, 12, 8)])]
        content = described("val2017", categories=categories(), annotations=val)
        shared = {key: value for key, value in more.items() if key == "categories"}
        put(root / "annotations/instances_val2017.json", content | shared)
        return root

    return make


def drawn() -> Mask:
    """The mask of image 9."""
    mask = np.zeros((H, W), np.uint8)
    mask[0:4, 10:16] = IGNORE
    mask[1:10, 1:9] = 3
    mask[0:3, 8:12] = 1
    mask[2:5, 2:5] = mask[6:7, 2:5] = 2
    return mask


@pytest.mark.parametrize("below", ["", "images"])
def test_instances(instances: Maker, below: str) -> None:
    data = load(instances(below=below), format="coco")
    assert data.classes == ("background", "person", "cat", "dining table", "toothbrush")
    assert (len(data.labelled), len(data.val), len(data.test)) == (3, 1, 0)
    assert data.family == "coco official train/val, all 3 labelled"
    start = f"{below}/" if below else ""
    assert data.labelled.image.tolist() == [f"{start}train2017/{name}.jpg" for name in IMAGES["train2017"].values()]
    masks = [mask_of(data, row) for row in data.labelled]
    np.testing.assert_array_equal(masks[0], drawn())
    np.testing.assert_array_equal(masks[1], np.where(area(np.s_[8:12, 12:16]), 4, 0))
    np.testing.assert_array_equal(masks[2], np.zeros((H, W)))  # nothing but background is a label
    np.testing.assert_array_equal(mask_of(data, data.val[0]), np.where(area(np.s_[:, 0:8]), 1, 0))
    assert not check(data).problems


@pytest.mark.filterwarnings("ignore:__array__ implementation")
def test_masks_are_those_of_pycocotools(instances: Maker) -> None:
    """Polygons that end between pixels, where its rounding decides; as many as need several bytes to count."""
    from pycocotools.mask import decode, frPyObjects, merge

    rng, where = np.random.default_rng(1), [9, 25, 30]
    shapes = [[rng.uniform(0, W, 10).round(2).tolist() for _ in range(2)] for _ in range(300)]
    found = [instance(i, where[i % 3], 1, polygons) for i, polygons in enumerate(shapes)]
    data = load(instances(train=found), format="coco")
    for i, row in enumerate(data.labelled):
        every = merge([merge(frPyObjects(polygons, H, W)) for polygons in shapes[i::3]])
        np.testing.assert_array_equal(mask_of(data, row), decode(every))


@pytest.mark.filterwarnings("ignore:__array__ implementation")
def test_runs_are_unpacked_as_by_pycocotools() -> None:
    encoding = pytest.importorskip("pycocotools.mask", reason="the coco extra is not installed")
    for size, share in (((1, 1), 0.5), ((300, 400), 0.001), ((300, 400), 0.5), ((7, 900), 0.0), ((900, 7), 1.0)):
        drawn = (np.random.default_rng(2).random(size) < share).astype(np.uint8)
        packed = encoding.encode(np.asfortranarray(drawn))["counts"]
        runs = coco_module.unpacked(np.frombuffer(packed, np.uint8))
        np.testing.assert_array_equal(np.repeat(np.arange(len(runs)) % 2, runs), drawn.T.ravel())


def test_a_file_is_read_once(instances: Maker, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then columns serve, until the file changes or they are deleted: in every process, in the same order."""
    root, reads = instances(), []
    original = coco_module.read_json
    monkeypatch.setattr(coco_module, "read_json", lambda path, kind: reads.append(path.name) or original(path, kind))

    def masks(known: Mapping[str, Any] | None = None) -> list[Mask]:
        coco_module._annotations.cache_clear()  # as in another process
        data = load(root, format="coco")
        return [mask_of(data, row) for row in (*data.labelled, *data.val)]

    first = masks()
    assert sorted(reads) == ["instances_train2017.json", "instances_val2017.json"]
    np.testing.assert_equal(masks(), first)
    assert len(reads) == 2
    kept = sorted((cache / "coco").iterdir())
    assert len(kept) == 2
    kept[0].write_bytes(b"damaged")
    kept[1].unlink()
    np.testing.assert_equal(masks(), first)
    assert len(reads) == 4
    put(root / "annotations/instances_val2017.json", described("val2017", categories=categories(), annotations=[]))
    assert not masks()[-1].any()
    assert len(reads) == 5


class _Masks(Dataset[Mask]):
    def __init__(self, data: Data) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data.labelled)

    def __getitem__(self, i: int) -> Mask:
        return mask_of(self.data, self.data.labelled[i])


def test_workers_draw_the_same(instances: Maker) -> None:
    data = load(instances(), format="coco")
    loader = DataLoader(_Masks(data), batch_size=None, num_workers=1)
    np.testing.assert_equal([np.asarray(mask) for mask in loader], [mask_of(data, row) for row in data.labelled])


def test_all_that_opens_masks(instances: Maker) -> None:
    """Masks that are no files: sizes, resized copies, hashes, places, class counts, the draw by classes."""
    root = instances()
    data = load(root, format="coco", size=(6, 8), labelled=2, balanced=True)
    assert {str(name) for name in data.labelled.mask} == {f"annotations/instances_train2017.json#{i}" for i in (9, 25)}
    assert mask_file(data.labelled[0].mask or Path()) == root / "annotations/instances_train2017.json"
    once, again = (open_pair(data.labelled[0], 3, data.code, (6, 8), cache=True) for _ in range(2))
    np.testing.assert_array_equal(once[1], again[1])
    assert once[1].shape == (6, 8)
    assert leaks(data) == ()
    whole = [(mask_of(data, row) == label).sum() for label in range(5) for row in data.labelled]
    np.testing.assert_array_equal(class_pixels(data).numpy(), np.array(whole).reshape(5, 2).sum(1))
    places = class_centroids(data.labelled, data, (12, 16), least=1)
    assert (places.counts > 0).tolist() == [True] * 5
    moved = class_centroids(load(root, format="coco", size=None).labelled, load(root, format="coco"), (12, 16), least=1)
    assert moved.counts.tolist() != places.counts.tolist()


def test_no_mask_of_an_unlabelled_image_is_drawn(instances: Maker, tmp_path: Path) -> None:
    root = instances()
    save(tmp_path / "coco/unlabeled2017/000000000008.jpg", np.zeros((H, W, 3), np.uint8))
    data = load(root, format="coco", labelled=1, extra=str(tmp_path / "coco/unlabeled2017"))
    assert [Path(str(row.image)).parent.name for row in data.unlabelled] == ["train2017"] * 2 + ["unlabeled2017"]
    assert not data.unlabelled.masked.any()


def test_other_classes_of_instances(instances: Maker) -> None:
    """data.values are of COCO's categories."""
    values = {0: 0, 1: 1, 17: 255, 67: 0, 90: 0}
    data = load(instances(), format="coco", classes=("other", "person"), values=values)
    assert np.unique(mask_of(data, data.labelled[0])).tolist() == [0, 1, IGNORE]


def test_lists_of_coco(instances: Maker, tmp_path: Path) -> None:
    (tmp_path / "labeled.txt").write_text("train2017/000000000025.jpg masks/000000000025.png\n")
    data = load(instances(), format="coco", labelled=str(tmp_path / "labeled.txt"))
    assert data.labelled.image.tolist() == ["train2017/000000000025.jpg"]


@pytest.mark.parametrize("folders", [("masks", "masks"), ("masks/train2017", "masks/val2017")])
def test_masks_of_coco_as_files(images: Maker, folders: tuple[str, str]) -> None:
    """UniMatch's are all in one folder, with ids 0 to 80."""
    root = images()
    ids = (np.arange(H * W) % 81).astype(np.uint8).reshape(H, W)
    for folder, names in zip(folders, IMAGES.values(), strict=True):
        for name in names.values():
            save(root / folder / f"{name}.png", ids)
    data = load(root, format="coco")
    assert (len(data.labelled), len(data.val)) == (3, 1)
    assert not any("masks of" in note for note in data.notes)
    assert data.classes == CLASSES["coco"][0]
    assert [data.classes[i] for i in (0, 1, 80)] == ["background", "person", "toothbrush"]
    np.testing.assert_array_equal(mask_of(data, data.val[0]), ids)


def test_wrong_instances(instances: Maker) -> None:
    """Each in one sentence that names the file."""

    def wrong(what: str, **content: Any) -> None:
        fails(what, instances(**content), format="coco")

    form = "an annotation of 000000000009.jpg has neither polygons of three points or more nor runs of its size"
    for shape in (
        [],
        None,
        [[]],
        [[0, 0, 4, 4]],
        "runs",
        {"size": [H, W]},
        {"size": [W, H], "counts": [H * W]},
        {"size": [H, W], "counts": [3]},
        [["a"] * 6],
    ):
        wrong(form, train=[instance(1, 9, 1, shape)])
    wrong("has an annotation of the image 8, which it does not list", train=[instance(1, 8, 1, [box(0, 0, 4, 4)])])
    wrong("has an annotation of the category 2, which it does not list", train=[instance(1, 9, 2, [box(0, 0, 4, 4)])])
    wrong("instances_train2017.json: annotations.0.image_id: Field required", train=[{}])
    wrong("categories.0.id: Input should be less than 255", categories=[{"id": 255, "name": "x"}])
    wrong("has a category twice: correct it", categories=categories() * 2)
    wrong("lists the class person more than once", categories=[*categories(), {"id": 3, "name": "person"}])
    twice = [{"id": 9, "file_name": "a.jpg", "height": H, "width": W}] * 2
    wrong("has the image 9 twice", images=twice, train=[])
    root = instances()
    put(root / "annotations/instances_val2017.json",
        described("val2017", categories=categories(((1, "human"),)), annotations=[]))  # fmt: skip
    fails("the masks of train2017 and val2017 have other categories", root, format="coco")
    other = instances()
    data = load(other, format="coco")
    (other / "annotations/instances_train2017.json").unlink()
    with pytest.raises(InputError, match=r"instances_train2017\.json cannot be read \(No such file"):
        mask_of(data, data.labelled[0])
    save(instances() / "train2017/000000000009.jpg", np.zeros((H, W + 1, 3), np.uint8))
    problems = check(load(other, format="coco")).problems
    assert any("instances_train2017.json#9: is 16x12 px where its image" in problem for problem in problems)


def test_without_the_extra(instances: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is needed to read the file, and no more to read masks."""
    root, original = instances(), builtins.__import__

    def missing(name: str, *args: Any, **options: Any) -> Any:
        if name.startswith("pycocotools"):
            raise ImportError(name)
        return original(name, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", missing)
        fails("pip install 'semiseg[coco]'", root, format="coco")
    read_all(root, format="coco")
    monkeypatch.setattr(builtins, "__import__", missing)
    read_all(root, format="coco")


def test_images_and_annotations_that_do_not_meet(instances: Maker) -> None:
    root = instances()
    (root / "train2017/000000000025.jpg").unlink()
    save(root / "train2017/000000000099.jpg", np.zeros((H, W, 3), np.uint8))
    data = load(root, format="coco")
    assert data.unlabelled.image.tolist() == ["train2017/000000000099.jpg"]
    assert any("There are masks of 1 images that are not in train2017 (000000000025)" in note for note in data.notes)
    for name in IMAGES["train2017"].values():
        (root / f"train2017/{name}.jpg").unlink(missing_ok=True)
    fails("has no mask of an image in train2017: take both of one set.", root, format="coco")
    (root / "annotations/instances_val2017.json").unlink()
    (root / "train2017/000000000099.jpg").rename(root / "train2017/000000000009.jpg")
    data = load(root, format="coco")
    assert (len(data.labelled), len(data.val)) == (1, 0)
    assert any("val2017 has images without a mask" in note for note in data.notes)


# ------------------------------------------------------------------------------------------------------------ panoptic

PANOPTIC = ((1, "person"), (17, "cat"), (184, "tree-merged"), (200, "rug-merged"))
SEGMENTS = {
    (3226956, 1): np.s_[0:6, 0:8],
    (256, 200): np.s_[6:12, 0:8],
    (1, 17): np.s_[0:6, 8:12],
    (65536, 1): np.s_[6:9, 8:16],
}
"""Number and category, and where in the image; the rest has none."""


@pytest.fixture
def panoptic(images: Maker) -> Maker:
    """Makes PNGs of R + 256 G + 65536 B beside or `above` their files; image 30 has none. The last one is a crowd."""

    def make(inside: str = "coco", above: bool = False, segments: Any = None, listed: Any = None) -> Path:
        root = images(inside)
        number = np.zeros((H, W), np.uint32)
        for (value, _), where in (segments or SEGMENTS).items():
            number[where] = value
        png = np.stack([number & 255, number >> 8 & 255, number >> 16], 2).astype(np.uint8)
        for split, names in IMAGES.items():
            folder = root / ("" if above else "annotations") / f"panoptic_{split}"
            for name in names.values():
                save(folder / f"{name}.png", png)
            info = [
                {"id": value, "category_id": category, "iscrowd": int(value == 65536), "area": 1, "bbox": [0, 0, 1, 1]}
                for value, category in listed or (segments or SEGMENTS)
            ]
            entries = [
                {"image_id": i, "file_name": f"{name}.png", "segments_info": info}
                for i, name in names.items()
                if i != 30
            ]
            named = [entry | {"isthing": 1, "color": [1, 2, 3]} for entry in categories(PANOPTIC)]
            content = described(split, categories=named, annotations=entries[::-1])
            put(root / f"annotations/panoptic_{split}.json", content)
        return root

    return make


@pytest.mark.parametrize("above", [False, True])
def test_panoptic(panoptic: Maker, above: bool) -> None:
    data = load(panoptic(above=above), format="coco_panoptic")
    assert data.classes == ("person", "cat", "tree-merged", "rug-merged")
    assert (len(data.labelled), len(data.unlabelled), len(data.val)) == (2, 1, 1)
    expected = np.full((H, W), IGNORE, np.uint8)
    for (_, category), where in SEGMENTS.items():
        expected[where] = {1: 0, 17: 1, 200: 3}[category]
    for row in (*data.labelled, *data.val):
        np.testing.assert_array_equal(mask_of(data, row), expected)
    assert not check(data).problems


def test_wrong_panoptic(panoptic: Maker) -> None:
    root = panoptic(segments={(7, 1): np.s_[:, :4], (9, 1): np.s_[:, 4:]}, listed=[(7, 1)])
    fails(".png: has the segments 9 that", root, format="coco_panoptic")
    fails("has an annotation of the category 3,", panoptic(listed=[(7, 3)]), format="coco_panoptic")
    root = panoptic()
    data = load(root, format="coco_panoptic")
    (root / "annotations/panoptic_val2017/000000000139.png").unlink()
    with pytest.raises(InputError, match=r"000000000139\.png: there is no such file"):
        mask_of(data, data.val[0])
    fails("panoptic_val2017 has no PNG of segments: unpack panoptic_val2017.zip", root, format="coco_panoptic")
    (root / "annotations/panoptic_train2017/000000000025.png").unlink()
    save(root / "annotations/panoptic_val2017/000000000139.png", np.zeros((H, W, 3), np.uint8))
    data = load(root, format="coco_panoptic")
    assert data.unlabelled.image.tolist() == [f"train2017/{IMAGES['train2017'][i]}.jpg" for i in (25, 30)]
    assert (mask_of(data, data.val[0]) == IGNORE).all()


# --------------------------------------------------------------------------------------------------------------- stuff


def stuffed(root: Path, place: str, ids: Mask) -> Path:
    for split, names in IMAGES.items():
        for name in names.values():
            path = root / place.format(split) / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_mask(path, ids, default_palette(20))
    return root


@pytest.mark.parametrize("place", ["stuffthingmaps/{}", "annotations/{}"])
def test_stuff_and_things(images: Maker, place: str) -> None:
    """Raw ids are the categories less 1, with gaps where COCO never used one."""
    ids = np.full((H, W), IGNORE, np.uint8)
    ids.ravel()[:9] = [0, 10, 12, 81, 89, 91, 181, 94, IGNORE]
    data = load(stuffed(images(), place, ids), format="coco_stuff")
    assert len(data.classes) == 171
    found = mask_of(data, data.val[0])
    names = [data.classes[label] for label in found.ravel()[:8]]
    assert names == ["person", "fire hydrant", "stop sign", "refrigerator", "toothbrush", "banner", "wood", "bridge"]
    assert found.ravel()[:7].tolist() == [0, 10, 11, 72, 79, 80, 170]
    assert (found.ravel()[8:] == IGNORE).all()
    unused = stuffed(images("b"), place, np.full((H, W), 11, np.uint8))
    fails("has mask values 11 that data.values does not list", unused, format="coco_stuff")


@pytest.mark.parametrize("place", ["annotations/stuff_{}_pixelmaps", "stuff_{}_pixelmaps"])
def test_pixelmaps_of_stuff(images: Maker, place: str) -> None:
    ids = np.zeros((H, W), np.uint8)
    ids.ravel()[:4] = [92, 95, 182, 183]
    data = load(stuffed(images(), place, ids), format="coco_stuff")
    assert len(data.classes) == 92
    found = mask_of(data, data.labelled[0]).ravel()
    assert [data.classes[label] for label in found[:4]] == ["banner", "bridge", "wood", "other"]
    assert (found[4:] == IGNORE).all()


def test_coco_taken_for_something_else(images: Maker, tmp_path: Path) -> None:
    for name in ("folder", "splits"):
        fails(
            "has train2017, but no folder images: set data.format: coco in a recipe.",
            images(inside=name),
            format=name,
        )
        below = images(inside=f"{name}2", below="images")
        fails(
            "has images/train2017, but no folder masks: set data.format: coco in a recipe.",
            below,
            format=name,
        )
    fails("has no folder train2017: let data.root name COCO's folder", _made(tmp_path / "cache"), format="coco_stuff")
    root = images()
    fails("has no annotations/instances_train2017.json, or a folder masks: put", root, format="coco")
    fails("or set data.format to one of coco, coco_stuff.", root, format="coco_panoptic")
    fails("has no stuffthingmaps/train2017 or annotations/stuff_train2017_pixelmaps", root, format="coco_stuff")
