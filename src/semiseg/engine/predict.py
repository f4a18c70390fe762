"""From image files to mask files at the images' own sizes: resumable, each file written at once."""

import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel
from torch import Tensor

from semiseg import parallel
from semiseg.data.cache import resize_image, target_size
from semiseg.data.formats import read_image, write_mask, write_planes
from semiseg.data.packed import File
from semiseg.data.splits import IMAGE_SUFFIXES
from semiseg.engine.evaluate import Network, ahead, probabilities, to_tensor
from semiseg.files import read_json, replacing, write_json
from semiseg.ops.pseudo import Pair
from semiseg.ops.resize import resize
from semiseg.progress import tracked
from semiseg.types import IGNORE, Changed, InferenceConfig, InputError

Image8 = NDArray[np.uint8]


@dataclass(frozen=True)
class Prediction:
    """mask (H, W) uint8 class ids and confidence (H, W) float32 in 0..1, at the image's own size."""

    mask: Image8
    confidence: NDArray[np.float32]
    soft: Image8 | None = None
    """(H, W, 2k - 2), where the predictor keeps k classes a pixel: the probabilities of those behind the first, 255 for
    1, then their ids."""


@dataclass(frozen=True)
class Predictor:
    """A network with everything it needs to read an image as it was trained."""

    net: Network | Pair
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    channels: int
    size: int | tuple[int, int] | None
    inference: InferenceConfig
    device: torch.device
    top: int = 1
    """Classes a pixel that are kept; of a Pair one."""

    def __call__(self, image: NDArray[np.generic]) -> Prediction:
        """Predicts one image (H, W, N) uint8 or uint16."""
        height, width = image.shape[:2]
        small = to_tensor(resize_image(image, target_size(self.size, (height, width)))).to(self.device)

        def probs_of(net: Network) -> Tensor:
            return resize(probabilities(net, small, self.inference), (height, width))[0]

        if isinstance(self.net, Pair):
            label, confidence = self.net.merge(probs_of(self.net.first), probs_of(self.net.second))
            return Prediction(label.to(torch.uint8).cpu().numpy(), confidence.float().cpu().numpy())
        probs = probs_of(self.net)
        if self.top == 1:
            confidence, label = probs.max(0)
            return Prediction(label.to(torch.uint8).cpu().numpy(), confidence.float().cpu().numpy())
        values, labels = probs.topk(self.top, dim=0)
        ids = labels.to(torch.uint8)
        soft = torch.cat([(values[1:] * 255).round().to(torch.uint8), ids[1:]])
        return Prediction(ids[0].cpu().numpy(), values[0].float().cpu().numpy(), soft.movedim(0, 2).cpu().numpy())


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


class Origin(BaseModel, frozen=True):
    """Whose masks a folder holds, where they stand as predicted.json."""

    model: str
    """The path of the model, for the user."""
    digest: str
    """Of its weights and its card."""

    def claim(self, out: Path, there: int) -> None:
        """Notes that the folder's masks, of which `there` are wanted again, are this model's.

        Raises:
            InputError: they are another one's, or whose they are is not known.
        """
        file, whose = out / "predicted.json", "an unknown model"
        if file.exists():
            with suppress(InputError):  # damaged
                known = read_json(file, Origin)
                if known.digest == self.digest:
                    return
                whose = known.model
        elif not there:
            write_json(file, self.model_dump())
            return
        raise InputError(f"{out} holds masks of {whose}: choose another --out, or remove its masks and {file.name}.")


def predict_files(
    predictor: Predictor,
    paths: Sequence[Path],
    out: Path,
    confidence: bool = False,
    overlay: bool = False,
    origin: Origin | None = None,
) -> tuple[int, int, dict[str, str]]:
    """Writes `out/NAME.png` for every image, on request `out/confidence/NAME.png` (0..255) and `out/overlay/NAME.jpg`.

    A file whose results are all there is passed over, so that an interrupted call can be repeated; with an `origin`
    only in a folder of the same one. Several processes take a part of the files each.

    Returns:
        how many were predicted, how many were there before, and the files that could not be read with the reason.

    Raises:
        InputError: two images would have one mask, or a mask would replace an image, or `out` has masks of another
            model.
    """
    jobs = []
    images = _without(find_images(paths), paths, out)
    sources = {source.resolve() for source, _ in images}
    for source, name in images:
        png, jpg = (name.with_name(name.name + suffix) for suffix in (".png", ".jpg"))
        job = Job(
            source,
            out / png,
            out / "confidence" / png if confidence else None,
            out / "overlay" / jpg if overlay else None,
        )
        if job.mask.resolve() in sources:
            raise InputError(
                f"{job.mask} would be the mask of {source}, but it is an image itself: choose another --out."
            )
        jobs.append(job)
    there = sum(job.done() for job in jobs)
    if origin is not None:
        if parallel.rank() == 0:
            origin.claim(out, sum(job.mask.exists() for job in jobs))
        parallel.wait()  # no other process writes a mask before
    failed = run_jobs(predictor, jobs)
    return len(jobs) - there - len(failed), there, failed


