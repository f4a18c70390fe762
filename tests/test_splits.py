"""What is found in a folder or a CSV, and how the pools are drawn from it."""

import json
import os
import pickle
from collections.abc import Callable, Sequence
from itertools import chain, pairwise
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from semiseg.data import splits
from semiseg.data.layouts import find_images
from semiseg.data.splits import (
    Data,
    DataConfig,
    assign,
    default_palette,
    load_data,
    looks_like_sequences,
    prefixes,
    read_classes,
)
from semiseg.types import IGNORE, InputError

REAL = os.environ.get("SEMISEG_DATA")
needs_data = pytest.mark.skipif(not REAL, reason="$SEMISEG_DATA is not set")

Tree = Callable[..., Path]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """Makes a data folder of tiny files and a classes.json. Keys are paths, values the one id of a mask or none."""

    def make(files: dict[str, int | None], classes: Any = ("a", "b", "c"), name: str = "data") -> Path:
        root = tmp_path / name
        for path, label in files.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((4, 4), label or 0, np.uint8)).save(root / path)
        root.mkdir(exist_ok=True)
        if classes is not None:
            (root / "classes.json").write_text(json.dumps({"classes": classes}))
        return root

    return make


def pairs(names: Sequence[str], split: str = "", label: Callable[[int], int] = lambda i: 0) -> dict[str, int | None]:
    inside = f"{split}/" if split else ""
    files: dict[str, int | None] = {f"images/{inside}{name}.jpg": None for name in names}
    return files | {f"masks/{inside}{name}.png": label(i) for i, name in enumerate(names)}


def images(names: Sequence[str], split: str = "") -> dict[str, int | None]:
    return {path: None for path in pairs(names, split) if path.startswith("images")}


def numbered(count: int, start: str = "x") -> list[str]:
    return [f"{start}{i:03d}" for i in range(count)]


def load(root: Path | str, base: Path | None = None, **options: Any) -> Data:
    return load_data(DataConfig(root=str(root), **options), base)


def stems(rows: Any) -> list[str]:
    return [Path(name).stem for name in rows.names.tolist()]


def fails(what: str, root: Path | str, **options: Any) -> None:
    with pytest.raises(InputError) as caught:
        load(root, **options)
    message = str(caught.value)
    assert what in message
    assert message.endswith(".")
    assert "\n" not in message


# ------------------------------------------------------------------------------------------------------------- folder


def test_folder_pairs_by_relative_stem(tree: Tree) -> None:
    files: dict[str, int | None] = {
        "images/s/one.JPG": None,
        "images/two.v2.png": None,
        "images/only.jpg": None,
        "masks/s/one.png": 1,
        "masks/two.v2.bmp": 2,
    }
    data = load(tree(files))
    assert data.labelled.image.tolist() == ["images/s/one.JPG", "images/two.v2.png"]
    assert data.labelled.mask.tolist() == ["masks/s/one.png", "masks/two.v2.bmp"]
    assert data.unlabelled.image.tolist() == ["images/only.jpg"]
    assert not data.unlabelled.masked.any()
    assert (data.name, data.classes) == ("data", ("a", "b", "c"))
    assert (len(data.val), len(data.test)) == (0, 0)
    assert any("data.split or data.folds" in note for note in data.notes)


def test_hidden_and_other_files_are_passed_over(tree: Tree) -> None:
    root = tree({**pairs(["a"]), "images/.hidden.jpg": None, "images/.cache/b.jpg": None})
    (root / "images/notes.txt").write_text("no image")
    data = load(root, unlabelled="all")
    assert stems(data.unlabelled) == ["a"]


def test_linked_folders_are_followed(tree: Tree, tmp_path: Path) -> None:
    root = tree(pairs(["a"]))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    Image.new("RGB", (4, 4)).save(elsewhere / "b.png")
    (root / "images/more").symlink_to(elsewhere, target_is_directory=True)
    assert load(root).unlabelled.image.tolist() == ["images/more/b.png"]


