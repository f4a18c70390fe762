"""Synthetic landscapes with exact masks, for the demo and the tests: so varied that a few labels do not cover them.

What makes a class is its texture, its shape and its place as well as its colour. Every class has a continuum of
appearances (`COLOURS`, and the scale, contrast and kind of its texture), and these overlap: ground may be as pale as a
cloud and a pond as green as a meadow. A handful of labelled scenes shows a few points of each continuum, a few hundred
unlabelled ones show nearly all of it.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Self

import numpy as np
from PIL import Image

from semiseg.data.formats import write_mask
from semiseg.types import IGNORE, InputError

CLASSES = ("sky", "ground", "water", "building", "tree", "animal", "sign")
PALETTE = (
    (135, 190, 235),
    (160, 130, 80),
    (30, 90, 200),
    (150, 60, 60),
    (50, 140, 50),
    (240, 170, 40),
    (220, 40, 200),
)
SKY, GROUND, WATER, BUILDING, TREE, ANIMAL, SIGN = range(len(CLASSES))

COLOURS = {
    SKY: [(70, 130, 215), (150, 190, 230), (215, 220, 225), (150, 155, 165), (230, 170, 120), (150, 110, 150)],
    GROUND: [(85, 130, 55), (150, 150, 70), (200, 175, 110), (140, 100, 65), (120, 120, 115), (225, 228, 235)],
    WATER: [(30, 70, 140), (50, 130, 150), (75, 105, 80), (95, 110, 125)],
    BUILDING: [(160, 65, 55), (185, 110, 85), (215, 175, 130)],
    TREE: [(30, 70, 35), (70, 120, 45), (160, 155, 50)],
    ANIMAL: [(30, 25, 25), (75, 50, 40), (120, 75, 45)],
    SIGN: [(215, 30, 40), (240, 195, 30)],
}
"""Corners of each class's curve of colours, RGB in 0..255."""


def scene(seed: int, size: tuple[int, int] = (96, 128)) -> tuple[np.ndarray, np.ndarray]:
    """Draws the scene of a seed.

    Returns image (H, W, 3) uint8 and mask (H, W) uint8: the index in CLASSES, or IGNORE where an edge runs through a
    pixel. A pure function of its arguments; another processor or NumPy may round a value to its neighbour.
    """
    rng = np.random.default_rng(seed)
    canvas = _Canvas.blank(rng, size)
    horizon = _land(canvas)
    kinds = [_building] * rng.integers(0, 3) + [_tree] * rng.integers(0, 3) + [_animal] * rng.integers(0, 3)
    if rng.random() < 0.75:
        kinds.append(_sign)
    depths = np.sort(rng.random(len(kinds)) ** 1.5)
    for depth, kind in zip(depths, rng.permutation(np.array(kinds, dtype=object)), strict=True):
        foot = horizon + (0.98 - horizon) * depth
        kind(canvas, foot, 0.6 + 0.4 * depth)
    _light(canvas)
    return _camera(canvas), canvas.mask


def write(
    folder: Path,
    train: int = 300,
    labelled: int | None = None,
    val: int = 40,
    test: int = 100,
    seed: int = 0,
    size: tuple[int, int] = (96, 128),
) -> None:
    """Writes a data set in the "splits" layout: images/<split>/, masks/<split>/ and classes.json, which comes last.

    Only the first `labelled` training images get a mask (none given: all of them). A scene depends on seed, split and
    number alone, so a smaller set is the beginning of a larger one. Existing files of the same name are replaced.
    """
    if not 0 <= (labelled or 0) <= train:
        raise InputError(f"labelled={labelled}: give a number from 0 to train={train}.")
    for block, (split, count, masks) in enumerate(
        [("train", train, train if labelled is None else labelled), ("val", val, val), ("test", test, test)]
    ):
        for kind in ("images", "masks"):
            (folder / kind / split).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            image, mask = scene(1_000_000 * seed + 250_000 * block + index, size)
            name = f"scene-{index:05d}.png"
            Image.fromarray(image).save(folder / "images" / split / name, compress_level=1)
            if index < masks:
                write_mask(folder / "masks" / split / name, mask, PALETTE)
    classes = {"name": "scenes", "classes": CLASSES, "palette": PALETTE, "ignore_index": IGNORE}
    (folder / "classes.json").write_text(json.dumps(classes, indent=1))


