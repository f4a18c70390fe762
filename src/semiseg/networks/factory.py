"""Makes networks and optimisers from options: encoders by timm's names, decoders by smp's, or a class of one's own.

Sources: timm (encoders and their weights), segmentation_models_pytorch (decoders).
"""

import hashlib
import importlib
import importlib.util
import inspect
import math
import os
import re
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import huggingface_hub
import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from semiseg import parallel
from semiseg.networks import deeplabv2, dpt
from semiseg.networks.critic import Critic, Kind
from semiseg.networks.heads import Head, Projected
from semiseg.networks.net import FrozenNorm, SegNet, Wrapped
from semiseg.networks.weights import (
    CARD,
    load_network,
    load_tensors,
    model_folder,
    place_of,
    read_model,
    read_weights,
)
from semiseg.types import InputError, Options, nearest

_DECODERS = {
    "unet": "Unet",
    "unetplusplus": "UnetPlusPlus",
    "manet": "MAnet",
    "linknet": "Linknet",
    "fpn": "FPN",
    "pspnet": "PSPNet",
    "deeplabv3": "DeepLabV3",
    "deeplabv3plus": "DeepLabV3Plus",
    "upernet": "UPerNet",
    "segformer": "Segformer",
}
"""smp's PAN needs images of 128 px, and its DPT no size but one."""
_OWN = {"deeplabv2": deeplabv2.DeepLabV2, "dpt": dpt.DPT}
_NAMES = (*_DECODERS, *_OWN)
_FIXED = {"encoder_name", "encoder_weights", "in_channels", "classes", "activation", "upsampling", "aux_params"}
"""Arguments of smp's decoders that are no options: they follow from the data, or belong to parts that are not used."""
_PROBE_SECONDS = 4
SALT = 1_000_003
"""Between the seeds of the networks that a method trains one after another."""

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


class NetworkConfig(Options):
    """Which network, and what it starts from."""

    name: str = "deeplabv3plus"
    """A decoder of segmentation_models_pytorch, deeplabv2, dpt (on plain vision transformers such as DINOv2's), or your
    own: file.py:Class or package.module:Class."""
    encoder: str = "resnet50"
    """Any encoder of timm, with or without the tag of its weights."""
    weights: str = "pretrained"
    """pretrained (timm's download, else random and said so), random, a file (.safetensors, .pth) in timm's names, or
    another run's folder: the whole network is taken, the last layer's rows for classes of the same name."""
    encoder_options: dict[str, Any] = {}
    """Handed to timm's encoder."""
    options: dict[str, Any] = {}
    """Handed to the decoder, or to your own class."""
    mean: float | tuple[float, ...] | None = None
    """Of images in 0..1, one number or one a channel; none: the encoder's own, averaged where channels are not 3, or
    those of the run that `weights` names."""
    std: Positive | tuple[Positive, ...] | None = None
    """Like `mean`."""
    frozen_norm: FrozenNorm = "none"
    """Batch norms that keep the initial statistics: the encoder's, where it is pretrained and batches are small."""
    frozen: bool = False
    """The encoder's weights stay as they are, and the rest learns; batch norm's statistics are up to `frozen_norm`."""
    checkpointing: bool = False
    """Computes the encoder twice instead of storing it: less memory, about a third more time, the same result."""


class OptimConfig(Options):
    """How weights move."""

    name: Literal["adamw", "sgd"] = "adamw"
    """adamw or sgd."""
    lr: Positive = 3e-4
    """Peak rate of the encoder, at the recipe's batch."""
    head_lr: Positive = 10
    """Everything that is not the encoder learns at lr times this."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Each layer of the encoder, as timm divides it, learns at the next one's rate times this, the last block at lr
    times it. 1: all at lr."""
    weight_decay: NotNegative = 0.01
    """On all weights. 0.01 suits adamw; recipes with sgd in this field use 0.0001 to 0.0005."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of sgd."""
    clip: Positive | None = None
    """Largest norm of the gradient of all weights together; none: not clipped."""
    power: NotNegative = 0.9
    """Of the polynomial decay; 0: constant."""

    def rate(self, progress: float) -> float:
        """The share of a peak rate at `progress` (0..1) of a run: (1 - progress) ** power, the poly schedule."""
        return float((1 - progress) ** self.power)