def test_masks_without_image_are_named(tree: Tree) -> None:
    root = tree({**pairs(["a", "b"]), "masks/c.png": 0})
    assert any("(c.png)" in note for note in load(root).notes)


def test_an_unlabelled_image_has_no_mask_even_if_there_is_one(tree: Tree) -> None:
    root = tree(pairs(numbered(10)))
    for unlabelled, count in (("rest", 8), ("all", 10), ("none", 0)):
        data = load(root, labelled=2, unlabelled=unlabelled)
        assert len(data.unlabelled) == count
        assert not data.unlabelled.masked.any()
        assert data.labelled.masked.all()


def test_rest_with_nothing_left_becomes_all_and_says_so(tree: Tree) -> None:
    data = load(tree(pairs(numbered(3))))
    assert stems(data.unlabelled) == stems(data.labelled) == numbered(3)
    assert any("Every training image is labelled" in note for note in data.notes)


def test_deleting_masks_that_are_not_labelled_changes_nothing(tree: Tree) -> None:
    root = tree({**pairs(numbered(12), "train"), **pairs(["v"], "val")})
    before = load(root, format="splits", labelled=4)
    for name in set(numbered(12)) - set(stems(before.labelled)):
        (root / f"masks/train/{name}.png").unlink()
    after = load(root, format="splits", labelled=4)
    assert stems(after.labelled) == stems(before.labelled)
    assert stems(after.unlabelled) == stems(before.unlabelled)


def test_data_survives_a_pickle(tree: Tree) -> None:
    data = load(tree(pairs(numbered(3))), labelled=2)
    again = pickle.loads(pickle.dumps(data))
    assert (again.family, again.code, again.config) == (data.family, data.code, data.config)
    assert again.labelled.image.tolist() == data.labelled.image.tolist()


# ------------------------------------------------------------------------------------------------------------- splits


def test_own_splits(tree: Tree) -> None:
    root = tree(
        {
            **pairs(["a", "b"], "train"),
            **images(["c"], "train"),
            **pairs(["v"], "val"),
            **pairs(["t"], "test"),
            **images(["t2"], "test"),
            **images(["u"], "unlabeled"),
            **images(["w"], "unlabelled"),
            **images(["z"], "extra"),
        }
    )
    for name in ("splits", "camvid"):
        data = load(root, format=name, labelled=1)
        left = {"a", "b"} - set(stems(data.labelled))
        assert stems(data.unlabelled) == [*sorted(left | {"c"}), "u", "w"]
        assert (stems(data.val), stems(data.test)) == (["v"], ["t"])
        assert data.family == "data official train/val/test, 1 of 2 labelled drawn with seed 0"
    assert any("images/test has images without a mask" in note and "t2" in note for note in data.notes)
    assert any("images/extra is not read" in note for note in data.notes)


def test_data_without_val_and_test_says_so(tree: Tree) -> None:
    data = load(tree(pairs(["a"], "train")), format="splits")
    assert data.family.startswith("data official train,")
    assert any("no score" in note for note in data.notes)


# ---------------------------------------------------------------------------------------------------------------- csv


def write_csv(root: Path, text: str) -> Path:
    path = root / "list.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_csv_with_splits(tree: Tree) -> None:
    root = tree({**pairs(numbered(5)), **images(["u"])})
    lines = [
        f"images/x{i:03d}.jpg,masks/x{i:03d}.png,{s}" for i, s in enumerate(("", "train", "val", "test", "unlabeled"))
    ]
    data = load(write_csv(root, "\n".join(["\ufeffimage, mask,split", *lines, "images/u.jpg,,train"])), format="csv")
    assert data.labelled.image.tolist() == ["images/x000.jpg", "images/x001.jpg"]
    assert data.unlabelled.image.tolist() == ["images/u.jpg", "images/x004.jpg"]
    assert not data.unlabelled.masked.any()
    assert (stems(data.val), stems(data.test)) == (["x002"], ["x003"])
    assert data.family == "list official train/val/test, all 2 labelled"