@dataclass(frozen=True)
class _Canvas:
    """A picture in the making, or a window of one.

    Lengths are in heights of the whole picture, y downwards; colours are in 0..1.
    y (H, 1) and x (1, W) float32 are the middles of the pixels, image (H, W, 3) float32, mask (H, W) uint8.
    """

    rng: np.random.Generator
    px: float
    width: float
    y: np.ndarray
    x: np.ndarray
    image: np.ndarray
    mask: np.ndarray

    @classmethod
    def blank(cls, rng: np.random.Generator, size: tuple[int, int]) -> Self:
        height, width = size
        y = (np.arange(height, dtype=np.float32) + 0.5) / height
        x = (np.arange(width, dtype=np.float32) + 0.5) / height
        image, mask = np.zeros((height, width, 3), np.float32), np.zeros(size, np.uint8)
        return cls(rng, 1 / height, width / height, y[:, None], x[None, :], image, mask)

    def window(self, top: float, bottom: float, left: float, right: float) -> Self:
        """The part of the picture between these lines, to draw a small thing quickly."""
        rows = slice(max(0, int(top / self.px)), max(0, int(bottom / self.px) + 1))
        columns = slice(max(0, int(left / self.px)), max(0, int(right / self.px) + 1))
        part = self.image[rows, columns], self.mask[rows, columns]
        return type(self)(self.rng, self.px, self.width, self.y[rows], self.x[:, columns], *part)

    def noise(self, down: float, across: float) -> np.ndarray:
        """Smooth noise (H, W) of standard deviation about 0.5; `down` and `across` are the sizes of its grains."""
        rows = _weights(len(self.y), max(1, round(len(self.y) * self.px / down)))
        columns = _weights(self.x.size, max(1, round(self.x.size * self.px / across)))
        grid = self.rng.standard_normal((rows.shape[1], columns.shape[1]), dtype=np.float32)
        smooth: np.ndarray = rows @ grid @ columns.T
        return smooth

    def colour(self, label: int) -> np.ndarray:
        """A colour (3,) somewhere on the curve of a class."""
        corners = np.array(COLOURS[label], np.float32) / 255
        place = self.rng.random() * (len(corners) - 1)
        near, share = int(place), place % 1
        colour = corners[near] * (1 - share) + corners[near + 1] * share
        varied: np.ndarray = np.clip(colour + self.rng.normal(0, 0.04, 3), 0.02, 1).astype(np.float32)
        return varied

    def paint(self, label: int, distance: np.ndarray, colour: np.ndarray, soft: float = 1) -> None:
        """Covers what has a negative distance to an outline; the edge is `soft` px wide. colour (H, W, 3) or (3,)."""
        cover = np.clip(0.5 - distance / (soft * self.px), 0, 1)
        self.image[:] += cover[..., None] * (colour - self.image)
        self.mask[(cover > 0.25) & (self.mask != label)] = IGNORE
        self.mask[cover > 0.75] = label

    def shade(self, distance: np.ndarray, factor: float, soft: float) -> None:
        """Darkens what has a negative distance to an outline and leaves the mask."""
        cover = np.clip(0.5 - distance / soft, 0, 1)
        self.image[:] *= (1 - (1 - factor) * cover)[..., None]


