"""Reading and writing weights: encoders in timm's names, and models in a folder of two files.

A model may start from another one, also with other classes: those of the same name keep their rows of the last layer.

No file of weights can run code: safetensors, and of torch's own format what holds tensors alone.
"""

import json
import re
import shutil
import warnings
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from semiseg.files import replacing, write_json
from semiseg.types import InputError, some

WEIGHTS, CARD = "model.safetensors", "model.json"
_BLOCK_NAMES = ("", "body.", "model.")


@dataclass(frozen=True)
class Report:
    """What became of a file of weights; names of tensors, without batch norm's counters of batches.

    loaded, total  how many of the encoder's tensors came from `source`
    missing        the encoder has them, the source has not: left random
    unexpected     the source has them, the encoder has not: as a rule a classifier
    mismatched     of another shape: left random
    adapted        input convolutions whose channels were summed or repeated, as timm does
    resampled      embeddings of a transformer's positions, from one size of image to another, as timm does
    parts          what the source could fill
    """

    source: str
    loaded: int
    total: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]
    adapted: tuple[str, ...]
    resampled: tuple[str, ...] = ()
    parts: str = "encoder"

    def lines(self) -> list[str]:
        """The report for people: one line, and one more for each kind of difference."""
        lines = [f"{self.source}: {self.loaded} of the {self.parts}'s {self.total} tensors loaded"]
        kinds = {
            "left random, not in the file": self.missing,
            f"in the file, not used by the {self.parts}": self.unexpected,
            "left random, of another shape": self.mismatched,
            "input channels adapted": self.adapted,
            "for another size of images, resampled": self.resampled,
        }
        return lines + [f"  {kind}: {some(names)}" for kind, names in kinds.items() if names]


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of torch's own format (.pth, .pt), on the CPU.

    Raises:
        InputError: there is no file, or it is none of these, or it holds more than tensors.
    """
    if path.suffix in (".pth", ".pt"):
        return _read_torch(path)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path} cannot be read as safetensors ({error}): name another file, or convert it."
        ) from error


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings(action="ignore"):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): name another file.") from error
    except Exception as error:  # a damaged file raises nearly any
        other = re.search(r"GLOBAL (\S+)", str(error))
        what = f"holds {other[1]}, but only tensors are opened" if other else "is damaged, or not in torch's format"
        raise InputError(f"{path} {what}: store the tensors alone, or name another file.") from error
    for key in ("state_dict", "model"):  # as training scripts wrap them
        found = found[key] if isinstance(found, dict) and isinstance(found.get(key), dict) else found
    if not isinstance(found, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in found.items()):
        raise InputError(f"{path} holds something else than tensors by name: name a file of a network's weights.")
    return found


def load_tensors(
    encoder: nn.Module, tensors: dict[str, Tensor], source: str, more: Mapping[str, Tensor] | None = None
) -> Report:
    """Loads tensors in timm's names into an encoder of smp, and into those of `more` by their own names.

    `source` names them in the report.

    Raises:
        InputError: none fits, or a transformer's patches are of another size.
    """
    from timm.models import adapt_input_conv

    own = {name: tensor for name, tensor in encoder.state_dict().items() if not name.endswith("num_batches_tracked")}
    own |= more or {}
    tensors = {name.removeprefix("module.").removeprefix("Scale."): tensor for name, tensor in tensors.items()}
    places = {name: place_of(name, own) for name in tensors if not name.endswith("num_batches_tracked")}
    loaded = set()
    mismatched: list[str] = []
    adapted: list[str] = []
    resampled: list[str] = []
    with torch.no_grad():
        for name, place in places.items():
            if place is None:
                continue
            tensor = tensors[name]
            if name == "patch_embed.proj.weight" and tensor.shape[2:] != own[place].shape[2:]:
                there, here = ("x".join(map(str, t.shape[2:])) for t in (tensor, own[place]))
                raise InputError(
                    f"network.weights: {source} has patches of {there} px, the encoder of {here}: "
                    "choose the network.encoder that they belong to, or change network.encoder_options.patch_size."
                )
            if tensor.shape != own[place].shape and _differs_in_channels(tensor, own[place]):
                tensor = adapt_input_conv(own[place].shape[1], tensor, base_chans=tensor.shape[1])
                adapted.append(f"{name} from {tensors[name].shape[1]} to {tensor.shape[1]}")
            if name == "pos_embed" and tensor.shape[1] != own[place].shape[1]:
                tensor = _resampled(tensor, encoder)
                resampled.append(f"{name} from {tensors[name].shape[1]} to {tensor.shape[1]} places")
            if tensor.shape == own[place].shape:
                own[place].copy_(tensor)
                loaded.add(place)
            else:
                mismatched.append(f"{name} {tuple(tensor.shape)} for {tuple(own[place].shape)}")
    if not loaded:
        raise InputError(
            f"{source}: none of its {len(tensors)} tensors ({some(tensors)}) fits the encoder; "
            "set network.encoder to the one that they belong to."
        )
    return Report(
        source=source,
        loaded=len(loaded),
        total=len(own),
        missing=tuple(_timm_name(name) for name in own if name not in loaded and name not in places.values()),
        unexpected=tuple(name for name, place in places.items() if place is None),
        mismatched=tuple(mismatched),
        adapted=tuple(adapted),
        resampled=tuple(resampled),
        parts="encoder and head" if more else "encoder",
    )


def load_network(
    net: nn.Module,
    tensors: Mapping[str, Tensor],
    source: str,
    theirs: Sequence[str],
    ours: Sequence[str],
    option: str = "network.weights",
) -> list[str]:
    """Loads a whole network of another run; where the classes differ, its last layer row by row.

    A class has the row of the class that has exactly its name there. Rows of other classes stay as they are.

    Args:
        net: in parts, its classifier `head`; or in one piece, if the classes are the same.
        tensors: of the other run's network, by the names of `net.state_dict()`.
        source: where they come from, for the report.
        theirs: names of the classes there, in the order of their ids.
        ours: names of the classes of `net`.
        option: by which the user named them.

    Returns:
        what became of them: lines for people.

    Raises:
        InputError: the tensors are those of another network, or there is no telling which are the last layer.
    """
    own = net.state_dict()
    theirs, ours = list(theirs), list(ours)
    # All that a head has is a row a class: one convolution, or several whose answers are added.
    last = {name for name in own if name.startswith("head.")} if theirs != ours else set()
    if theirs != ours and not (last and all(own[name].shape[:1] == (len(ours),) for name in last)):
        raise InputError(
            f"{option}: {source} has other classes, and nothing tells the last layer of a network of your own: "
            "take a network by name, or the same classes in the same order."
        )
    shapes = {name: (len(theirs), *t.shape[1:]) if name in last else tuple(t.shape) for name, t in own.items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes != found:
        wrong = [name for name in {**shapes, **found} if shapes.get(name) != found.get(name)]
        raise InputError(
            f"{option}: {source} holds another network ({some(wrong)} differ): "
            "name a run of this one, or change the options of network."
        )
    matched = [name for name in ours if name in theirs]
    here, there = (torch.tensor([names.index(name) for name in matched], dtype=torch.long) for names in (ours, theirs))
    with torch.no_grad():
        for name, tensor in own.items():
            if name in last:
                tensor.index_copy_(0, here, tensors[name][there])
            else:
                tensor.copy_(tensors[name])
    lines = [f"{source}: the whole network loaded"]
    kinds = {
        "classes with the same name": matched,
        "new classes, whose rows of the last layer are left random": [name for name in ours if name not in theirs],
        "classes of that run that are not used": [name for name in theirs if name not in ours],
    }
    if not matched:
        lines.append("  no class has the same name")
    return lines + [f"  {kind}: {some(names, 20)}" for kind, names in kinds.items() if names]


def _resampled(positions: Tensor, encoder: nn.Module) -> Tensor:
    """Embeddings (1, P, D) of a square grid of positions for the grid of the encoder's images."""
    from timm.layers.pos_embed import resample_abs_pos_embed

    model: Any = encoder.model
    before = 0 if getattr(model, "no_embed_class", False) else model.num_prefix_tokens
    grid = list(model.patch_embed.grid_size)
    resampled: Tensor = resample_abs_pos_embed(positions, grid, num_prefix_tokens=before)
    return resampled