def test_csv_without_splits_can_be_divided(tree: Tree) -> None:
    root = tree(pairs(numbered(10)))
    path = write_csv(root, "mask,image\n" + "".join(f"masks/{n}.png,images/{n}.jpg\n" for n in numbered(10)))
    data = load(path, format="csv", folds=5, fold=2)
    assert (len(data.labelled), len(data.val), len(data.test)) == (8, 0, 2)


def test_csv_takes_absolute_paths(tree: Tree, tmp_path: Path) -> None:
    root = tree(pairs(["a"]))
    path = write_csv(tmp_path, f"image,mask\n{root / 'images/a.jpg'},{root / 'masks/a.png'}\n")
    data = load(path, format="csv", classes=("a", "b"))
    assert data.labelled[0].image == root / "images/a.jpg"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has the columns []"),
        ("picture,mask\n", "has the columns ['picture', 'mask']"),
        ("image,mask,note\n", "['image', 'mask', 'note']"),
        ("image,mask\nimages/nowhere.jpg,\n", "line 2, names images/nowhere.jpg, which is not in"),
        ("image,mask\nimages/a.jpg,masks/nowhere.png\n", "names masks/nowhere.png"),
        ("image,mask,split\nimages/a.jpg,masks/a.png,training\n", "has the split training"),
        ("image,mask,split\nimages/a.jpg,,val\n", "an image without a mask into val"),
        ("image,mask\n,masks/a.png\n", "line 2, names no image"),
        ("image\n", "no training image"),
        ("image\nimages/a.jpg\n", "no labelled image"),
    ],
)
def test_bad_csv(tree: Tree, text: str, message: str) -> None:
    fails(message, write_csv(tree(pairs(["a"])), text), format="csv")


def test_csv_that_is_no_text(tree: Tree) -> None:
    root = tree(pairs(["a"]))
    fails("UTF-8", root / "images/a.jpg", format="csv")
    fails("is not a file", root, format="csv")


# ------------------------------------------------------------------------------------------------------------- errors