@lru_cache(maxsize=1024)
def _weights(length: int, cells: int) -> np.ndarray:
    """(length, cells + 2) weights that interpolate smoothly between random values at the corners of `cells` cells."""
    place = (np.arange(length, dtype=np.float32) + 0.5) / length * cells
    near = place.astype(int)
    share = place - near
    share = share * share * (3 - 2 * share)
    weights = np.zeros((length, cells + 2), np.float32)
    weights[np.arange(length), near] = 1 - share
    weights[np.arange(length), near + 1] = share
    return weights


def _ellipse(canvas: _Canvas, y: float, x: float, down: float, across: float) -> np.ndarray:
    return (np.sqrt(((canvas.y - y) / down) ** 2 + ((canvas.x - x) / across) ** 2) - 1) * min(down, across)


def _box(canvas: _Canvas, top: float, bottom: float, left: float, right: float) -> np.ndarray:
    return np.maximum(
        np.maximum(top - canvas.y, canvas.y - bottom),
        np.maximum(left - canvas.x, canvas.x - right),
    )


def _lit(colour: np.ndarray, field: np.ndarray) -> np.ndarray:
    """A colour (3,) times 1 + field (H, W)."""
    lit: np.ndarray = colour * (1 + field)[..., None]
    return lit


def _land(canvas: _Canvas) -> float:
    """Sky, ground and often water; returns the height of the horizon."""
    rng = canvas.rng
    horizon = rng.uniform(0.3, 0.6)
    ridge = horizon + rng.uniform(0, 0.06) * canvas.noise(1, 0.4)[:1]
    clouds = canvas.noise(0.15, 0.4) + 0.5 * canvas.noise(0.06, 0.15)
    fade = np.clip(canvas.y / horizon, 0, 1)[..., None]
    low, high = canvas.colour(SKY), canvas.colour(SKY)
    sky = (fade * low + (1 - fade) * high) * (1 + rng.uniform(0, 0.25) * clouds)[..., None]
    canvas.image[:], canvas.mask[:] = sky, SKY
    near = np.clip((canvas.y - horizon) / (1 - horizon), 0, 1)
    grain = canvas.noise(0.02, 0.02) * (0.4 + near) + rng.uniform(0, 0.8) * canvas.noise(0.1, 0.25)
    canvas.paint(GROUND, ridge - canvas.y, _lit(canvas.colour(GROUND), rng.uniform(0.1, 0.3) * grain))
    if rng.random() < 0.55:
        _water(canvas, horizon)
    return horizon


def _water(canvas: _Canvas, horizon: float) -> None:
    rng = canvas.rng
    y = rng.uniform(horizon + 0.08, 0.95)
    down = rng.uniform(0.2, 0.45) * (y - horizon + 0.2)
    shore = _ellipse(canvas, y, rng.uniform(0, canvas.width), down, rng.uniform(0.3, 1.2))
    shore = np.maximum(shore + 0.02 * canvas.noise(0.1, 0.15), horizon + 0.02 - canvas.y)
    streaks = canvas.noise(0.025, 0.2) + 0.6 * canvas.noise(0.05, 0.5)
    glints = 0.5 * np.clip(canvas.noise(0.015, 0.08) - rng.uniform(0.3, 1.2), 0, 1)
    canvas.paint(WATER, shore, _lit(canvas.colour(WATER), rng.uniform(0.1, 0.3) * streaks + glints))