def place_of(name: str, own: Container[str]) -> str | None:
    """Where timm's feature extractor keeps the tensor `name`: some join its first two parts, some wrap the network."""
    if name in own:
        return name
    for block in _BLOCK_NAMES:
        for candidate in (name, name.replace(".", "_", 1)):
            if f"model.{block}{candidate}" in own:
                return f"model.{block}{candidate}"
    return None


def _timm_name(place: str) -> str:
    return place.removeprefix("model.")


def _differs_in_channels(source: Tensor, target: Tensor) -> bool:
    """Whether the two differ in input channels only, and the source's are those of an RGB image."""
    outer = source.shape[:1] + source.shape[2:] == target.shape[:1] + target.shape[2:]
    return source.ndim == 4 and target.ndim == 4 and outer and source.shape[1] == 3


def save_model(folder: Path, state: dict[str, Tensor], card: dict[str, Any]) -> None:
    """Writes model.safetensors and model.json; a reader sees the old or the new file, never half of one.

    Raises:
        InputError: the disk is full, or the folder cannot be written.
    """
    # The format wants contiguous tensors that share no memory.
    plain = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in state.items()}
    with replacing(folder / WEIGHTS) as part:
        save_file(plain, part, metadata={"format": "pt"})
    write_json(folder / CARD, card)


def copy_model(source: Path, folder: Path) -> None:
    """Makes the model of the folder `source` that of `folder` too, as `save_model` would.

    Raises:
        InputError: there is none, the disk is full, or the folder cannot be written.
    """
    for name in (WEIGHTS, CARD):
        if not (source / name).is_file():
            raise InputError(
                f"{source / name} is missing: remove {source.parent / 'results.json'}, and the same `semiseg train` "
                "command makes it again."
            )
        with replacing(folder / name) as part:
            shutil.copyfile(source / name, part)


def model_folder(path: Path) -> Path:
    """The folder of a run's model, or `path` itself, which may be one.

    Raises:
        InputError: the run has none yet.
    """
    folder = path / "model" if (path / "model").is_dir() else path
    if folder == path and (path / "recipe.yaml").exists():
        raise InputError(f"{path} holds a run that is not finished: the same `semiseg train` command goes on with it.")
    return folder


def read_model(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights and the card that `save_model` wrote.

    Raises:
        InputError: a file is missing or damaged.
    """
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{folder} holds no {CARD}: name a run, or the folder of a model.") from error
    except ValueError as error:
        raise InputError(f"{folder / CARD} is damaged ({error}): copy the model again.") from error
    return read_weights(folder / WEIGHTS), card