def test_nothing_there(tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SEMISEG_DATA", raising=False)
    fails("is not there", tmp_path / "nowhere")
    fails("images is not a folder", tree({}))
    root = tree({}, name="empty")
    (root / "images").mkdir()
    fails("has no training image", root)
    (root / "images/train").mkdir()
    fails("has no training image", root, format="splits")


def test_nothing_labelled(tree: Tree) -> None:
    fails("has no labelled image: add masks below masks/", tree(images(["a"])))
    fails(
        "has no labelled image: add masks below masks/train/", tree(images(["a"], "train"), name="b"), format="splits"
    )


def test_images_of_other_data(tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tree({**pairs(["a", "b"], "train"), **images(["u"], "unlabelled"), **pairs(["v"], "val")})
    tree({"town/x.jpg": None, "town/deep/y.png": None}, classes=None, name="common/other")
    tree({"z.jpg": None}, classes=None, name="third")
    monkeypatch.setenv("SEMISEG_DATA", str(tmp_path / "common"))
    options: dict[str, Any] = {"format": "splits", "labelled": 1}
    alone, data = load(root, **options), load(root, extra="other", **options)
    assert stems(data.labelled) == stems(alone.labelled)
    assert stems(data.unlabelled) == [*stems(alone.unlabelled), "y", "x"]
    assert all(row.image.is_file() for row in data.unlabelled)
    assert data.config.extra == (str(tmp_path / "common/other"),)
    assert data.family == alone.family.replace("train/val", "train/val with 2 further images")
    assert data.notes == (f"The 2 images of {tmp_path / 'common/other'} are among the unlabelled ones (data.extra).",)

    both = load(root, extra=["other", str(tmp_path / "third")], labelled="all", format="splits")
    assert stems(both.unlabelled) == ["u", "y", "x", "z"]
    fails("data.extra nowhere is not there", root, extra="nowhere", **options)
    (tmp_path / "common/other/masks").mkdir()
    (tmp_path / "common/other/masks/notes.txt").touch()
    assert stems(load(root, extra="other", **options).unlabelled) == stems(data.unlabelled)
    (tmp_path / "common/other/masks/x.png").write_bytes((tmp_path / "third/z.jpg").read_bytes())
    fails(
        "other has masks in masks, and all its files would be taken: name those of images",
        root,
        extra="other",
        **options,
    )
    fails("share images: name folders of other data, each once", root, extra=["other", "other"], **options)
    fails("share images: name folders of other data, each once", root, extra=str(root), **options)
    fails("share images: name folders of other data, each once", root, extra=str(root.parent), **options)
    (tmp_path / "common/empty").mkdir()
    fails("empty is not a folder with images: name another one", root, extra="empty", **options)


def test_the_order_of_files(tmp_path: Path) -> None:
    """That of Python's strings without suffixes, whatever order the disk has: draws go by it."""
    names = [
        "a.jpg",
        "a-b.jpg",
        "a/b.jpg",
        "a.b.jpg",
        "Z.PNG",
        "ä.png",
        "ж日.png",
        "𝛼.png",
        "￮.png",
        "a b.png",
        "10.png",
    ]
    for name in [*names, ".hidden.png", ".git/x.png", "a/note.txt"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "link").symlink_to(tmp_path / "a", target_is_directory=True)
    found = find_images(tmp_path, [])
    assert found.image.tolist() == sorted([*names, "link/b.jpg"], key=lambda name: str(PurePath(name).with_suffix("")))
    (tmp_path / "a/b.PNG").touch()
    assert len(find_images(tmp_path, [])) == len(found) + 2, "no masks are looked for (the link leads there too)"


def test_two_images_of_one_stem(tree: Tree) -> None:
    fails(
        "has both a.jpg and a.png, whose masks would be the same: rename one",
        tree({**pairs(["a", "b"]), "images/a.png": None}),
    )


def test_wrong_format(tree: Tree) -> None:
    fails("set data.format: splits", tree(pairs(["a"], "train")))
    fails("set data.format: folder", tree(pairs(["a"]), name="flat"), format="splits")
    path = write_csv(tree({}, name="c"), "image\n")
    fails("set data.format: csv", path)


def test_names_that_do_not_fit(tree: Tree) -> None:
    fails("no mask named like an image (b.png, but a.jpg)", tree({"images/a.jpg": None, "masks/b.png": 0}))
    fails("both a.jpg and a.png", tree({"images/a.jpg": None, "images/a.png": None, "masks/a.png": 0}, name="two"))
    fails("is a JPEG", tree({"images/a.jpg": None, "masks/a.jpg": 0}, name="lossy"))


def test_more_labels_than_there_are(tree: Tree) -> None:
    fails(
        "asks for 4 images, but 3 training images have a mask",
        tree({**pairs(numbered(3)), **images(["u"])}),
        labelled=4,
    )


def test_data_with_own_splits_is_not_divided_again(tree: Tree) -> None:
    root = tree({**pairs(["a"], "train"), **pairs(["v"], "val")})
    fails("data.folds is set, but the data is divided into train/val", root, format="splits", folds=2)
    fails("data.split is set", root, format="splits", split=(0.5, 0.25, 0.25))


@pytest.mark.parametrize(
    "options",
    [
        {"split": (0.5, 0.2, 0.2)},
        {"split": (0.0, 0.5, 0.5)},
        {"split": (0.8, 0.2, 0.0), "folds": 2},
        {"folds": 3, "fold": 3},
        {"folds": 3, "labelled": 4},
        {"fold": 1},
        {"group": True},
        {"labelled": 0},
        {"extra": ("more",), "unlabelled": "none"},
        {"scale": (2.0, 0.5)},
        {"folds": 1},
        {"channels": 0},
        {"colour": True},
    ],
)
def test_options_that_contradict(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        DataConfig(root=".", **options)


# --------------------------------------------------------------------------------------------------------- where it is


def test_root_is_looked_for_beside_the_recipe_then_in_the_shared_folder(
    tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree(pairs(["recipe"]), name="beside/set")
    tree(pairs(["common"]), name="common/set")
    monkeypatch.setenv("SEMISEG_DATA", str(tmp_path / "common"))
    assert stems(load("set", tmp_path / "beside").labelled) == ["recipe"]
    assert stems(load("set", tmp_path / "nowhere").labelled) == ["common"]
    assert load("../common/set", tmp_path / "beside").labelled.root == str(tmp_path / "common/set")
    monkeypatch.chdir(tmp_path / "beside")
    assert stems(load("set").labelled) == ["recipe"]
    fails(f"{tmp_path}/beside/other and {tmp_path}/common/other", "other")


# ------------------------------------------------------------------------------------------------------------ classes


def classes_of(tmp_path: Path, content: Any, **options: Any) -> Any:
    (tmp_path / "classes.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return read_classes(DataConfig(root=".", **options), tmp_path)


def test_class_file(tmp_path: Path) -> None:
    names, palette, code = classes_of(tmp_path, {"classes": ["a", "b"], "further": {"keys": 1}})
    assert names == ("a", "b")
    assert palette == ((0, 0, 0), (128, 0, 0))
    assert (code.classes, code.colours, code.values) == (2, None, None)

    both = {"classes": [{"name": "a", "color": [1, 2, 3]}, {"name": "b", "color": [4, 5, 6], "id": 1}]}
    _, palette, code = classes_of(tmp_path, both | {"ignore_colors": [[0, 0, 0]]})
    assert palette == code.colours == ((1, 2, 3), (4, 5, 6))
    assert code.ignored == ((0, 0, 0),)

    listed = {"classes": ["a", "b"], "palette": [[1, 2, 3], [4, 5, 6]], "ignore_index": 255}
    assert classes_of(tmp_path, listed)[1:] == (palette, code.__class__(2, palette))
    assert classes_of(tmp_path, listed, classes=("x", "y", "z"))[0] == ("x", "y", "z")


def test_raw_values(tmp_path: Path) -> None:
    content = {"classes": ["a", "b"]}
    assert classes_of(tmp_path, content, values={0: 0, 255: 1})[2].values == ((0, 0), (255, 1))
    assert classes_of(tmp_path, content, ignore=(7,))[2].values == ((0, 0), (1, 1), (7, IGNORE), (255, IGNORE))
    assert classes_of(tmp_path, content | {"ignore_index": 2})[2].values == ((0, 0), (1, 1), (2, IGNORE))
    assert classes_of(tmp_path, content | {"ignore_index": -1})[2].values == ((0, 0), (1, 1))
    wanted = {"values": {1: 0, 2: 1}, "ignore": (3,)}
    assert classes_of(tmp_path, content | {"ignore_index": 0}, **wanted)[2].values == (
        (0, 255),
        (1, 0),
        (2, 1),
        (3, 255),
    )


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("{", {}, "correct it"),
        ({"names": []}, {}, "classes: Field required"),
        ({"classes": ["a", 3]}, {}, "classes.1"),
        ({"classes": ["a"]}, {}, "lists 1 classes"),
        ({"classes": ["a", "b", "a"]}, {}, "the class a more than once"),
        ({"classes": [str(i) for i in range(256)]}, {}, "lists 256 classes"),
        ({"classes": ["a", "b"], "palette": [[0, 0, 0]]}, {}, "a colour of its own"),
        ({"classes": ["a", "b"], "palette": [[0, 0, 0], [0, 0, 0]]}, {}, "a colour of its own"),
        ({"classes": ["a", "b"], "palette": [[0, 0, 0], [0, 0, 256]]}, {}, "palette.1.2"),
        ({"classes": ["a", "b"], "ignore_index": 1}, {}, "ignores 1, which is also the class b"),
        ({"classes": ["a", "b"]}, {"values": {0: 2}}, "data.values"),
    ],
)
def test_bad_class_file(tmp_path: Path, content: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=r"\.$") as caught:
        classes_of(tmp_path, content, **options)
    assert message in str(caught.value)


def test_no_classes(tree: Tree) -> None:
    root = tree(pairs(["a"]), classes=None)
    fails("classes.json is missing", root)
    assert load(root, classes=("a", "b")).classes == ("a", "b")


def test_default_palette_is_that_of_voc() -> None:
    assert default_palette(5) == ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128))
    assert default_palette(21)[20] == (0, 64, 128)
    assert default_palette(256)[255] == (224, 224, 192)
    assert len(set(default_palette(256))) == 256


# ------------------------------------------------------------------------------------------------------------ drawing


@pytest.mark.parametrize(("share", "count"), [("1/16", 23), ("1/8", 46), ("1/4", 92), ("1/2", 184), ("1/1", 367)])
def test_shares_are_rounded_half_up(tree: Tree, share: str, count: int) -> None:
    root = tree(pairs(numbered(367)))
    assert len(load(root, labelled=share).labelled) == count


@pytest.mark.parametrize("share", ["0.125", ".125", "1 / 8", "2/16", 0.125])
def test_ways_to_write_a_share(tree: Tree, share: str | float) -> None:
    assert len(load(tree(pairs(numbered(8))), labelled=share).labelled) == 1


@pytest.mark.parametrize("share", ["0/8", "1/0", "9/8", "0.0", "1.5"])
def test_no_shares(tree: Tree, share: str) -> None:
    fails(f"data.labelled is {share}", tree(pairs(numbered(8))), labelled=share)


def test_a_small_share_is_one_image(tree: Tree) -> None:
    assert len(load(tree(pairs(numbered(3))), labelled="1/100").labelled) == 1


@pytest.mark.parametrize("balanced", [False, True])
def test_a_smaller_draw_lies_in_a_larger_one(tree: Tree, balanced: bool) -> None:
    root = tree(pairs(numbered(20), label=lambda i: i % 3))
    drawn = [set(stems(load(root, labelled=n, balanced=balanced).labelled)) for n in range(1, 21)]
    assert all(len(small) == n and small < large for n, (small, large) in enumerate(pairwise(drawn), 1))


def test_the_seed_draws(tree: Tree) -> None:
    root = tree(pairs(numbered(20)))
    drawn = [stems(load(root, labelled=5, split_seed=seed).labelled) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    expected = np.sort(np.random.default_rng(1).permutation(20)[:5])
    assert drawn[2] == [numbered(20)[i] for i in expected]


def test_balanced_draws_the_rare_class(tree: Tree) -> None:
    root = tree(pairs(numbered(60), label=lambda i: {17: 2, 40: 1, 41: 1}[i] if i in (17, 40, 41) else 0))
    for seed in range(5):
        data = load(root, labelled=3, balanced=True, split_seed=seed)
        names = set(stems(data.labelled))
        assert "x017" in names
        assert names & {"x040", "x041"}
        assert "class-aware" in data.family


# ----------------------------------------------------------------------------------------------------------- id files


def with_ids(root: Path, lines: str, **options: Any) -> Data:
    (root / "labeled.txt").write_text(lines)
    return load(root, labelled="labeled.txt", **options)


@pytest.mark.parametrize(
    "lines",
    [
        "x003\nx001\n",
        "x003.jpg\n\n x001.jpg \n",
        "JPEGImages/x003.jpg SegmentationClass/x003.png\nJPEGImages/x001.jpg SegmentationClass/x001.png",
        "images/x003.jpg\nimages/x001.jpg\nx001",
    ],
)
def test_ways_to_write_an_id(tree: Tree, lines: str) -> None:
    data = with_ids(tree(pairs(numbered(5))), lines)
    assert stems(data.labelled) == ["x001", "x003"]
    assert stems(data.unlabelled) == ["x000", "x002", "x004"]
    assert "2 of 5 labelled listed in labeled.txt (sha256 " in data.family


def test_ids_in_folders_and_with_spaces(tree: Tree) -> None:
    root = tree(pairs(["a/001", "b/001", "b/002", "my photo 1"], "train"))
    data = with_ids(root, "leftImg8bit/train/b/002.png\na/001\nmy photo 1\n", format="splits")
    assert [name.removeprefix("images/train/") for name in data.labelled.names.tolist()] == [
        "a/001.jpg",
        "b/002.jpg",
        "my photo 1.jpg",
    ]
    with pytest.raises(InputError, match="names 001, as several training images are called"):
        with_ids(root, "001\n", format="splits")


def test_two_lists_are_two_families(tree: Tree) -> None:
    root = tree(pairs(numbered(5)))
    assert with_ids(root, "x001\n").family != with_ids(root, "x002\n").family
    assert with_ids(root, "x001\nx002\n").family == with_ids(root, "images/x002.jpg\nx001\n").family


def test_id_file_that_names_missing_images(tree: Tree) -> None:
    root = tree({**pairs(numbered(3)), **images(["u"])})
    with pytest.raises(InputError, match=r"\(u, y1, y2 and 2 more\): remove them"):
        with_ids(root, "x001\nu\ny1\ny2\ny3\ny4\n")
    with pytest.raises(InputError, match="names no image"):
        with_ids(root, "\n")
    fails("data.labelled other.txt is not there", root, labelled="other.txt")
    fails("cannot be read as UTF-8 text", root, labelled="images")


# ----------------------------------------------------------------------------------------------------------- dividing


def test_split_by_shares(tree: Tree) -> None:
    root = tree({**pairs(numbered(20)), **images(["u"])})
    data = load(root, split=(0.7, 0.1, 0.2), labelled=3)
    assert (len(data.labelled), len(data.unlabelled), len(data.val), len(data.test)) == (3, 12, 2, 4)
    pools = [set(stems(rows)) for rows in (data.labelled, data.unlabelled, data.val, data.test)]
    assert set.union(*pools) == {*numbered(20), "u"}
    assert sum(map(len, pools)) == 21
    assert data.family == "data split 0.7/0.1/0.2 drawn with seed 0, 3 of 14 labelled drawn with seed 0"
    other = load(root, split=(0.7, 0.1, 0.2), labelled=3, split_seed=1)
    assert stems(other.test) != stems(data.test)


def test_a_share_that_stays_empty(tree: Tree) -> None:
    fails("data.split leaves test empty for want of images", tree(pairs(numbered(5))), split=(0.8, 0.1, 0.1))


def test_folds_partition(tree: Tree) -> None:
    root = tree(pairs(numbered(11)))
    folds = [load(root, folds=3, fold=i) for i in range(3)]
    tests = [stems(data.test) for data in folds]
    assert sorted(chain(*tests)) == numbered(11)
    assert sorted(map(len, tests)) == [3, 4, 4]
    assert all(sorted(stems(d.test) + stems(d.labelled)) == numbered(11) and not len(d.val) for d in folds)
    assert folds[1].family == "data fold 1 of 3 drawn with seed 0, all 7 labelled"
    fails("data.folds is 12, but there are 11 images with a mask", root, folds=12)


def test_groups_stay_together(tree: Tree) -> None:
    names = [f"{drive}_{i:04d}" for drive, count in (("a", 9), ("b", 5), ("c", 4), ("d", 2)) for i in range(count)]
    root = tree({**pairs(names), **images([f"{drive}_9999" for drive in "abcde"])})
    for seed in range(4):
        data = load(root, split=(0.5, 0.25, 0.25), group=True, split_seed=seed)
        pools = [set(prefixes(stems(rows))) for rows in (data.labelled, data.val, data.test)]
        assert sum(map(len, pools)) == len(set.union(*pools)) == 4
        assert set(prefixes(stems(data.unlabelled))) == pools[0] | {"e"}
        assert any("held-out groups are not used" in note for note in data.notes)
        assert "by name prefix" in data.family
    fails("data.folds is 5, but there are 4 groups of names", root, folds=5, group=True)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=30), st.integers(2, 6), st.integers(0, 3))