def _building(canvas: _Canvas, foot: float, scale: float) -> None:
    rng = canvas.rng
    high, wide = rng.uniform(0.4, 0.85) * scale, rng.uniform(0.4, 0.75) * scale
    left = rng.uniform(-0.1, canvas.width - 0.1)
    slope = high * rng.choice([0, 1]) * rng.uniform(0.2, 0.5)
    canvas = canvas.window(foot - high - slope - 0.02, foot + 0.02, left - 0.02, left + wide + 0.02)
    pitch = rng.uniform(0.09, 0.16, 2) * (0.5 + scale / 2)
    v, u = (canvas.y - foot) / pitch[0], (canvas.x - left) / pitch[1]
    kind = rng.integers(3)
    if kind == 0:  # windows
        holes = ((v % 1) < rng.uniform(0.4, 0.7)) & ((u % 1) < rng.uniform(0.35, 0.7))
        field = holes * rng.uniform(0.25, 0.6) * rng.choice([-1, 1])
    elif kind == 1:  # courses of blocks
        v = v * 1.5
        joints = ((v % 1) < 0.3) | (((u + 0.5 * (np.floor(v) % 2)) % 1) < 0.2)
        field = joints * rng.uniform(0.2, 0.5) * rng.choice([-1, 1])
    else:  # planks
        field = 0.5 * rng.uniform(0.3, 0.7) * np.sign(np.sin((u if rng.random() < 0.5 else v) * 9))
    field = field + 0.05 * canvas.noise(0.02, 0.02)
    walls = _box(canvas, foot - high, foot, left, left + wide)
    if slope:
        middle = np.abs(canvas.x - left - wide / 2) / (wide / 2)
        roof = np.maximum(foot - high - slope * (1 - middle) - canvas.y, canvas.y - (foot - 0.95 * high))
        canvas.paint(BUILDING, roof, canvas.colour(BUILDING))
    canvas.paint(BUILDING, walls, _lit(canvas.colour(BUILDING), field))


def _tree(canvas: _Canvas, foot: float, scale: float) -> None:
    rng = canvas.rng
    x, radius = rng.uniform(0, canvas.width), rng.uniform(0.2, 0.36) * scale
    stem, tall = rng.uniform(0.3, 1.5) * radius, rng.uniform(0.8, 1.4)
    canvas = canvas.window(
        foot - stem - 2.6 * tall * radius, foot + 0.3 * radius + 0.02, x - 1.6 * radius, x + 1.6 * radius
    )
    canvas.shade(_ellipse(canvas, foot, x, 0.25 * radius, 1.2 * radius), 0.55, 0.04)
    trunk = _box(canvas, foot - stem - radius, foot, x - 0.12 * radius, x + 0.12 * radius)
    canvas.paint(TREE, trunk, canvas.colour(TREE) * 0.5)
    crown = np.full(canvas.mask.shape, np.inf, np.float32)
    for dy, dx in rng.uniform(-0.6, 0.6, (4, 2)):
        y = foot - stem - (tall + dy * tall) * radius
        crown = np.minimum(crown, _ellipse(canvas, y, x + dx * radius, 0.8 * tall * radius, 0.8 * radius))
    clumps = np.tanh(2 * canvas.noise(0.05 * scale + 0.01, 0.05 * scale + 0.01)) + 0.5 * canvas.noise(0.02, 0.02)
    side = (canvas.x - x) / radius * rng.uniform(-0.25, 0.25)
    ragged = crown + 0.015 * clumps
    canvas.paint(TREE, ragged, _lit(canvas.colour(TREE), rng.uniform(0.2, 0.45) * clumps + side), soft=1.5)


def _animal(canvas: _Canvas, foot: float, scale: float) -> None:
    rng = canvas.rng
    long, x = rng.uniform(0.2, 0.34) * scale, rng.uniform(0.05, canvas.width - 0.05)
    high, leg = long * rng.uniform(0.5, 0.7), long * rng.uniform(0.4, 0.8)
    facing = rng.choice([-1, 1])
    canvas = canvas.window(foot - leg - 2.5 * high, foot + 0.3 * long, x - 1.6 * long, x + 1.6 * long)
    canvas.shade(_ellipse(canvas, foot, x, 0.2 * long, 1.1 * long), 0.5, 0.03)
    body = _ellipse(canvas, foot - leg - 0.7 * high, x, high, long)
    head = _ellipse(
        canvas, foot - leg - high * rng.uniform(0.9, 1.9), x + facing * long * 1.05, 0.45 * high, 0.42 * long
    )
    outline = np.minimum(body, head)
    for place in (-0.7, -0.45, 0.45, 0.7):
        post = _box(canvas, foot - leg - 0.5 * high, foot, x + (place - 0.1) * long, x + (place + 0.1) * long)
        outline = np.minimum(outline, post)
    patches = (canvas.noise(0.5 * high, 0.6 * long) > rng.uniform(-0.3, 1))[..., None]
    coat = np.where(patches, canvas.colour(ANIMAL), canvas.colour(ANIMAL))
    belly = 1 - 0.3 * np.clip((canvas.y - foot + leg + 0.7 * high) / high, -1, 1)
    canvas.paint(ANIMAL, outline, coat * belly[..., None])