@dataclass(frozen=True)
class Job:
    """An image, and the files that its results get: mask, and where wanted confidence (0..255), overlay, and `soft`,
    the planes of Prediction.soft."""

    source: File
    mask: Path
    confidence: Path | None = None
    overlay: Path | None = None
    soft: Path | None = None

    def done(self) -> bool:
        files = (self.mask, self.confidence, self.overlay, self.soft)
        return all(path.exists() for path in files if path is not None)


def run_jobs(
    predictor: Predictor, jobs: Sequence[Job], least: float = 0.0, title: str = "predicting"
) -> dict[str, str]:
    """Predicts what is not done, while other threads read what comes next and write what came before.

    Each of several processes takes a part. In the masks pixels of a lower confidence than `least` are IGNORE.

    Returns:
        of all processes, the images that could not be read, each with the reason.
    """

    def read(number: int) -> NDArray[np.generic] | InputError:
        try:
            return read_image(jobs[number].source, predictor.channels)
        except Changed:
            raise
        except InputError as error:
            return error

    def predicted() -> Iterator[tuple[Job, NDArray[np.generic], Prediction]]:
        shown = tracked(ahead(read, mine), title, len(mine))
        for number, image in zip(mine, shown, strict=True):
            job = jobs[number]
            if isinstance(image, InputError):
                failed[str(job.source)] = str(image)
            else:
                yield job, image, predictor(image)

    def write(done: tuple[Job, NDArray[np.generic], Prediction]) -> None:
        job, image, prediction = done
        # The mask last: where it is, the others are.
        if job.overlay is not None:
            _save(Image.fromarray(blend(image, prediction.mask, predictor.palette)), job.overlay)
        if job.soft is not None and prediction.soft is not None:
            write_planes(job.soft, prediction.soft)
        if job.confidence is not None:
            _save(Image.fromarray((prediction.confidence * 255).round().astype(np.uint8)), job.confidence)
        mask = np.where(prediction.confidence < least, np.uint8(IGNORE), prediction.mask) if least else prediction.mask
        write_mask(job.mask, mask, predictor.palette)

    mine = [n for n in range(parallel.rank(), len(jobs), parallel.world()) if not jobs[n].done()]
    failed: dict[str, str] = {}
    for _ in ahead(write, predicted()):
        pass
    return {path: reason for part in parallel.gather(failed) for path, reason in part.items()}


def _without(images: list[tuple[Path, Path]], paths: Sequence[Path], out: Path) -> list[tuple[Path, Path]]:
    """The images without those of `out`, where it lies in a folder of images: they are results of an earlier call."""
    place = out.resolve()
    if not any(path.is_dir() and path.resolve() in place.parents for path in paths):
        return images
    return [(source, name) for source, name in images if place not in source.resolve().parents]


def blend(
    image: NDArray[np.generic], mask: Image8, palette: Sequence[tuple[int, int, int]], share: float = 0.5
) -> Image8:
    """The image (H, W, N) with its mask in colours over it, (H, W, 3); what has no class or is black stays as it is."""
    grey = image.astype(np.float32) / (257 if image.dtype == np.uint16 else 1)
    rgb = grey[..., :3] if image.shape[2] >= 3 else np.repeat(grey[..., :1], 3, axis=2)
    colours = np.zeros((256, 3), dtype=np.float32)
    colours[: len(palette)] = palette
    labelled = colours[mask].any(-1, keepdims=True)
    mixed = np.where(labelled, (1 - share) * rgb + share * colours[mask], rgb)
    return mixed.round().clip(0, 255).astype(np.uint8)


def _save(image: Image.Image, path: Path) -> None:
    with replacing(path) as part:
        # Of PNGs. A map of confidence takes a fifth of the usual time for 5 % more bytes: the network needs the cores.
        image.save(part, quality=92, compress_level=1, compress_type=zlib.Z_RLE)