def test_parts_come_close_to_their_shares(sizes: list[int], parts: int, seed: int) -> None:
    groups = np.repeat(np.arange(len(sizes)), sizes)
    part = assign(groups, [1 / parts] * parts, seed)
    counts = np.bincount(part, minlength=parts)
    assert len({(int(g), int(p)) for g, p in zip(groups, part, strict=True)}) == len(sizes)
    assert counts.max() - counts.min() <= max(sizes)
    assert len(sizes) < parts or counts.all()


def test_prefixes() -> None:
    names = [
        "0016E5_00450.jpg",
        "0001TP_008550",
        "Seq05VD_f00030.png",
        "a/b/00012.jpg",
        "0_024541",
        "plain",
        "071198d0",
    ]
    assert prefixes(names) == ("0016E5", "0001TP", "Seq05VD_f", "a/b", "0", "plain", "071198d")


def test_names_that_look_like_sequences() -> None:
    frames = [f"{drive}_{i:05d}.jpg" for drive in ("0001TP", "0006R0", "0016E5") for i in range(10)]
    assert looks_like_sequences(frames, 3)
    assert not looks_like_sequences(frames, 4)
    assert not looks_like_sequences([f"{i:05d}.jpg" for i in range(30)], 2)
    assert not looks_like_sequences([f"{i * 2654435761 % 2**32:08x}" for i in range(200)], 2)
    assert not looks_like_sequences([], 2)


