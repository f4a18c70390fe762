"""From image files to mask files at the images' own sizes: resumable, each file written at once."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.progress import track

from semiseg import parallel
from semiseg.data.cache import resize_image, target_size
from semiseg.data.formats import read_image, write_mask
from semiseg.data.splits import IMAGE_SUFFIXES
from semiseg.engine.evaluate import Network, ahead, probabilities, to_tensor
from semiseg.files import replacing
from semiseg.ops.resize import resize
from semiseg.types import InferenceConfig, InputError

Image8 = NDArray[np.uint8]


@dataclass(frozen=True)
class Prediction:
    """mask (H, W) uint8 class ids and confidence (H, W) float32 in 0..1, at the image's own size."""

    mask: Image8
    confidence: NDArray[np.float32]


@dataclass(frozen=True)
class Predictor:
    """A network with everything it needs to read an image as it was trained."""

    net: Network
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    channels: int
    size: int | tuple[int, int] | None
    inference: InferenceConfig
    device: torch.device

    def __call__(self, image: NDArray[np.generic]) -> Prediction:
        """Predicts one image (H, W, N) uint8 or uint16."""
        height, width = image.shape[:2]
        small = resize_image(image, target_size(self.size, (height, width)))
        probs = resize(probabilities(self.net, to_tensor(small).to(self.device), self.inference), (height, width))
        confidence, label = probs[0].max(0)
        return Prediction(label.to(torch.uint8).cpu().numpy(), confidence.float().cpu().numpy())


def find_images(paths: Iterable[Path]) -> list[tuple[Path, Path]]:
    """Every image among files and folders, with the name that its results get, relative and without suffix.

    Raises:
        InputError: a path is missing, or there is no image in any.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if path.is_dir():
            inside = sorted(
                p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")
            )
            found |= {p: p.relative_to(path).with_suffix("") for p in inside}
        elif path.exists():
            found[path] = Path(path.stem)
        else:
            raise InputError(f"{path} does not exist: name an image or a folder of images.")
    if not found:
        raise InputError(
            f"There is no image in {', '.join(map(str, paths))}: name files that end in "
            f"{', '.join(sorted(IMAGE_SUFFIXES))}, or a folder with some."
        )
    names: dict[Path, Path] = {}
    for image, name in found.items():
        if name in names:
            raise InputError(
                f"{image} and {names[name]} would both be written to {name}.png: predict them into two folders."
            )
        names[name] = image
    return list(found.items())


def predict_files(
    predictor: Predictor, paths: Sequence[Path], out: Path, confidence: bool = False, overlay: bool = False
) -> tuple[int, int, dict[str, str]]:
    """Writes `out/NAME.png` for every image, on request `out/confidence/NAME.png` (0..255) and `out/overlay/NAME.jpg`.

    A file whose results are all there is passed over, so that an interrupted call can be repeated. Several processes
    take a part of the files each.

    Returns:
        how many were predicted, how many were there before, and the files that could not be read with the reason.
    """
    todo, there = [], 0
    images = _without(find_images(paths), paths, out)
    sources = {source.resolve() for source, _ in images}
    for source, name in images:
        results = [out / name.with_name(name.name + ".png")]
        if confidence:
            results.append(out / "confidence" / name.with_name(name.name + ".png"))
        if overlay:
            results.append(out / "overlay" / name.with_name(name.name + ".jpg"))
        if results[0].resolve() in sources:
            raise InputError(
                f"{results[0]} would be the mask of {source}, but it is an image itself: choose another --out."
            )
        if all(path.exists() for path in results):
            there += 1
        else:
            todo.append((source, results))

    def read(job: tuple[Path, list[Path]]) -> NDArray[np.generic] | InputError:
        try:
            return read_image(job[0], predictor.channels)
        except InputError as error:
            return error

    parallel.wait()  # until all have seen the same files, before one writes any
    todo = todo[parallel.rank() :: parallel.world()]
    failed: dict[str, str] = {}
    read_images = track(ahead(read, todo), "predicting", len(todo), transient=True, disable=not sys.stdout.isatty())
    for (source, results), image in zip(todo, read_images, strict=True):
        if isinstance(image, InputError):
            failed[str(source)] = str(image)
            continue
        prediction = predictor(image)
        # The mask last: where it is, the others are.
        if overlay:
            _save(Image.fromarray(blend(image, prediction.mask, predictor.palette)), results[-1])
        if confidence:
            _save(Image.fromarray((prediction.confidence * 255).round().astype(np.uint8)), results[1])
        write_mask(results[0], prediction.mask, predictor.palette)
    parts = parallel.gather((len(todo) - len(failed), failed))
    return sum(done for done, _ in parts), there, {path: reason for _, part in parts for path, reason in part.items()}


def _without(images: list[tuple[Path, Path]], paths: Sequence[Path], out: Path) -> list[tuple[Path, Path]]:
    """The images without those of `out`, where it lies in a folder of images: they are results of an earlier call."""
    place = out.resolve()
    if not any(path.is_dir() and path.resolve() in place.parents for path in paths):
        return images
    return [(source, name) for source, name in images if place not in source.resolve().parents]


def blend(
    image: NDArray[np.generic], mask: Image8, palette: Sequence[tuple[int, int, int]], share: float = 0.5
) -> Image8:
    """The image (H, W, N) with its mask in colours over it, (H, W, 3); pixels without a class stay as they are."""
    grey = image.astype(np.float32) / (257 if image.dtype == np.uint16 else 1)
    rgb = grey[..., :3] if image.shape[2] >= 3 else np.repeat(grey[..., :1], 3, axis=2)
    colours = np.zeros((256, 3), dtype=np.float32)
    colours[: len(palette)] = palette
    labelled = (mask < len(palette))[..., None]
    mixed = np.where(labelled, (1 - share) * rgb + share * colours[mask], rgb)
    return mixed.round().clip(0, 255).astype(np.uint8)


def _save(image: Image.Image, path: Path) -> None:
    with replacing(path) as part:
        image.save(part, quality=92)