def _sign(canvas: _Canvas, foot: float, scale: float) -> None:
    rng = canvas.rng
    radius, x = rng.uniform(0.18, 0.28) * scale, rng.uniform(0.1, canvas.width - 0.1)
    y = foot - rng.uniform(1.8, 3.5) * radius
    canvas = canvas.window(y - 1.5 * radius, foot + 0.02, x - 1.5 * radius, x + 1.5 * radius)
    post = _box(canvas, y, foot, x - 0.12 * radius - 0.005, x + 0.12 * radius + 0.005)
    canvas.paint(SIGN, post, np.float32(rng.uniform(0.25, 0.7)) * np.ones(3, np.float32))
    dy, dx = canvas.y - y, np.abs(canvas.x - x)
    plate = [
        np.hypot(dy, dx) - radius,
        np.maximum(np.abs(dy), dx) - 0.9 * radius,
        (np.abs(dy) + dx) - 1.3 * radius,
        np.maximum(dy - 0.6 * radius, 0.87 * dx - 0.5 * dy - 0.6 * radius),
    ][rng.integers(4)]
    rim, field = canvas.colour(SIGN), canvas.colour(SIGN)
    canvas.paint(SIGN, plate, rim)
    canvas.paint(SIGN, plate + 0.3 * radius, field)
    canvas.paint(SIGN, np.maximum(np.abs(dy) - 0.15 * radius, dx - 0.4 * radius), rim)


def _light(canvas: _Canvas) -> None:
    """A gradient, cast shadows, paler or stronger colours, haze, a colour cast and the exposure."""
    rng = canvas.rng
    slope = rng.uniform(-0.4, 0.4, 2)
    ramp = 1 + slope[0] * (canvas.y - 0.5) + slope[1] * (canvas.x / canvas.width - 0.5)
    shadow = 1 - rng.uniform(0, 0.35) * np.clip(4 * canvas.noise(0.4, 0.5) - rng.uniform(0, 4), 0, 1)
    cast = rng.uniform(0.7, 1.1) * rng.normal(1, 0.05, 3)
    strength, haze, air = (np.float32(rng.uniform(*span)) for span in ((0.7, 1.15), (0, 0.2), (0.5, 0.9)))
    lit = canvas.image * (ramp * shadow)[..., None]
    grey = lit.mean(2, keepdims=True)
    clear = grey + strength * (lit - grey)
    canvas.image[:] = ((1 - haze) * clear + haze * air) * cast.astype(np.float32)


def _camera(canvas: _Canvas) -> np.ndarray:
    """Blur, tone curve, noise and rounding -> (H, W, 3) uint8."""
    rng = canvas.rng
    side = rng.uniform(0, 0.2)
    image = np.pad(canvas.image, ((1, 1), (1, 1), (0, 0)), mode="edge")
    image = (1 - 2 * side) * image[1:-1] + side * (image[:-2] + image[2:])
    image = (1 - 2 * side) * image[:, 1:-1] + side * (image[:, :-2] + image[:, 2:])
    image = np.clip(image, 0, 1) ** np.float32(rng.uniform(0.75, 1.35))
    image += rng.uniform(0.005, 0.03) * rng.standard_normal(image.shape, dtype=np.float32)
    rounded: np.ndarray = np.round(255 * np.clip(image, 0, 1)).astype(np.uint8)
    return rounded