# ---------------------------------------------------------------------------------------------------------- real data


@needs_data
@pytest.mark.parametrize(
    ("name", "counts"),
    [("camvid", (367, 0, 101, 233)), ("idd_lite", (1403, 404, 204, 0)), ("dsb2018", (465, 0, 66, 133))],
)
def test_real_sets(name: str, counts: tuple[int, int, int, int]) -> None:
    data = load(name, format="splits", unlabelled="rest" if counts[1] else "none")
    assert tuple(map(len, (data.labelled, data.unlabelled, data.val, data.test))) == counts
    assert len(data.palette) == len(data.classes) == data.code.classes
    assert data.notes == ()
    assert len(load(name, format="splits", labelled="1/8").labelled) == int(counts[0] / 8 + 0.5)


@needs_data
@pytest.mark.parametrize(
    ("lists", "options"),
    [("u2pl/pascal/92", {}), ("unimatch/pascal/732", {}), ("u2pl/cityscapes/186", {"format": "splits"})],
)
def test_real_id_lists(lists: str, options: dict[str, Any], tree: Tree) -> None:
    """The published lists are understood, whatever folders they name."""
    path = Path(REAL or "") / "splits" / lists / "labeled.txt"
    words = [line.split()[0] for line in path.read_text().splitlines()]
    inside = "train" if options else ""
    names = ["/".join(splits.stem(word).split("/")[-2 if options else -1 :]) for word in words]
    root = tree({**pairs(names, inside), **pairs(["other"], inside)})
    data = load(root, labelled=str(path), **options)
    assert len(data.labelled) == len(words)
    assert stems(data.unlabelled) == ["other"]