@dataclass(frozen=True)
class Build:
    """What a method is given to make its parts.

    classes, channels  C and N of the data
    seed               of the run; the initial weights depend on it and on `salt`, on nothing else
    precision          torch.bfloat16 for autocast inside the networks, or None
    channels_last      memory layout of the convolutions
    base               folder of the recipe: relative files are looked for there first
    class_pixels       counts (C,) the pixels of each class in the labelled masks, for those who ask
    names              of the classes, where they are known: for logs, and to start from a run with other ones
    report             lines for the user, as on where the initial weights came from; somebody must show them
    """

    classes: int
    channels: int
    config: NetworkConfig
    optim: OptimConfig
    seed: int = 0
    precision: torch.dtype | None = None
    channels_last: bool = False
    base: Path | None = None
    device: torch.device = torch.device("cpu")
    class_pixels: Callable[[], Tensor] | None = None
    names: tuple[str, ...] = ()
    report: list[str] = field(default_factory=list, init=False)

    def network(self, salt: int = 0, whole: bool = True) -> SegNet | Wrapped:
        """A new network in training mode on the device: random weights from (seed, salt), then those of the options.

        The process' random state stays as it was.

        Args:
            salt: networks of other salts draw other weights.
            whole: of a file or run that has more than an encoder, everything; else the encoder alone, so that a second
                network of another salt is another one.

        Raises:
            InputError: an option names nothing, or does not fit.
        """
        with _drawn_from(self.seed, salt):
            net = self._own(whole) if ":" in self.config.name else self._smp(whole)
        if self.config.frozen:
            if not isinstance(net, SegNet):
                raise InputError(f"network.frozen: {self.config.name} is one piece without an encoder: leave it out.")
            made_here = ":" not in self.config.name and self.config.weights == "pretrained"
            if made_here and isinstance(self._pretrained, str):
                raise InputError(
                    f"network.frozen: there are no pretrained weights of {self.config.encoder} ({self._pretrained}), "
                    "and a random encoder would stay random: let network.weights name a .safetensors file."
                )
            net.encoder.requires_grad_(False)
        if self.channels_last:
            net = net.to(memory_format=torch.channels_last)
        return net.to(self.device)

    def again(self, number: int) -> "Build":
        """The same with other random weights: for network `number` of a method that trains several; 0 is this one.

        It reports to a list of its own, for it has the same to say.
        """
        return replace(self, seed=self.seed + SALT * number)

    def parts(self, salt: int = 0) -> SegNet:
        """`network` for a method that calls encode, fuse and classify itself.

        Raises:
            InputError: the network does not come in parts; or see `network`.
        """
        net = self.network(salt)
        if isinstance(net, SegNet):
            return net
        raise InputError(
            f"network.name: {self.config.name} is one piece, and the method needs encode, fuse and classify: take "
            "a network by name, or one that returns a SegNet or a model of segmentation_models_pytorch."
        )

    def trained(self, path: Path, option: str) -> tuple[SegNet | Wrapped, tuple[str, ...]]:
        """The network of another run as it was delivered, in eval mode on the device, and its classes.

        Args:
            path: of the run, or of its model.
            option: by which the user names it.

        Raises:
            InputError: there is no model, or one for images with other channels.
        """
        found = find_weights(str(path), self.base, option=option)
        _, card = read_model(model_folder(found))
        if card["channels"] != self.channels:
            raise InputError(
                f"{option}: {found} is for images of {card['channels']} channels, but data.channels is "
                f"{self.channels}: name a run on images like yours."
            )
        names = tuple(card["classes"])
        self.report.append(f"{option}: {found}, a network of {card['method']}")
        config = NetworkConfig(**card["network"] | {"weights": str(found)})
        own = replace(self, classes=len(names), names=names, config=config, base=found)
        return own.network().eval(), names

    def critic(self, kind: Kind = "pixel", scale: float = 1.0, salt: int = 1) -> Critic:
        """A new critic on the device, its random weights from (seed, salt)."""
        with _drawn_from(self.seed, salt):
            net = Critic(self.classes, kind, scale, self.precision)
        if self.channels_last:
            net = net.to(memory_format=torch.channels_last)
        return net.to(self.device)

    def projected(self, width: int, features: bool = True, auxiliary: bool = False, salt: int = 2) -> Projected:
        """A new network, and if wanted a head for features, and an auxiliary classifier, with layers of `width`.

        Raises:
            InputError: the network does not come in parts, so that there is no fused map; or see `network`.
        """
        net = self.parts()
        if auxiliary and len(net.widths) < 2:
            raise InputError(
                "network: the encoder has a single map, and an auxiliary classifier needs the last but one."
            )
        with _drawn_from(self.seed, salt):
            projection = Head(net.width, width, width, 2, self.precision) if features else None
            classifier = Head(net.widths[-2], width, self.classes, 1, self.precision) if auxiliary else None
        heads = nn.ModuleList(head for head in (projection, classifier) if head is not None)
        if parallel.world() > 1 and self.device.type == "cuda":
            nn.SyncBatchNorm.convert_sync_batchnorm(heads)  # in place: none of them is a norm itself
        if self.channels_last:
            heads.to(memory_format=torch.channels_last)
        return Projected(net, projection, classifier).to(self.device)

    def memory(self) -> float:
        """Bytes of memory that the device has; infinite where nobody tells."""
        if self.device.type == "cuda":
            return float(torch.cuda.get_device_properties(self.device).total_memory)
        try:
            return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        except (AttributeError, ValueError, OSError):  # Windows has no sysconf
            return math.inf

    def optimizer(self, net: nn.Module, extra: Iterable[nn.Module] = ()) -> Optimizer:
        """AdamW or SGD over a network and `extra` modules; each group carries `peak_lr`.

        The encoder learns at lr, or layer by layer at less (layer_decay), all else at lr * head_lr; a network without
        `encoder` learns at lr as a whole.

        Raises:
            InputError: layer_decay, and nobody knows the encoder's layers.
        """
        encoder = net.get_submodule("encoder") if hasattr(net, "encoder") else net
        known = {id(p) for p in encoder.parameters()}
        rest = [p for module in (net, *extra) for p in module.parameters() if id(p) not in known]
        layers = {0: list(encoder.parameters())} if self.optim.layer_decay == 1 else self._layers(encoder)
        rates = [(params, self.optim.lr * self.optim.layer_decay**depth) for depth, params in layers.items()]
        rates.append((rest, self.optim.lr * self.optim.head_lr))
        # A frozen encoder is no group: there is nothing to do for it in a step.
        some = ((params, lr) for params, lr in rates if any(p.requires_grad for p in params))
        groups = [{"params": params, "lr": lr, "peak_lr": lr} for params, lr in some]
        if self.optim.name == "sgd":
            # Not fused: that fails where a weight gets its first gradient later than others, as a head after a warm-up.
            return SGD(groups, momentum=self.optim.momentum, weight_decay=self.optim.weight_decay, foreach=True)
        return AdamW(groups, weight_decay=self.optim.weight_decay, fused=True)

    def _layers(self, encoder: nn.Module) -> dict[int, list[nn.Parameter]]:
        """The encoder's weights by timm's layers, from the image on: the number of the last is 1, before it 2."""
        import timm
        from timm.models import group_parameters

        name, options = self.config.encoder.partition(".")[0], self.config.encoder_options
        own = dict(encoder.named_parameters())
        numbers: dict[str, int] = {}
        if ":" not in self.config.name:
            with torch.device("meta"):
                whole: Any = timm.create_model(name, **options)
            if hasattr(whole, "group_matcher"):
                numbers = group_parameters(whole, whole.group_matcher(coarse=False), reverse=True)
        places = {place_of(name, own): number for name, number in numbers.items()}
        if not own.keys() <= places.keys():
            raise InputError(
                f"optim.layer_decay: timm does not tell the layers of {name if numbers else self.config.name}: "
                "leave it out, or choose another encoder."
            )
        last = max(places[place] for place in own)
        layers: dict[int, list[nn.Parameter]] = {}
        for place, weight in own.items():
            layers.setdefault(1 + last - places[place], []).append(weight)
        return dict(sorted(layers.items(), reverse=True))

    def _smp(self, whole: bool) -> SegNet:
        import timm

        config = self.config
        _known(config.name, _NAMES, "network.name")
        _known(config.encoder.partition(".")[0], timm.list_models(), "network.encoder")
        _known(
            config.encoder, (config.encoder.partition(".")[0], *timm.list_models(include_tags=True)), "network.encoder"
        )
        released = config.name == "deeplabv2" and bool(config.options.get("released"))
        card = _card(config.encoder)
        published = released and config.weights != "pretrained"
        known = (deeplabv2.MEAN, (deeplabv2.STD,) * 3) if published else (card.mean, card.std)
        mean, std = self._statistics(*known)
        model = _create(config, self.classes, self.channels)
        if parallel.world() > 1 and self.device.type == "cuda":
            from timm.layers.norm_act import convert_sync_batchnorm  # torch's drops the activations in timm's layers

            model = convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        try:
            precision, frozen = self.precision, config.frozen_norm
            net = SegNet(model, self.classes, mean, std, precision, config.checkpointing, frozen, released)
        except (RuntimeError, AssertionError, ValueError) as error:
            reason = _reason(error)
            raise InputError(
                f"network: {config.name} on {config.encoder} takes no images of free size ({reason}); choose another."
            ) from error
        self._load(net, whole)
        return net

    def _own(self, whole: bool) -> SegNet | Wrapped:
        from segmentation_models_pytorch.base import SegmentationModel

        config = self.config
        path = None if config.weights in ("pretrained", "random") else find_weights(config.weights, self.base)
        if path is not None and path.is_file():
            raise InputError(
                f"network.weights: {config.name} loads its own weights: name a run of it, or leave the option out."
            )
        make = load_object(config.name, self.base)
        model = make(channels=self.channels, classes=self.classes, **config.options)
        if not isinstance(model, nn.Module):
            raise InputError(f"network.name: {config.name} must make a torch.nn.Module, not {type(model).__name__}.")
        mean, std = self._statistics((0.0,), (1.0,))
        net: SegNet | Wrapped
        if isinstance(model, SegNet | Wrapped):
            net = model
        elif isinstance(model, SegmentationModel):
            net = SegNet(model, self.classes, mean, std, self.precision, config.checkpointing, config.frozen_norm)
        else:
            net = Wrapped(model, self.classes, mean, std, self.precision)
        if path is None:
            self._say(f"{config.name} starts from the weights that it makes itself")
        else:
            self._load_run(net, path, whole)
        return net

    def _statistics(
        self, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The options' mean and std, one number a channel; the given ones where the options have none."""
        return (
            _per_channel(self.config.mean, mean, self.channels, "network.mean"),
            _per_channel(self.config.std, std, self.channels, "network.std"),
        )

    def _load(self, net: SegNet, whole: bool) -> None:
        """Loads initial weights, and says in `report` what came of it."""
        config = self.config
        if config.weights == "random":
            kept = ", and the frozen encoder keeps its own" * config.frozen
            self._say(f"network.weights is random: training starts from random weights{kept}")
        elif config.weights != "pretrained":
            path = find_weights(config.weights, self.base)
            if path.is_dir():
                self._load_run(net, path, whole)
                return
            head = deeplabv2.head_names(net.head) if config.name == "deeplabv2" and whole else {}
            self._say(*load_tensors(net.encoder, read_weights(path), str(path), head).lines())
        elif isinstance(self._pretrained, str):
            self._say(
                f"no pretrained weights of {config.encoder} ({self._pretrained}): training starts from RANDOM weights; "
                "network.weights can name a .safetensors file"
            )
        else:
            self._say(*load_tensors(net.encoder, self._pretrained, f"timm's {config.encoder}").lines())

    def _load_run(self, net: SegNet | Wrapped, path: Path, whole: bool) -> None:
        """Loads the network of the run in `path`, and says in `report` what came of it."""
        tensors, card = read_model(model_folder(path))
        ours, theirs = _architecture(self.config.model_dump(mode="json")), _architecture(card["network"])
        for option in (*theirs, *ours):
            if ours.get(option) != theirs.get(option):
                there, here = (
                    f"network.{option}={o[option]}" if option in o else f"no network.{option}" for o in (theirs, ours)
                )
                raise InputError(
                    f"network.weights: {path} has {there}, this recipe {here}: "
                    "make the network that one, or name another run."
                )
        if card["channels"] != self.channels:
            raise InputError(
                f"network.weights: {path} is for images of {card['channels']} channels, but data.channels is "
                f"{self.channels}: name a run on images like yours."
            )
        assert len(self.names) == self.classes, "classes are matched by their names"
        given = {"normalise.mean": self.config.mean, "normalise.std": self.config.std}
        tensors |= {place: net.get_buffer(place) for place, value in given.items() if value is not None}
        drawn = {name: tensor.clone() for name, tensor in net.state_dict().items()} if not whole else {}
        self._say(*load_network(net, tensors, str(path), card["classes"], self.names))
        if not whole:
            if not isinstance(net, SegNet):
                raise InputError(
                    f"network.weights: {path} has a network in one piece, and the method needs two that differ: "
                    "leave the option out."
                )
            rest = {name: t for name, t in drawn.items() if not name.startswith(("encoder.", "normalise."))}
            net.load_state_dict(net.state_dict() | rest)
            self._say(
                "  the encoder alone for the second network, whose decoder is drawn: two that are one learn nothing"
            )
        for place, value in given.items():
            numbers = ", ".join(f"{number:.4g}" for number in net.get_buffer(place).flatten().tolist())
            name = place.rpartition(".")[2]
            self._say(f"  {name} of images: {numbers}, {'of that run' if value is None else f'from network.{name}'}")

    @cached_property
    def _pretrained(self) -> dict[str, Tensor] | str:
        """timm's weights of the encoder, or the reason why there are none; asked once."""
        try:
            return _download(self.config.encoder)
        except Exception as error:  # noqa: BLE001 - each source of weights has errors of its own
            return str(error)

    def _say(self, *lines: str) -> None:
        self.report.extend(line for line in lines if line not in self.report)


@contextmanager
def _drawn_from(seed: int, salt: int) -> Iterator[None]:
    """Draws the CPU's random numbers from (seed, salt), and puts the process' own state back."""
    state = torch.get_rng_state()
    # Not torch.manual_seed: it would seed every GPU too.
    torch.default_generator.manual_seed(int(np.random.SeedSequence((seed, salt)).generate_state(1, np.uint64)[0]))
    try:
        yield
    finally:
        torch.set_rng_state(state)


def _known(name: str, names: Iterable[str], option: str) -> None:
    if name not in names:
        raise InputError(f"{option}: {name} is unknown; {nearest(name, names)}")


def _create(config: NetworkConfig, classes: int, channels: int) -> nn.Module:
    import segmentation_models_pytorch as smp

    decoder: Any = _OWN[config.name] if config.name in _OWN else getattr(smp, _DECODERS[config.name])
    own = set(inspect.signature(decoder.__init__).parameters) - _FIXED - {"self", "kwargs"}
    for name in config.options:
        _known(name, own, f"network.options of {config.name}")
    for name in config.encoder_options:
        if name in own | _FIXED:
            raise InputError(f"network.encoder_options: {name} is no option of an encoder; set it in network.options.")
    try:
        model: nn.Module = decoder(
            encoder_name=f"tu-{config.encoder}",
            encoder_weights=None,
            in_channels=channels,
            classes=classes,
            **config.options,
            **config.encoder_options,
        )
    except InputError:
        raise
    except (TypeError, ValueError, KeyError, RuntimeError, AssertionError, NotImplementedError) as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown and unknown[1] in config.encoder_options:
            raise InputError(f"network.encoder_options: {config.encoder} has no {unknown[1]}; remove it.") from error
        raise InputError(
            f"network: {config.name} cannot be built on {config.encoder} ({_reason(error)}): choose another "
            "network.encoder or network.name (dpt takes plain vision transformers)."
        ) from error
    return model


def _architecture(network: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options of a network, in plain values, that say which one it is; the tag of an encoder does not."""
    own = ":" in network["name"]
    chosen = {"name": network["name"].rpartition("/")[2] if own else network["name"]}
    chosen |= {} if own else {"encoder": network["encoder"].partition(".")[0]}
    for group in ("options", "encoder_options"):
        chosen |= {f"{group}.{name}": value for name, value in network[group].items()}
    return chosen


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _card(encoder: str) -> Any:
    """What timm knows of an encoder's weights: mean, std, where they are."""
    import timm

    return timm.get_pretrained_cfg(encoder, allow_unregistered=False)


def _per_channel(
    given: float | tuple[float, ...] | None, own: tuple[float, ...], channels: int, option: str
) -> tuple[float, ...]:
    if given is None:
        return own if len(own) == channels else (sum(own) / len(own),) * channels
    if not isinstance(given, tuple):
        return (given,) * channels
    if len(given) != channels:
        raise InputError(
            f"{option} has {len(given)} numbers, but images have {channels} channels: give 1 or {channels}."
        )
    return given


def _download(encoder: str) -> dict[str, Tensor]:
    """timm's weights of an encoder, from its cache or the net; where neither has them an error, within seconds."""
    import timm

    if not timm.is_model_pretrained(encoder):
        raise LookupError("timm has none of that name")
    repository = _card(encoder).hf_hub_id
    cached = repository and huggingface_hub.try_to_load_from_cache(repository, "model.safetensors")
    overlay = {"file": cached} if isinstance(cached, str) else {}
    if not overlay:
        _probe(huggingface_hub.constants.ENDPOINT)
    tensors: dict[str, Tensor] = timm.create_model(
        encoder, pretrained=True, pretrained_cfg_overlay=overlay
    ).state_dict()
    return tensors


def _probe(address: str) -> None:
    """One request, because timm's client tries for 47 s before it gives up.

    Raises:
        OSError: nobody answers in 4 s.
    """
    errors: list[OSError] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=_PROBE_SECONDS).close()
        except OSError as error:
            errors.append(error)

    # A thread, because a socket's timeout holds for one address of a host, and not at all for looking them up.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_PROBE_SECONDS)
    if thread.is_alive():
        raise TimeoutError(f"no answer from {address} in {_PROBE_SECONDS} s")
    if errors:
        raise ConnectionError(f"{address} cannot be reached") from errors[0]


def find_weights(text: str, base: Path | None, begun: str | None = None, option: str = "network.weights") -> Path:
    """The file or the run that an option names: absolute, or in one of the places that are searched.

    Args:
        text: the option's value.
        base: the recipe's folder, searched first; then the working folder and $SEMISEG_DATA.
        begun: the absolute path that a run began with, if it goes on: taken also where nothing is left there.
        option: named in errors.

    Raises:
        InputError: nothing is there, or a folder without a model.
    """
    shared = os.environ.get("SEMISEG_DATA")
    folders = (base or Path.cwd(), Path.cwd(), *([Path(shared)] if shared else []))
    places = list(dict.fromkeys(folder.absolute() for folder in folders))
    paths = [place / Path(text).expanduser() for place in places]
    for path in paths:
        if begun == str(path.resolve()):
            return path
    for path in paths:
        if path.is_dir() and not (model_folder(path) / CARD).is_file():
            raise InputError(
                f"{option}: {path} is a folder without a model: name a run"
                f"{', or a .safetensors file' * option.endswith('weights')}."
            )
        if path.exists():
            return path
    searched = " and ".join(map(str, places))
    raise InputError(
        f"{option}: {text} is not there (looked for in {searched}); correct the path"
        f"{', or write pretrained or random' * option.endswith('weights')}."
    )


def code_file(place: str, base: Path | None) -> Path:
    """The file of an import string: relative to `base`, else the copy that a run keeps under the file's own name."""
    path = (base or Path.cwd()) / place
    copy = path if base is None else base / path.name
    return copy if copy.is_file() and not path.is_file() else path


def load_object(text: str, base: Path | None) -> Any:
    """What `file.py:Name` (relative to `base`, the recipe's folder) or `package.module:Name` names.

    Raises:
        InputError: no such file, module or name, or an error while it is imported.
    """
    place, _, name = text.rpartition(":")
    module = _module_of_file(code_file(place, base)) if place.endswith(".py") else _module(place)
    if not hasattr(module, name):
        raise InputError(f"{text}: {place} has no {name}; {nearest(name, [n for n in vars(module) if n[0] != '_'])}")
    return getattr(module, name)


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise InputError(f"{name} cannot be imported ({type(error).__name__}: {error}).") from error


def _module_of_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise InputError(f"{path} does not exist: correct the path before the colon.")
    # Named by its text: what it defines can be pickled, and an edited file is another module.
    name = f"{path.stem}_{hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise InputError(f"{path} cannot be imported ({type(error).__name__}: {error}).") from error
    return module
