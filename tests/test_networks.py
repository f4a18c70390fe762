"""Networks: the three parts against smp's own, images of every kind and size, weights, seeds, and wrong input."""

import copy
import json
import os
import pickle
import re
import socket
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn
from torch.nn import functional as F

from semiseg.methods import METHODS, StepMethod
from semiseg.networks import deeplabv2, factory
from semiseg.networks.critic import Critic
from semiseg.networks.factory import Build, NetworkConfig, OptimConfig, find_weights, load_object
from semiseg.networks.heads import Head, Projected
from semiseg.networks.net import SegNet, Wrapped, _SameConv2d
from semiseg.networks.weights import load_tensors, read_model, read_weights, save_model
from semiseg.types import InputError

TINY = {"encoder": "test_resnet", "weights": "random"}
DECODERS = (
    "deeplabv2",
    "deeplabv3",
    "fpn",
    "linknet",
    "manet",
    "pspnet",
    "segformer",
    "unet",
    "unetplusplus",
    "upernet",
)


def build(channels: int = 3, seed: int = 0, base: Path | None = None, optim: Any = None, **options: Any) -> Build:
    return Build(5, channels, NetworkConfig(**(TINY | options)), OptimConfig(**(optim or {})), seed=seed, base=base)


def segnet(channels: int = 3, seed: int = 0, **options: Any) -> SegNet:
    net = build(channels, seed, **options).network()
    assert isinstance(net, SegNet)
    return net.eval()


def images(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


# ---- three parts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["deeplabv3plus", "fpn"])
@pytest.mark.parametrize("size", [(64, 96), (45, 70), (1, 33)])
def test_the_parts_make_the_whole_at_any_size(name: str, size: tuple[int, int]) -> None:
    net, image = segnet(name=name), images(2, 3, *size)
    with torch.no_grad():
        maps = net.encode(image)
        fused = net.fuse(maps)
        logits = net(image)
        assert torch.equal(logits, net.classify(fused, size))
    padded = [-(-side // net.multiple) * net.multiple for side in size]
    assert logits.shape == (2, 5, *size)
    assert logits.dtype == torch.float32
    assert fused.shape == (2, net.width, padded[0] // net.stride, padded[1] // net.stride)
    assert net.classify(fused).shape == (2, 5, *fused.shape[2:])
    sides = [m.shape[2] for m in maps]
    assert sides == sorted(sides, reverse=True)
    assert max(sides) < padded[0], "the image itself is no feature"


@pytest.mark.parametrize("name", DECODERS)
def test_every_decoder_takes_a_size_that_nothing_divides(name: str) -> None:
    net = build(name=name).network().train()
    logits = net(images(2, 3, 45, 70))
    logits.sum().backward()
    assert logits.shape == (2, 5, 45, 70)
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("encoder", ["test_convnext", "test_byobnet", "vgg11"])
@pytest.mark.parametrize("name", ["segformer", "unet"])
def test_encoders_without_a_map_at_half_the_size_or_with_one_at_full(name: str, encoder: str) -> None:
    net = segnet(name=name, encoder=encoder)
    with torch.no_grad():
        maps = net.encode(images(1, 3, 45, 70))
        assert all(m.shape[1] > 3 for m in maps)
        assert net.classify(net.fuse(maps), (45, 70)).shape == (1, 5, 45, 70)


@pytest.mark.parametrize("name", ["deeplabv3plus", "fpn", "unet"])
def test_the_logits_are_smps_up_to_the_last_resize(name: str) -> None:
    net = segnet(name=name, mean=0.5, std=0.25)
    makers = {"deeplabv3plus": smp.DeepLabV3Plus, "fpn": smp.FPN, "unet": smp.Unet}
    model = makers[name]("tu-test_resnet", encoder_weights=None, classes=5).eval()
    model.encoder.load_state_dict(net.encoder.state_dict())
    model.decoder.load_state_dict(net.decoder.state_dict())
    model.segmentation_head[0].load_state_dict(net.head.state_dict())
    image = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        small = model.segmentation_head[0](model.decoder(model.encoder((image - 0.5) / 0.25)))
        expected = F.interpolate(small, size=(64, 96), mode="bilinear", align_corners=False)
        torch.testing.assert_close(net.classify(net.fuse(net.encode(image))), small)
        torch.testing.assert_close(net(image), expected)


def test_one_image_is_too_few_for_a_batch_norm_behind_a_pooling() -> None:
    with pytest.raises(InputError, match=r"train\.batch: 1 is too few"):
        segnet(name="deeplabv3plus").train()(images(1, 3, 64, 64))
    segnet(name="fpn").train()(images(1, 3, 64, 64))


def test_an_image_is_padded_by_its_edge() -> None:
    net, image = segnet(), images(1, 3, 45, 70)
    padded = np.pad(image.numpy(), ((0, 0), (0, 0), (0, 3), (0, 10)), mode="edge")
    with torch.no_grad():
        assert torch.equal(net(image), net(torch.from_numpy(padded))[..., :45, :70])


@pytest.mark.parametrize("channels", [1, 3, 4, 7])
def test_uint8_uint16_and_floats_are_one_image(channels: int) -> None:
    net, image = segnet(channels), images(1, channels, 40, 40)
    with torch.no_grad():
        logits = net(image)
        torch.testing.assert_close(net((image.to(torch.int32) * 257).to(torch.uint16)), logits)
        torch.testing.assert_close(net(image / 255), logits)
        torch.testing.assert_close(net(image.double() / 255), logits)


def test_mean_and_spread_are_the_encoders_and_averaged_for_other_channels() -> None:
    imagenet = timm.get_pretrained_cfg("test_resnet")
    assert imagenet is not None
    for channels, mean in ((3, list(imagenet.mean)), (4, [sum(imagenet.mean) / 3] * 4)):
        assert segnet(channels).normalise.mean.flatten().tolist() == pytest.approx(mean)
    assert segnet(4, mean=0.25).normalise.mean.flatten().tolist() == [0.25] * 4
    assert segnet(2, std=(0.5, 0.25)).normalise.std.flatten().tolist() == [0.5, 0.25]
    with pytest.raises(InputError, match=r"network.mean has 3 numbers, but images have 4 channels: give 1 or 4."):
        segnet(4, mean=(0.5, 0.5, 0.5))
    with pytest.raises(InputError, match=r"data.channels is 3, but an image has 1"):
        segnet()(images(1, 1, 32, 32))


def test_precision() -> None:
    net, image = segnet(), images(1, 3, 45, 70)
    with torch.no_grad():
        exact = net(image)
        net.precision = torch.bfloat16
        rough = net(image)
        assert net.fuse(net.encode(image)).dtype == torch.bfloat16
        assert rough.dtype == torch.float32
        assert 0 < (rough - exact).abs().max() < 0.1 * exact.abs().max()
        double = net.double()(image)
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), exact, rtol=1e-4, atol=1e-5)


def test_layout_does_not_matter() -> None:
    net, image = segnet(), images(2, 3, 45, 70)
    other = Build(5, 3, NetworkConfig(**TINY), OptimConfig(), channels_last=True).network().eval()
    with torch.no_grad():
        torch.testing.assert_close(other(image), net(image))


@pytest.mark.parametrize(
    ("frozen", "encoder_moves", "decoder_moves"),
    [
        ("none", True, True),
        ("encoder", False, True),
        ("all", False, False),
    ],
)
def test_frozen_batch_norms_keep_their_statistics_in_training(
    frozen: str, encoder_moves: bool, decoder_moves: bool
) -> None:
    net = segnet(frozen_norm=frozen, name="deeplabv3plus").train()
    teacher = copy.deepcopy(net).eval().train()  # a copy freezes its own modules
    for one in (net, teacher):
        before = {name: value.clone() for name, value in one.named_buffers()}
        with torch.no_grad():
            one(images(4, 3, 64, 64))
        moved = {name for name, value in one.named_buffers() if not torch.equal(value, before[name])}
        assert any(name.startswith("encoder.") for name in moved) == encoder_moves
        assert any(name.startswith("decoder.") for name in moved) == decoder_moves
    assert all(p.requires_grad for p in net.parameters())


def test_same_padding_is_timms() -> None:
    timms = timm.create_model("mobilenetv2_100", pad_type="same", features_only=True).eval()
    net = segnet(encoder="mobilenetv2_100", encoder_options={"pad_type": "same"}, name="unet")
    assert any(isinstance(m, Conv2dSame) for m in timms.modules())
    assert any(isinstance(m, _SameConv2d) for m in net.modules())
    assert net.encoder.get_submodule("model").state_dict().keys() == timms.state_dict().keys()
    timms.load_state_dict(net.encoder.get_submodule("model").state_dict())
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        for ours, theirs in zip(net.encode(image), timms(net.normalise(image)), strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("encoder", ["test_resnet", "test_efficientnet", "test_convnext"])
def test_checkpointing_changes_nothing_but_memory(encoder: str) -> None:
    image = images(2, 3, 64, 64)
    results = []
    for checkpointing in (False, True):
        net = build(encoder=encoder, checkpointing=checkpointing, name="fpn").network()
        assert isinstance(net, SegNet)
        stored: list[int] = []
        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=stored: s.append(t.numel()) or t, lambda t: t):
            maps = net.encode(image)
        logits = net.classify(net.fuse(maps), (64, 64))
        logits.square().mean().backward(inputs=list(net.parameters()))
        results.append((net, logits, sum(stored)))
    (plain, logits, stored_plain), (again, other, stored_again) = results
    assert torch.equal(logits, other)
    assert same(plain, again), "batch norm must count each batch once"
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(plain.parameters(), again.parameters(), strict=True))  # type: ignore[arg-type]
    assert stored_again < 0.5 * stored_plain


def test_a_copy_of_a_checkpointed_network_is_its_own() -> None:
    net = build(checkpointing=True).network()
    twin = copy.deepcopy(net)
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    assert twin.eval()(images(1, 3, 32, 32)).abs().max() > 0


# ---- weights ---------------------------------------------------------------------------------------------------------


def tiny_weights(encoder: str = "test_resnet") -> dict[str, Tensor]:
    torch.manual_seed(7)
    return {k: v.clone() for k, v in timm.create_model(encoder, num_classes=10).state_dict().items()}


@pytest.mark.parametrize("kind", ["google", "onnxzoo"])
def test_the_real_weights_load_completely(kind: str) -> None:
    if not os.environ.get("SEMISEG_DATA"):
        pytest.skip("SEMISEG_DATA is not set")
    made = build(
        encoder="mobilenetv2_100",
        weights=f"weights/mobilenetv2_100.{kind}_in1k.safetensors",
        encoder_options={"pad_type": "same"} if kind == "google" else {},
    )
    net = made.network()
    assert isinstance(net, SegNet)
    assert "255 of the encoder's 255 tensors loaded" in made.report[0]
    assert len(made.report) == 2
    assert "not used by the encoder: bn2.bias" in made.report[1]
    tensors = read_weights(Path(os.environ["SEMISEG_DATA"], f"weights/mobilenetv2_100.{kind}_in1k.safetensors"))
    report = load_tensors(net.encoder, tensors, "it")
    assert report.missing == report.mismatched == report.adapted == ()
    assert {name.split(".")[0] for name in report.unexpected} == {"conv_head", "bn2"}


@pytest.mark.parametrize(
    "encoder", ["test_resnet", "test_efficientnet", "test_convnext", "test_byobnet", "hrnet_w18_small"]
)
def test_timms_names_are_found_in_timms_feature_extractors(encoder: str, tmp_path: Path) -> None:
    tensors = tiny_weights(encoder)
    save_file(tensors, tmp_path / "w.safetensors")
    made = build(encoder=encoder, weights="w.safetensors", base=tmp_path, name="fpn")
    net = made.network()
    assert isinstance(net, SegNet)
    report = load_tensors(net.encoder, tensors, "it")
    assert report.loaded == report.total
    features = timm.create_model(encoder, features_only=True).eval()
    full = timm.create_model(encoder, num_classes=10).eval()
    full.load_state_dict(tensors)
    with torch.no_grad():
        image = torch.rand(1, 3, 64, 64)
        last = net.eval().encoder(image)[-1]
        assert last.shape == features(image)[-1].shape
        if encoder == "test_resnet":
            torch.testing.assert_close(last, full.forward_features(image))


def test_a_partial_file_is_reported(tmp_path: Path) -> None:
    tensors = tiny_weights()
    del tensors["layer1.0.conv1.weight"]
    tensors["layer2.0.conv1.weight"] = tensors["layer2.0.conv1.weight"][:3].clone()
    tensors["extra"] = torch.zeros(1)
    save_file(tensors, tmp_path / "w.safetensors")
    made = build(weights=str(tmp_path / "w.safetensors"))
    net = made.network()
    assert isinstance(net, SegNet)
    report = load_tensors(net.encoder, tensors, "w")
    assert report.missing == ("layer1.0.conv1.weight",)
    assert report.unexpected == ("fc.weight", "fc.bias", "extra")
    assert len(report.mismatched) == 1
    assert report.mismatched[0].startswith("layer2.0.conv1.weight (3, ")
    assert report.loaded == report.total - 2
    text = "\n".join(made.report)
    for part in (
        f"{report.loaded} of the encoder's {report.total} tensors",
        "layer1.0.conv1.weight",
        "of another shape",
    ):
        assert part in text


class Armed:
    """Makes a folder where it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("channels", [1, 4, 7])
def test_an_input_convolution_is_summed_or_repeated(channels: int) -> None:
    net, tensors = segnet(channels), tiny_weights()
    report = load_tensors(net.encoder, tensors, "w")
    assert report.loaded == report.total
    assert report.adapted == (f"conv1.0.weight from 3 to {channels}",)
    source = next(t for t in tensors.values() if t.ndim == 4 and t.shape[1] == 3)
    target = next(t for t in net.encoder.state_dict().values() if t.ndim == 4)
    if channels == 1:
        torch.testing.assert_close(target, source.sum(1, keepdim=True))
    else:
        repeated = torch.stack([source[:, i % 3] for i in range(channels)], 1) * 3 / channels
        torch.testing.assert_close(target, repeated)


def test_wrong_files_of_weights(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("no")
    (tmp_path / "folder").mkdir()
    for name, content in {
        "module": nn.Linear(1, 1),
        "list": [torch.zeros(1)],
        "numbers": {1: torch.zeros(1)},
        "epoch": {"a": torch.zeros(1), "epoch": 3},
        "armed": {"a": Armed(tmp_path / "fired")},
    }.items():
        torch.save(content, tmp_path / f"{name}.pth")
    torch.save(nn.Linear(1, 1), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    torch.save(tiny_weights(), tmp_path / "half.pth")
    (tmp_path / "half.pth").write_bytes((tmp_path / "half.pth").read_bytes()[:5000])
    (tmp_path / "text.pth").write_text("<!DOCTYPE html>")
    (tmp_path / "empty.pth").touch()
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"a": 1}))
    broken = r" is damaged, or not in torch's format: store the tensors alone, or name another file\.$"
    linear = r" holds torch\.nn\.modules\.linear\.Linear, but only tensors are opened: store the tensors alone, or "
    cases = {
        "other.safetensors": r"other.safetensors: none of its 1 tensors \(a\) fits the encoder; set network.encoder",
        "text.safetensors": r"text.safetensors cannot be read as safetensors",
        "absent.safetensors": r"network.weights: absent.safetensors is not there \(looked for in .*correct the path",
        "folder": r"network.weights: .*folder is a folder without a model: name a run, or a .safetensors file.",
        "module.pth": r"module\.pth" + linear,
        "old.pth": r"old\.pth" + linear,
        "armed.pth": r"armed\.pth holds (posix|nt)\.mkdir, but only tensors are opened",
        "half.pth": r"half\.pth" + broken,
        "text.pth": r"text\.pth" + broken,
        "empty.pth": r"empty\.pth" + broken,
        "plain.pth": r"plain\.pth" + broken,
        "list.pth": r"list\.pth holds something else than tensors by name: name a file of a network's weights\.$",
        "numbers.pth": r"numbers\.pth holds something else than tensors by name",
        "epoch.pth": r"epoch\.pth holds something else than tensors by name",
        "absent.pth": r"network.weights: absent.pth is not there",
    }
    for weights, message in cases.items():
        with pytest.raises(InputError, match=message):
            build(weights=weights, base=tmp_path).network()
    assert not (tmp_path / "fired").exists()


@pytest.mark.parametrize("change", [0, 1, 2])
def test_a_damaged_file_of_torch_is_an_error_or_none(tmp_path: Path, change: int) -> None:
    """Whatever bytes are turned round: no exception but the one sentence, nothing printed."""
    file, rng = tmp_path / "w.pth", np.random.default_rng(change)
    torch.save({"a": torch.zeros(3), "b": torch.ones(2)}, file, _use_new_zipfile_serialization=change == 0)
    whole = np.frombuffer(file.read_bytes(), np.uint8)
    refused = []
    for _ in range(60):
        spoilt = whole.copy()
        spoilt[rng.integers(0, len(whole), 5)] = rng.integers(0, 256, 5)
        file.write_bytes(spoilt[: rng.integers(1, len(whole)) if change == 2 else None].tobytes())
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                read_weights(file)
            except InputError as error:
                refused.append(str(error))
        assert not said
    assert len(refused) > 30
    assert not any("\n" in sentence for sentence in refused)


def test_without_a_connection_weights_are_random_and_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factory.huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(factory.huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    made = build(weights="pretrained")
    start = time.perf_counter()
    assert same(made.network(), build().network())
    made.network(1)
    assert time.perf_counter() - start < 5
    assert len(made.report) == 1
    assert "training starts from RANDOM weights" in made.report[0]


def test_a_connection_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the socket's timeout or by ours, whichever comes first; by ours where names are looked up for ever."""
    monkeypatch.setattr(factory, "_PROBE_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(OSError, match=r"127\.0\.0\.1"):
        factory._probe(f"http://127.0.0.1:{server.getsockname()[1]}")
    done = threading.Event()

    def hang(*_: object, **__: object) -> None:
        done.wait()
        raise OSError

    monkeypatch.setattr(factory.urllib.request, "urlopen", hang)
    with pytest.raises(TimeoutError, match=r"no answer from http://nowhere in 0\.2 s"):
        factory._probe("http://nowhere")
    done.set()


def test_weights_in_timms_cache_need_no_connection(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tensors, file = tiny_weights(), tmp_path / "model.safetensors"
    save_file({k: v for k, v in tensors.items() if not k.startswith("fc.")}, file)
    monkeypatch.setattr(factory.huggingface_hub, "try_to_load_from_cache", lambda *_: str(file))
    monkeypatch.setattr(factory.huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(timm, "create_model", _without_classifier(timm.create_model))
    made = build(weights="pretrained")
    net = made.network()
    assert isinstance(net, SegNet)
    assert "timm's test_resnet" in made.report[0]
    assert torch.equal(net.encoder.get_parameter("model.conv1.0.weight"), tensors["conv1.0.weight"])


def _without_classifier(create: Any) -> Any:
    return lambda name, **options: create(
        name, **(options if "features_only" in options else options | {"num_classes": 0})
    )


def test_a_model_comes_back_as_it_was(tmp_path: Path) -> None:
    net = Build(5, 3, NetworkConfig(**TINY), OptimConfig(), channels_last=True).network()
    card = {"classes": ["träd", "mur"], "size": None}
    for _ in range(2):
        save_model(tmp_path / "model", net.state_dict(), card)
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["model.json", "model.safetensors"]
    tensors, read = read_model(tmp_path / "model")
    other = build(seed=3).network()
    other.load_state_dict(tensors)
    assert same(net, other)
    assert read == card


def test_tied_weights_can_be_stored(tmp_path: Path) -> None:
    weight = torch.rand(2, 3)
    save_model(tmp_path, {"a": weight, "b": weight, "c": weight.T}, {})
    tensors, _ = read_model(tmp_path)
    assert torch.equal(tensors["c"], weight.T)


def test_wrong_models(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no model.json: name a run"):
        read_model(tmp_path)
    (tmp_path / "model.json").write_text("{")
    with pytest.raises(InputError, match=r"model.json is damaged"):
        read_model(tmp_path)
    (tmp_path / "model.json").write_text(json.dumps({}))
    with pytest.raises(InputError, match=r"model.safetensors cannot be read as safetensors"):
        read_model(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"could not be written"):
        save_model(tmp_path / "file", {"a": torch.zeros(1)}, {})


# ---- DeepLab-v2 ------------------------------------------------------------------------------------------------------

RATES = (6, 12, 18, 24)
NARROW: dict[str, Any] = {
    "name": "deeplabv2",
    "encoder": "resnet26",
    "weights": "random",
    "encoder_options": {"layers": [2, 1, 2, 1], "channels": [8, 8, 16, 24]},
}
"""A bottleneck ResNet of 100,000 weights."""


class Published:
    """DeepLab-v2 as its weights are published, written down from the description: tensors by name, one path forward."""

    def __init__(self, blocks: tuple[int, ...], widths: tuple[int, ...], classes: int) -> None:
        self.blocks, self.draw = blocks, torch.Generator().manual_seed(1)
        self.tensors: dict[str, Tensor] = {}
        self._convolution("conv1", 64, 3, 7)
        self._norm("bn1", 64)
        before = 64
        for stage, (count, width) in enumerate(zip(blocks, widths, strict=True), 1):
            for block in (f"layer{stage}.{i}" for i in range(count)):
                shapes = ((width, before, 1), (width, width, 3), (4 * width, width, 1))
                for part, shape in enumerate(shapes, 1):
                    self._convolution(f"{block}.conv{part}", *shape)
                    self._norm(f"{block}.bn{part}", shape[0])
                if block.endswith(".0"):
                    self._convolution(f"{block}.downsample.0", 4 * width, before, 1)
                    self._norm(f"{block}.downsample.1", 4 * width)
                before = 4 * width
        for i in range(len(RATES)):
            self._convolution(f"layer5.conv2d_list.{i}", classes, before, 3)
            self.tensors[f"layer5.conv2d_list.{i}.bias"] = self._normal(classes)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.draw)

    def _convolution(self, name: str, out: int, into: int, side: int) -> None:
        self.tensors[f"{name}.weight"] = self._normal(out, into, side, side) * (2 / (into * side**2)) ** 0.5

    def _norm(self, name: str, width: int) -> None:
        self.tensors[f"{name}.weight"] = 0.5 + 0.1 * self._normal(width)
        self.tensors[f"{name}.bias"] = 0.1 * self._normal(width)
        self.tensors[f"{name}.running_mean"] = 0.1 * self._normal(width)
        self.tensors[f"{name}.running_var"] = 1 + 0.1 * self._normal(width).abs()

    def _conv(self, x: Tensor, conv: str, norm: str, **options: Any) -> Tensor:
        t = self.tensors
        x = F.conv2d(x, t[f"{conv}.weight"], **options)
        mean, var, weight, bias = (
            t[f"{norm}.{part}"].view(-1, 1, 1) for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def __call__(self, image: Tensor, branches: int = 4) -> Tensor:
        """(B, 3, H, W) uint8, red first -> logits (B, C, H, W)."""
        centred = image - torch.tensor([122.679, 116.669, 104.007]).view(3, 1, 1)
        x = self._conv(centred, "conv1", "bn1", stride=2, padding=3).relu()
        height, width = ((side + 2) // 2 for side in x.shape[-2:])  # half a window more at an even border: rounded up
        x = F.pad(x, (1, 2 * width - x.shape[3], 1, 2 * height - x.shape[2]), value=-torch.inf)
        x = F.max_pool2d(x, 3, stride=2)
        for stage, (count, stride, dilation) in enumerate(zip(self.blocks, (1, 2, 1, 1), (1, 1, 2, 4), strict=True), 1):
            for i in range(count):
                block, step = f"layer{stage}.{i}", stride if i == 0 else 1
                y = self._conv(x, f"{block}.conv1", f"{block}.bn1", stride=step).relu()
                y = self._conv(y, f"{block}.conv2", f"{block}.bn2", padding=dilation, dilation=dilation).relu()
                y = self._conv(y, f"{block}.conv3", f"{block}.bn3")
                if i == 0:
                    x = self._conv(x, f"{block}.downsample.0", f"{block}.downsample.1", stride=step)
                x = (x + y).relu()
        head = [f"layer5.conv2d_list.{i}" for i in range(branches)]
        maps = [
            F.conv2d(x, self.tensors[f"{b}.weight"], self.tensors[f"{b}.bias"], padding=r, dilation=r)
            for b, r in zip(head, RATES, strict=False)
        ]
        return F.interpolate(torch.stack(maps).sum(0), size=image.shape[-2:], mode="bilinear", align_corners=True)


def narrow() -> Published:
    options = NARROW["encoder_options"]
    return Published(tuple(options["layers"]), tuple(options["channels"]), 5)


def alike(logits: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * float(expected.std()))


PLAIN: Any = vars(pickle)["_Pickler"]  # written in Python, unlike pickle.Pickler


class _Python2(PLAIN):
    """Stores text as Python 2 did, in whose days these weights were published."""

    dispatch = dict(PLAIN.dispatch)

    def _text(self, text: str) -> None:
        self.write(pickle.SHORT_BINSTRING + bytes([len(text)]) + text.encode())
        self.memoize(text)

    dispatch[str] = _text


PYTHON2 = SimpleNamespace(
    __name__="pickle",
    Pickler=_Python2,
    dump=lambda content, file, protocol: _Python2(file, protocol).dump(content),
)


def test_the_released_network_is_the_published_one(tmp_path: Path) -> None:
    """ResNet-101 by its public names: strides, padding, rounding, resizing, and channels red first."""
    published = Published((3, 4, 23, 3), (64, 128, 256, 512), 21)
    file = tmp_path / "w.pth"
    torch.save(published.tensors, file)
    config = NetworkConfig(name="deeplabv2", encoder="resnet101", weights=str(file), options={"released": True})
    made = Build(21, 3, config, OptimConfig())
    net = made.network().eval()
    assert made.report == [f"{file}: 528 of the encoder and head's 528 tensors loaded"]
    assert sum(p.numel() for p in net.parameters()) == 44_048_532
    for size in ((97, 97), (80, 64)):
        image = images(1, 3, *size)
        with torch.no_grad():
            logits, expected = net(image), published(image)
        assert logits.shape == expected.shape == (1, 21, *size)
        alike(logits, expected)


@pytest.fixture(scope="module")
def resnet101() -> deeplabv2.DeepLabV2:
    """Shapes without numbers."""
    with torch.device("meta"):
        return deeplabv2.DeepLabV2("tu-resnet101", classes=21, released=True)


@pytest.mark.parametrize(("side", "sides"), [(321, [161, 81, 41, 41, 41]), (505, [253, 127, 64, 64, 64])])
def test_sides_of_the_released_features(resnet101: deeplabv2.DeepLabV2, side: int, sides: list[int]) -> None:
    maps = resnet101.encoder(torch.empty(1, 3, side, side, device="meta"))
    assert [m.shape[-1] for m in maps[1:]] == sides


def test_layers_of_the_released_network(resnet101: deeplabv2.DeepLabV2) -> None:
    counts = {
        p: sum(w.numel() for w in resnet101.parameters() if w.requires_grad in p) for p in ((True,), (True, False))
    }
    assert counts == {(True,): 44_048_532 - 105_344, (True, False): 42_500_160 + 1_548_372}
    assert sum(w.numel() for w in resnet101.segmentation_head.parameters()) == 1_548_372
    stages = resnet101.encoder.get_submodule("model")
    assert stages.get_submodule("maxpool").ceil_mode
    for stage, (count, stride, dilation) in enumerate([(3, 1, 1), (4, 2, 1), (23, 1, 2), (3, 1, 4)], 1):
        blocks = list(stages.get_submodule(f"layer{stage}").children())
        assert len(blocks) == count
        for i, block in enumerate(blocks):
            step = (stride, stride) if i == 0 else (1, 1)
            assert (block.conv1.stride, block.conv2.stride) == (step, (1, 1))
            assert block.conv2.dilation == block.conv2.padding == (dilation, dilation)
            assert block.downsample is None or block.downsample[0].stride == step
    for module in resnet101.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert not module.weight.requires_grad
            assert not module.bias.requires_grad


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("branches", [1, 2, 4])
def test_every_branch_counts(branches: int, released: bool) -> None:
    """Released code returns from inside its loop over the branches, and leaves two of four out."""
    net, image = segnet(**NARROW, options={"branches": branches, "released": released}), images(1, 3, 64, 64)
    own = [part for part in net.head.modules() if isinstance(part, nn.Conv2d)]
    assert [(b.dilation, b.padding) for b in own] == [((r, r), (r, r)) for r in RATES[:branches]]
    with torch.no_grad():
        for branch in own:
            before = net(image)
            branch.weight += 0.1
            assert (net(image) - before).abs().max() > 1e-3


def test_deeplabv2_is_not_released_by_default() -> None:
    net, image = segnet(**NARROW), images(1, 3, 45, 70)
    assert net.multiple == net.stride == 8
    assert all(p.requires_grad for p in net.parameters())
    assert torch.allclose(net.normalise.mean.flatten(), torch.tensor([0.485, 0.456, 0.406]))
    with torch.no_grad():
        small = net.classify(net.fuse(net.encode(image)))
        assert small.shape == (1, 5, 6, 9)
        expected = F.interpolate(small, scale_factor=8, mode="bilinear", align_corners=False)[..., :45, :70]
        torch.testing.assert_close(net(image), expected)


@pytest.mark.parametrize("size", [(1, 33), (45, 70), (64, 64)])
def test_the_released_network_does_not_pad(size: tuple[int, int]) -> None:
    net = segnet(**NARROW, options={"released": True})
    with torch.no_grad():
        maps = net.encode(images(1, 3, *size))
        halved: tuple[int, ...] = size
        for m, ceil in zip(maps[:3], (False, True, False), strict=True):
            halved = tuple((side + 1 + ceil * (side % 2 == 0)) // 2 for side in halved)
            assert m.shape[2:] == halved
        logits = net.classify(net.fuse(maps))
        expected = F.interpolate(logits, size=size, mode="bilinear", align_corners=True)
        assert torch.equal(net(images(1, 3, *size)), expected)


@pytest.mark.parametrize("optim", ["sgd", "adamw"])
def test_the_released_norms_count_on_but_do_not_learn(optim: str) -> None:
    made = build(**NARROW, options={"released": True}, optim={"name": optim, "lr": 0.1, "weight_decay": 0.5})
    net = made.network().train()
    assert isinstance(net, SegNet)
    optimizer, before = made.optimizer(net), copy.deepcopy(net.state_dict())
    for _ in range(2):
        optimizer.zero_grad()
        net(images(2, 3, 48, 48)).square().mean().backward()
        optimizer.step()
    norms = {name for name, module in net.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert len(norms) == 1 + 6 * 3 + 4
    for name, tensor in net.state_dict().items():
        module, _, part = name.rpartition(".")
        still = name.startswith("normalise.") or (module in norms and part in ("weight", "bias"))
        assert torch.equal(tensor, before[name]) == still, name


@pytest.mark.parametrize(
    ("prefix", "wrapped", "how"),
    [
        ("", None, {}),
        ("module.", "state_dict", {}),
        ("Scale.", None, {"_use_new_zipfile_serialization": False}),
        ("module.Scale.", "model", {"_use_new_zipfile_serialization": False}),
        ("Scale.", None, {"_use_new_zipfile_serialization": False, "pickle_module": PYTHON2}),
    ],
    ids=["zip", "wrapped", "legacy", "wrapped-legacy", "python2"],
)
def test_published_files_load_completely(tmp_path: Path, prefix: str, wrapped: str | None, how: dict[str, Any]) -> None:
    published, file = narrow(), tmp_path / "w.pth"
    tensors = {prefix + name: tensor for name, tensor in published.tensors.items()}
    tensors |= {f"{prefix}bn1.num_batches_tracked": torch.tensor(3)}
    torch.save({wrapped: tensors, "epoch": 3, "optimizer": {}} if wrapped else tensors, file, **how)
    made = build(**NARROW | {"weights": "w.pth"}, base=tmp_path, options={"released": True})
    net = made.network().eval()
    total = len(published.tensors)
    assert made.report == [f"{file}: {total} of the encoder and head's {total} tensors loaded"]
    image = images(2, 3, 48, 40)
    with torch.no_grad():
        alike(net(image), published(image))


def test_published_weights_with_two_branches(tmp_path: Path) -> None:
    published = narrow()
    torch.save(published.tensors, tmp_path / "w.pth")
    made = build(**NARROW | {"weights": "w.pth"}, base=tmp_path, options={"released": True, "branches": 2})
    net, total = made.network().eval(), len(published.tensors) - 4
    assert made.report[0].endswith(f": {total} of the encoder and head's {total} tensors loaded")
    assert made.report[1] == (
        "  in the file, not used by the encoder and head: layer5.conv2d_list.2.weight, layer5.conv2d_list.2.bias, "
        "layer5.conv2d_list.3.weight and 1 more"
    )
    image = images(1, 3, 48, 40)
    with torch.no_grad():
        alike(net(image), published(image, branches=2))


def test_published_weights_of_other_classes(tmp_path: Path) -> None:
    """COCO's 21 classes, say, as the start for one's own five."""
    options = NARROW["encoder_options"]
    published = Published(tuple(options["layers"]), tuple(options["channels"]), 21)
    torch.save(published.tensors, tmp_path / "w.pth")
    made = build(**NARROW | {"weights": "w.pth"}, base=tmp_path, options={"released": True})
    net, random = made.network(), build(**NARROW, options={"released": True}).network()
    assert isinstance(net, SegNet)
    assert isinstance(random, SegNet)
    total = len(published.tensors)
    assert made.report[0].endswith(f": {total - 8} of the encoder and head's {total} tensors loaded")
    assert made.report[1] == (
        "  left random, of another shape: layer5.conv2d_list.0.weight (21, 96, 3, 3) for (5, 96, 3, 3), "
        "layer5.conv2d_list.0.bias (21,) for (5,), layer5.conv2d_list.1.weight (21, 96, 3, 3) for (5, 96, 3, 3) "
        "and 5 more"
    )
    assert same(net.head, random.head)
    first = net.encoder.get_parameter("model.conv1.weight")
    assert torch.equal(first, published.tensors["conv1.weight"])


def test_timms_weights_in_the_released_dialect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {k: v for k, v in narrow().tensors.items() if not k.startswith("layer5.")}
    save_file(tensors, tmp_path / "w.safetensors")
    made = build(**NARROW | {"weights": "w.safetensors"}, base=tmp_path)
    net = made.network()
    assert isinstance(net, SegNet)
    assert torch.equal(net.encoder.get_parameter("model.conv1.weight"), tensors["conv1.weight"])
    assert made.report[1].startswith("  left random, not in the file: layer5.conv2d_list.0.weight, layer5.")
    assert len(made.report) == 2
    monkeypatch.setattr(factory, "_download", lambda _: tensors)
    made = build(**NARROW | {"weights": "pretrained"}, options={"released": True})
    net = made.network()
    assert isinstance(net, SegNet)
    assert made.report == [f"timm's resnet26: {len(tensors)} of the encoder's {len(tensors)} tensors loaded"]
    assert torch.allclose(net.normalise.mean.flatten(), torch.tensor([0.485, 0.456, 0.406])), (
        "what they were trained with"
    )


def test_mean_and_spread_of_the_published_weights() -> None:
    normalise = segnet(**NARROW, options={"released": True}).normalise
    red = torch.tensor([200.0, 100.0, 50.0]).view(1, 3, 1, 1).to(torch.uint8)
    assert normalise(red).flatten().tolist() == pytest.approx([77.321, -16.669, -54.007], abs=2e-3)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"options": {"branches": 5}}, r"branches is 5, but it should be 1 to 4"),
        ({"options": {"branches": 0}}, r"branches is 0, but it should be 1 to 4"),
        ({"options": {"branches": "two"}}, r"branches is two, but it should be 1 to 4"),
        (
            {"options": {"released": True}, "encoder": "resnet18", "encoder_options": {}},
            r"released is for a whole ResNet with bottlenecks, such as resnet101",
        ),
        ({"options": {"released": True, "encoder_depth": 4}}, r"released is for a whole ResNet with bottlenecks"),
    ],
)
def test_wrong_options_of_deeplabv2(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=rf"^network\.options: {reason}"):
        build(**NARROW | options).network()


# ---- another run -----------------------------------------------------------------------------------------------------

NAMES = ("sky", "tree", "road", "car", "wall")
STARTED: dict[str, dict[str, Any]] = {
    **{name: {"name": name} for name in ("deeplabv3plus", *DECODERS)},
    "deeplabv2": NARROW,
    "released": NARROW | {"options": {"released": True}},
}


def named(names: tuple[str, ...], base: Path | None = None, channels: int = 3, seed: int = 0, **options: Any) -> Build:
    config = NetworkConfig(**(TINY | options))
    return Build(len(names), channels, config, OptimConfig(), seed=seed, base=base, names=names)


def trained(run: Path, **options: Any) -> SegNet | Wrapped:
    """A network of NAMES, every tensor of it moved, and its model as a run writes it."""
    made = named(NAMES, run.parent, seed=5, **options)
    net, draw = made.network().eval(), torch.Generator().manual_seed(1)
    for tensor in net.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(0.1 * torch.rand(tensor.shape, generator=draw))
    card = {"network": made.config.model_dump(mode="json"), "classes": list(NAMES), "channels": made.channels}
    save_model(run / "model", net.state_dict(), card)
    return net


def started(made: Build) -> SegNet:
    net = made.network()
    assert isinstance(net, SegNet)
    return net.eval()


@pytest.mark.parametrize("name", STARTED)
def test_a_run_with_the_same_classes_is_taken_whole(tmp_path: Path, name: str) -> None:
    other = trained(tmp_path / "run", **STARTED[name])
    for weights in ("run", "run/model"):
        made = named(NAMES, tmp_path, **STARTED[name] | {"weights": weights})
        assert same(started(made), other)
        assert made.report[:2] == [
            f"{tmp_path / weights}: the whole network loaded",
            "  classes with the same name: sky, tree, road, car, wall",
        ]
        assert len(made.report) == 4


@pytest.mark.parametrize("name", STARTED)
def test_classes_in_another_order_are_logits_in_another_order(tmp_path: Path, name: str) -> None:
    other, image, order = trained(tmp_path / "run", **STARTED[name]), images(2, 3, 48, 40), [3, 0, 4, 2, 1]
    shuffled = tuple(NAMES[i] for i in order)
    net = started(named(shuffled, tmp_path, **STARTED[name] | {"weights": "run"}))
    with torch.no_grad():
        logits = net(image)
        torch.testing.assert_close(logits, other(image)[:, order])
    assert not torch.allclose(logits, logits[:, order]), "as many classes, but no two alike"


@pytest.mark.parametrize("name", STARTED)
def test_classes_are_matched_by_their_names(tmp_path: Path, name: str) -> None:
    """Of road, bus, Sky and tree two have a row; the others start as they would without that run."""
    other, image = trained(tmp_path / "run", **STARTED[name]), images(2, 3, 48, 40)
    here = ("road", "bus", "Sky", "tree")
    made = named(here, tmp_path, seed=3, **STARTED[name] | {"weights": "run"})
    net, random = started(made), started(named(here, seed=3, **STARTED[name]))
    with torch.no_grad():
        torch.testing.assert_close(net(image)[:, [0, 3]], other(image)[:, [2, 1]])
    pairs = zip(net.head.state_dict().values(), random.head.state_dict().values(), strict=True)
    assert all(torch.equal(a[[1, 2]], b[[1, 2]]) for a, b in pairs)
    assert made.report[1:4] == [
        "  classes with the same name: road, tree",
        "  new classes, whose rows of the last layer are left random: bus, Sky",
        "  classes of that run that are not used: sky, car, wall",
    ]
    assert all(p.requires_grad == q.requires_grad for p, q in zip(net.parameters(), random.parameters(), strict=True))


def test_rows_by_hand(tmp_path: Path) -> None:
    """Where the row of class i holds the number i, a new network's rows tell where they come from."""
    other = trained(tmp_path / "run", name="fpn")
    assert isinstance(other, SegNet)
    with torch.no_grad():
        for tensor in other.head.state_dict().values():
            tensor.copy_(torch.arange(5).view(5, *[1] * (tensor.ndim - 1)).expand_as(tensor))
    save_model(tmp_path / "run" / "model", other.state_dict(), read_model(tmp_path / "run" / "model")[1])
    net = started(named(("wall", "lake", "tree"), tmp_path, name="fpn", weights="run"))
    weight, bias = net.head.get_parameter("weight"), net.head.get_parameter("bias")
    assert [weight[row].unique().tolist() for row in (0, 2)] == [[4.0], [1.0]]
    assert bias.tolist() == [4.0, 0.0, 1.0], "smp's own biases are zero"
    assert weight[1].std() > 0


def test_no_class_with_the_same_name(tmp_path: Path) -> None:
    other = trained(tmp_path / "run", name="fpn")
    made = named(("a", "b"), tmp_path, name="fpn", weights="run")
    net, random = started(made), started(named(("a", "b"), name="fpn"))
    assert isinstance(other, SegNet)
    assert same(net.encoder, other.encoder)
    assert same(net.decoder, other.decoder)
    assert same(net.head, random.head)
    assert made.report[1:4] == [
        "  no class has the same name",
        "  new classes, whose rows of the last layer are left random: a, b",
        "  classes of that run that are not used: sky, tree, road, car, wall",
    ]


def test_what_every_method_delivers_starts_from_the_run(tmp_path: Path) -> None:
    other = trained(tmp_path / "run", name="fpn")
    kinds: list[Any] = [kind for kind in METHODS.values() if issubclass(kind, StepMethod)]
    for kind in kinds:
        method = kind(kind.Config(), named(NAMES, tmp_path, name="fpn", weights="run"))
        assert same(method.predictor(), other), kind
        parts = dict(method.named_children())
        assert "teacher" not in parts or same(parts["teacher"], parts["student"]), kind


def test_mean_and_spread_of_a_run(tmp_path: Path) -> None:
    trained(tmp_path / "run", name="fpn", mean=0.5, std=(0.1, 0.2, 0.3))
    moved = read_model(tmp_path / "run" / "model")[0]
    made = named(NAMES, tmp_path, name="fpn", weights="run")
    net = started(made)
    assert torch.equal(net.normalise.mean, moved["normalise.mean"])
    assert torch.equal(net.normalise.std, moved["normalise.std"])
    said = {
        name: ", ".join(f"{n:.4g}" for n in moved[f"normalise.{name}"].flatten().tolist()) for name in ("mean", "std")
    }
    assert made.report[-2:] == [f"  {name} of images: {numbers}, of that run" for name, numbers in said.items()]
    made = named(NAMES, tmp_path, name="fpn", weights="run", mean=0.25)
    net = started(made)
    assert net.normalise.mean.flatten().tolist() == [0.25] * 3
    assert torch.equal(net.normalise.std, moved["normalise.std"])
    assert made.report[-2:] == [
        "  mean of images: 0.25, 0.25, 0.25, from network.mean",
        f"  std of images: {said['std']}, of that run",
    ]


def test_the_tag_of_an_encoder_and_how_it_learned_make_no_other_network(tmp_path: Path) -> None:
    other = trained(tmp_path / "run", name="fpn", encoder="test_resnet.r160_in1k", checkpointing=True)
    assert same(started(named(NAMES, tmp_path, name="fpn", weights="run", frozen_norm="all")), other)


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        ({"name": "unet", "options": {}}, "network.name=fpn, this recipe network.name=unet"),
        ({"encoder": "test_convnext"}, "network.encoder=test_resnet, this recipe network.encoder=test_convnext"),
        (
            {"options": {"decoder_dropout": 0.2}},
            "network.options.decoder_dropout=0.1, this recipe network.options.decoder_dropout=0.2",
        ),
        (
            {"options": {"decoder_dropout": 0.1, "decoder_merge_policy": "cat"}},
            "no network.options.decoder_merge_policy, this recipe network.options.decoder_merge_policy=cat",
        ),
        (
            {"encoder_options": {}},
            "network.encoder_options.drop_path_rate=0.1, this recipe no network.encoder_options.drop_path_rate",
        ),
    ],
)
def test_a_run_of_another_network(tmp_path: Path, changed: dict[str, Any], difference: str) -> None:
    known = {"name": "fpn", "options": {"decoder_dropout": 0.1}, "encoder_options": {"drop_path_rate": 0.1}}
    other = trained(tmp_path / "run", **known)
    assert same(started(named(NAMES, tmp_path, **known, weights="run")), other)
    with pytest.raises(InputError) as refused:
        named(NAMES, tmp_path, **known | changed, weights="run").network()
    run = tmp_path / "run"
    then = "make the network that one, or name another run."
    assert str(refused.value) == f"network.weights: {run} has {difference}: {then}"


def test_a_run_on_other_images_or_of_other_tensors(tmp_path: Path) -> None:
    trained(tmp_path / "run", name="fpn")
    with pytest.raises(
        InputError, match=r"run is for images of 3 channels, but data\.channels is 4: name a run on images"
    ):
        named(NAMES, tmp_path, channels=4, name="fpn", weights="run").network()
    tensors, card = read_model(tmp_path / "run" / "model")
    save_model(tmp_path / "run" / "model", {k: v for k, v in tensors.items() if k != "head.bias"}, card)
    with pytest.raises(InputError, match=r"run holds another network \(head\.bias differ\): name a run of this one"):
        named(NAMES, tmp_path, name="fpn", weights="run").network()


def test_where_a_run_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = [tmp_path / name for name in ("beside", "working", "shared")]
    for place in places:
        (place / "run" / "model").mkdir(parents=True)
        (place / "run" / "model" / "model.json").touch()
    monkeypatch.chdir(places[1])
    monkeypatch.setenv("SEMISEG_DATA", str(places[2]))
    for place in places:
        assert find_weights("run", places[0]) == place / "run"
        (place / "run" / "model" / "model.json").unlink()
        (place / "run" / "model").rmdir()
        (place / "run").rmdir()
    looked = " and ".join(map(str, places))
    with pytest.raises(InputError, match=re.escape(f"run is not there (looked for in {looked}); correct")):
        find_weights("run", places[0])
    assert find_weights("run", places[0], begun=str(places[1] / "run")) == places[1] / "run", "what is gone since"


# ---- heads -----------------------------------------------------------------------------------------------------------

VIEWED: dict[str, dict[str, Any]] = {
    "fpn": {"name": "fpn"},
    "unet": {"name": "unet"},
    "deeplabv2": NARROW,
    "released": NARROW | {"options": {"released": True}},
}


def projected(name: str, auxiliary: bool = False) -> Projected:
    return build(**VIEWED[name]).projected(8, auxiliary=auxiliary).eval()


@pytest.mark.parametrize("size", [(64, 96), (45, 70), (1, 33)])
@pytest.mark.parametrize("name", VIEWED)
def test_what_a_projected_network_sees(name: str, size: tuple[int, int]) -> None:
    model, image = projected(name, auxiliary=True), images(2, 3, *size)
    with torch.no_grad():
        views = model(image)
        assert torch.equal(views.logits, model.net(image))
        small = model.net.classify(model.net.fuse(model.net.encode(image)))
    if name == "unet":
        small = small.unflatten(3, (-1, 4)).mean(4).unflatten(2, (-1, 4)).mean(3)
    torch.testing.assert_close(views.small, small)
    assert views.features.shape == (2, 8, *small.shape[2:])
    assert views.auxiliary is not None
    assert views.auxiliary.shape == (2, 5, *size)
    assert {t.dtype for t in (views.logits, views.features, views.auxiliary)} == {torch.float32}


@pytest.mark.parametrize(("name", "stride"), [("fpn", 4), ("unet", 4), ("deeplabv2", 8), ("released", 8)])
def test_strides_of_features(name: str, stride: int) -> None:
    model = projected(name)
    assert model.stride == stride
    assert model.net.stride == (1 if name == "unet" else stride)
    assert model(images(1, 3, 64, 64)).auxiliary is None


@pytest.mark.parametrize("size", [(64, 96), (45, 70), (1, 33), (41, 49)])
@pytest.mark.parametrize("name", VIEWED)
def test_every_feature_picks_the_pixel_in_its_middle(name: str, size: tuple[int, int]) -> None:
    model = projected(name)
    rows, columns = torch.meshgrid(*map(torch.arange, size), indexing="ij")
    with torch.no_grad():
        small = model(images(1, 3, *size)).small
    first = 0 if name == "released" else model.stride // 2
    picked = model.pick((1000 * rows + columns).unsqueeze(0), small, -1)
    inside = model.pick(torch.ones(1, *size).bool(), small, False)
    assert picked.shape == inside.shape == (1, *small.shape[2:])
    assert inside.dtype == torch.bool
    for (_, i, j), number in np.ndenumerate(picked.numpy()):
        y, x = i * model.stride + first, j * model.stride + first
        there = y < size[0] and x < size[1]
        assert number == (1000 * y + x if there else -1)
        assert bool(inside[0, i, j]) == there


def test_gradients_of_heads() -> None:
    """The projection learns through the whole network, the auxiliary classifier through all but the last stage."""
    model = projected("fpn", auxiliary=True).train()
    views = model(images(2, 3, 45, 70))
    views.auxiliary.square().sum().backward(retain_graph=True)
    stages = model.net.encoder.get_submodule("model")
    assert all(p.grad is None for p in (*stages.get_submodule("layer4").parameters(), *model.projection.parameters()))
    assert all(p.grad is not None for p in stages.get_submodule("layer3").parameters())
    views.features.square().sum().backward()
    assert all(p.grad is not None for p in stages.parameters())
    assert all(p.grad is not None for p in model.projection.parameters())
    assert all(p.grad is None for p in model.net.head.parameters())


def test_layers_of_a_head() -> None:
    head = Head(6, 8, 5, 2, None)
    convolutions = [layer for layer in head.layers if isinstance(layer, nn.Conv2d)]
    assert [tuple(conv.weight.shape) for conv in convolutions] == [(8, 6, 3, 3), (8, 8, 3, 3), (5, 8, 1, 1)]
    assert [conv.bias is not None for conv in convolutions] == [False, False, True]
    assert [type(layer).__name__ for layer in head.layers[:4]] == ["Conv2d", "BatchNorm2d", "ReLU", "Dropout2d"]
    maps = torch.randn(2, 6, 9, 7, generator=torch.Generator().manual_seed(0))
    exact = head.eval()(maps)
    head.precision = torch.bfloat16
    rough = head(maps)
    assert rough.shape == (2, 5, 9, 7)
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().max() < 0.1 * exact.abs().max()
    assert head.double()(maps.double()).dtype == torch.float64


def test_heads_are_drawn_from_seed_and_salt() -> None:
    state = torch.get_rng_state()
    made = build(name="fpn").projected(8, auxiliary=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(made, build(name="fpn").projected(8, auxiliary=True))
    assert same(made.net, build(name="fpn").network())
    assert same(made.projection, build(name="fpn").projected(8).projection)
    assert not same(made.projection, build(seed=1, name="fpn").projected(8).projection)
    assert not same(made.projection, build(name="fpn").projected(8, salt=3).projection)
    assert {id(p) for p in made.parameters()} == {
        id(p)
        for group in build()
        .optimizer(made.net, [part for part in made.children() if part is not made.net])
        .param_groups
        for p in group["params"]
    }


# ---- critic ----------------------------------------------------------------------------------------------------------


def probabilities(classes: int, *size: int) -> Tensor:
    return torch.randn(2, classes, *size, generator=torch.Generator().manual_seed(0)).softmax(1)


@pytest.mark.parametrize(
    ("size", "sides"),
    [
        ((321, 321), [(160, 160), (80, 80), (40, 40), (20, 20), (10, 10)]),
        ((512, 1024), [(256, 512), (128, 256), (64, 128), (32, 64), (16, 32)]),
    ],
)
def test_sides_of_the_critics_maps(size: tuple[int, int], sides: list[tuple[int, int]]) -> None:
    x, found = torch.empty(1, 21, *size, device="meta"), []
    for layer in Critic(21).to("meta").layers:
        x = layer(x)
        if isinstance(layer, nn.Conv2d):
            found.append(tuple(x.shape[2:]))
    assert found == sides


@pytest.mark.parametrize(("classes", "weights"), [(21, 2_783_169), (19, 2_781_121)])
def test_weights_of_the_critic(classes: int, weights: int) -> None:
    assert sum(p.numel() for p in Critic(classes).parameters()) == weights


def test_an_answer_sees_94_px() -> None:
    critic = Critic(1)
    with torch.no_grad():
        for p in critic.parameters():
            p.fill_(1 / p.numel())
    image = torch.ones(1, 1, 224, 32, requires_grad=True)
    critic.layers(image)[0, 0, 3, 0].backward()
    assert image.grad is not None
    assert int((image.grad[0, 0] > 0).any(1).sum()) == 94


def test_the_critic_by_hand() -> None:
    """Five convolutions, no normalisation, a leak of 0.2, and a map as large as the image."""
    critic, probs = Critic(5).double(), probabilities(5, 70, 96).double()
    x = probs
    convolutions = [layer for layer in critic.layers if isinstance(layer, nn.Conv2d)]
    for i, conv in enumerate(convolutions):
        x = F.conv2d(F.pad(x, (1, 1, 1, 1)), conv.weight, conv.bias, stride=2)
        x = x if i == 4 else torch.where(x > 0, x, 0.2 * x)
    assert x.shape == (2, 1, 2, 3)
    expected = F.interpolate(x, size=(70, 96), mode="bilinear", align_corners=False)
    answer = critic(probs)
    assert answer.dtype == torch.float64
    torch.testing.assert_close(answer, expected)
    critic.kind = "image"
    means = x.mean((1, 2, 3)).view(2, 1, 1, 1)
    torch.testing.assert_close(critic(probs), means.expand(2, 1, 70, 96))


def test_the_critic_sees_small_crops_enlarged() -> None:
    critic, probs = Critic(5, scale=2.5), probabilities(5, 20, 26)
    enlarged = F.interpolate(probs, size=(50, 65), mode="bilinear", align_corners=False)
    expected = F.interpolate(critic.layers(enlarged), size=(20, 26), mode="bilinear", align_corners=False)
    assert torch.equal(critic(probs), expected)


def test_a_critic_in_bfloat16() -> None:
    critic, probs = Critic(5, precision=torch.bfloat16), probabilities(5, 40, 40).requires_grad_()
    rough = critic(probs)
    rough.square().sum().backward()
    assert rough.dtype == torch.float32
    assert probs.grad is not None
    assert probs.grad.dtype == torch.float32
    critic.precision = None
    exact = critic(probs)
    assert 0 < (rough - exact).abs().max() < 0.1 * exact.abs().max()
    critic.precision = torch.bfloat16
    assert critic.double()(probs.double()).dtype == torch.float64


@pytest.mark.parametrize(
    ("size", "scale", "expected"),
    [
        ((16, 40), 1.0, r"16x40 px, times method\.critic_scale=1, are .* the 32 px .*, or method\.critic_scale=2\.$"),
        ((31, 31), 1.0, r"31x31 px, times method\.critic_scale=1, are .*, or method\.critic_scale=2\.$"),
        ((48, 48), 0.5, r"48x48 px, times method\.critic_scale=0\.5, are .*, or method\.critic_scale=1\.$"),
        ((5, 32), 2.0, r"5x32 px, times method\.critic_scale=2, are .*, or method\.critic_scale=7\.$"),
    ],
)
def test_a_crop_too_small_for_the_critic(size: tuple[int, int], scale: float, expected: str) -> None:
    with pytest.raises(InputError, match=r"^train\.crop: " + expected) as refused:
        Critic(3, scale=scale)(probabilities(3, *size))
    advised = float(str(refused.value).rpartition("=")[2].rstrip("."))
    assert Critic(3, scale=advised)(probabilities(3, *size)).shape == (2, 1, *size)


def test_a_critic_of_other_classes() -> None:
    expected = (
        r"^The network gives 3 classes where the data, and so the critic, has 5: correct the one that network\.name"
    )
    with pytest.raises(InputError, match=expected):
        Critic(5)(probabilities(3, 64, 64))


def test_a_critic_is_drawn_from_seed_and_salt() -> None:
    state = torch.get_rng_state()
    critic = build().critic()
    assert torch.equal(torch.get_rng_state(), state)
    assert same(critic, build().critic())
    assert not same(critic, build(seed=1).critic())
    assert not same(critic, build().critic(salt=2))
    other = Build(5, 3, NetworkConfig(**TINY), OptimConfig(), channels_last=True, precision=torch.bfloat16)
    made = other.critic("image", 1.5)
    assert (made.kind, made.scale, made.precision, made.classes) == ("image", 1.5, torch.bfloat16, 5)
    assert made.get_parameter("layers.2.weight").is_contiguous(memory_format=torch.channels_last)


# ---- seeds, options, optimisers --------------------------------------------------------------------------------------


def test_initial_weights_depend_on_seed_and_salt_alone() -> None:
    torch.manual_seed(1)
    first, state = build().network(), torch.get_rng_state()
    torch.rand(5)
    assert same(first, build().network())
    assert not same(first, build().network(1))
    assert not same(first, build(seed=1).network())
    assert not same(build(seed=1).network(), build().network(1))
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state), "the process' random numbers go on as if nothing was drawn"


def test_unknown_names_say_what_they_may_have_meant() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"name": "deeplab3plus"}, r"network.name: deeplab3plus is unknown; did you mean deeplabv3plus"),
        ({"encoder": "resnet5O"}, r"network.encoder: resnet5O is unknown; did you mean resnet5"),
        ({"encoder": "test_resnet.nope"}, r"network.encoder: test_resnet.nope is unknown; did you mean test_resnet"),
        (
            {"options": {"decoder_chanels": 8}},
            r"network.options of deeplabv3plus: decoder_chanels is unknown; did you mean",
        ),
        ({"options": {"classes": 8}}, r"network.options of deeplabv3plus: classes is unknown"),
        ({"encoder_options": {"pad_typ": 1}}, r"network.encoder_options: test_resnet has no pad_typ; remove it."),
        (
            {"encoder_options": {"encoder_depth": 3}},
            r"encoder_depth is no option of an encoder; set it in network.options",
        ),
        ({"name": "fpn", "encoder": "test_vit"}, r"fpn cannot be built on test_vit \(Unsupported model downsampling"),
        ({"name": "fpn", "encoder_options": {"output_stride": 16}}, r"fpn on test_resnet takes no images of free size"),
    ]
    for options, message in cases:
        with pytest.raises(InputError, match=message):
            build(**options).network()
    with pytest.raises(ValidationError):
        NetworkConfig(encodr="resnet50")  # type: ignore[call-arg]
    with pytest.raises(ValidationError):
        OptimConfig(lr=-1)


def test_options_reach_encoder_and_decoder() -> None:
    net = segnet(options={"decoder_channels": 64, "encoder_output_stride": 8}, encoder_options={"drop_path_rate": 0.5})
    assert net.width == 64
    assert net.multiple == 8


def test_optimizer_groups() -> None:
    net, head = segnet(), nn.Linear(2, 2)
    made = build(optim={"lr": 0.01, "head_lr": 5})
    first, rest = made.optimizer(net, extra=[head]).param_groups
    assert first["peak_lr"] == first["lr"] == 0.01
    assert rest["peak_lr"] == rest["lr"] == pytest.approx(0.05)
    assert {id(p) for p in first["params"]} == {id(p) for p in net.encoder.parameters()}
    assert len(first["params"]) + len(rest["params"]) == len(list(net.parameters())) + 2
    (only,) = made.optimizer(nn.Conv2d(1, 1, 1)).param_groups
    assert only["peak_lr"] == 0.01


@pytest.mark.parametrize(
    ("encoder", "blocks"),
    [("resnet18", 9), ("mobilenetv2_100", 18), ("regnetx_002", 14), ("convnext_atto", 13), ("test_resnet", 5)],
)
def test_rates_of_blocks(encoder: str, blocks: int) -> None:
    """From the stem on, each block at three quarters of the next one's rate, the last at three quarters of lr."""
    config = NetworkConfig(name="fpn", encoder=encoder, weights="random")
    build = Build(3, 3, config, OptimConfig(lr=0.01, layer_decay=0.75))
    net = build.network()
    optimizer = build.optimizer(net)
    *found, rest = optimizer.param_groups
    assert len(found) == blocks
    assert [group["peak_lr"] for group in found] == pytest.approx([0.01 * 0.75 ** (blocks - i) for i in range(blocks)])
    assert rest["peak_lr"] == pytest.approx(0.1)
    assert sum(len(group["params"]) for group in found) == len(list(net.encoder.parameters()))
    first, last = (next(iter(net.encoder.parameters())), list(net.encoder.parameters())[-1])
    assert any(first is weight for weight in found[0]["params"])
    assert any(last is weight for weight in found[-1]["params"])


def test_rates_of_a_transformers_blocks() -> None:
    """The tokens' last norm belongs to the last block, positions to the stem; also without a classifier in timm."""
    tiny = {"embed_dim": 32, "depth": 4, "num_heads": 2, "img_size": 56}
    config = NetworkConfig(name="dpt", encoder="vit_small_patch14_dinov2", weights="random", encoder_options=tiny)
    net = (made := Build(3, 3, config, OptimConfig(lr=0.01, layer_decay=0.5))).parts()
    rates = {id(w): group["peak_lr"] for group in made.optimizer(net).param_groups for w in group["params"]}
    model, depth = net.encoder.model, len(net.encoder.model.blocks)
    assert rates[id(model.norm.weight)] == pytest.approx(0.005)
    assert [rates[id(block.attn.qkv.weight)] for block in model.blocks] == pytest.approx(
        [0.01 * 0.5 ** (depth - i) for i in range(depth)]
    )
    assert (
        rates[id(model.pos_embed)]
        == rates[id(model.patch_embed.proj.weight)]
        == pytest.approx(0.01 * 0.5 ** (depth + 1))
    )


def test_rates_of_blocks_that_nobody_knows(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "from torch import nn\ndef net(channels, classes): return nn.Conv2d(3, classes, 1)\n"
    )
    own = Build(3, 3, NetworkConfig(name="own.py:net"), OptimConfig(layer_decay=0.5), base=tmp_path)
    with pytest.raises(InputError, match=r"^optim\.layer_decay: timm does not tell the layers of own\.py:net"):
        own.optimizer(own.network())


@pytest.mark.parametrize(("encoder", "millions"), [("resnet50", 26.68), ("resnet101", 45.67)])
def test_parameters_of_deeplabv3plus(encoder: str, millions: float) -> None:
    """Separable convolutions, as segmentation_models_pytorch has: 13.8 M fewer than papers' (methods.md, case 52)."""
    import segmentation_models_pytorch as smp

    with torch.device("meta"):
        net = smp.DeepLabV3Plus(f"tu-{encoder}", encoder_weights=None, classes=21)
    assert sum(weight.numel() for weight in net.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_optimizers_step_as_torch_says(name: str) -> None:
    made = build(optim={"name": name, "lr": 0.1, "weight_decay": 0.2, "momentum": 0.8})
    one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    two.load_state_dict(one.state_dict())
    plain: torch.optim.Optimizer = (
        torch.optim.AdamW(two.parameters(), 0.1, weight_decay=0.2)
        if name == "adamw"
        else torch.optim.SGD(two.parameters(), 0.1, momentum=0.8, weight_decay=0.2)
    )
    for net, optimizer in ((one, made.optimizer(one)), (two, plain)):
        for _ in range(3):
            optimizer.zero_grad()
            net(torch.ones(1, 2)).square().sum().backward()
            optimizer.step()
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_rate() -> None:
    assert OptimConfig().rate(0) == 1
    assert OptimConfig().rate(1) == 0
    assert OptimConfig().rate(0.5) == pytest.approx(0.5**0.9)
    assert OptimConfig(power=0).rate(0.7) == 1


# ---- a class of one's own --------------------------------------------------------------------------------------------

OWN = """
import segmentation_models_pytorch as smp
from torch import nn

class Small(nn.Module):
    def __init__(self, channels, classes, width=8):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(channels, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, classes, 1))
    def forward(self, image):
        return self.body(image)

class Wrong(Small):
    def forward(self, image):
        return [self.body(image)]

def parts(channels, classes):
    return smp.FPN("tu-test_resnet", encoder_weights=None, in_channels=channels, classes=classes)

def nothing(channels, classes):
    return None
"""


def test_a_class_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    made = build(base=tmp_path, name="own.py:Small", options={"width": 6}, mean=0.5)
    net = made.network()
    assert isinstance(net, Wrapped)
    assert net(images(2, 3, 45, 70)).shape == (2, 5, 45, 70)
    assert same(net, made.network())
    assert made.report == ["own.py:Small starts from the weights that it makes itself"]
    net.precision = torch.bfloat16
    assert net(images(1, 3, 45, 70)).dtype == torch.float32
    image = images(1, 3, 44, 70)
    with torch.no_grad():
        net.precision = None
        expected = F.interpolate(net.model(image / 127.5 - 0.5 / 0.5), size=(44, 70), mode="bilinear")
        net.normalise.std.fill_(0.5)
        torch.testing.assert_close(net(image), expected)
    assert isinstance(build(base=tmp_path, name="own.py:parts").network(), SegNet)


def test_wrong_classes_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "broken.py").write_text("import nothing_of_that_name")
    cases = {
        "own.py:Smal": r"own.py:Smal: own.py has no Smal; did you mean Small",
        "own.py:nothing": r"own.py:nothing must make a torch.nn.Module, not NoneType",
        "absent.py:Net": r"absent.py does not exist",
        "broken.py:Net": r"broken.py cannot be imported \(ModuleNotFoundError: ",
        "absent_package.mod:Net": r"absent_package.mod cannot be imported",
    }
    for name, message in cases.items():
        with pytest.raises(InputError, match=message):
            build(base=tmp_path, name=name).network()
    with pytest.raises(InputError, match=r"forward of Wrong must return logits \(B, 5, h, w\), not list"):
        build(base=tmp_path, name="own.py:Wrong").network()(images(1, 3, 32, 32))
    with pytest.raises(InputError, match=r"network\.name: own.py:Small is one piece, and the method needs encode"):
        build(base=tmp_path, name="own.py:Small").projected(8)
    assert build(base=tmp_path, name="own.py:parts").projected(8).stride == 4
    (tmp_path / "w.safetensors").touch()
    with pytest.raises(InputError, match=r"own.py:Small loads its own weights: name a run of it, or leave the option"):
        build(base=tmp_path, name="own.py:Small", weights="w.safetensors").network()


def test_a_class_of_ones_own_from_a_run_of_it(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    small: dict[str, Any] = {"name": "own.py:Small", "options": {"width": 6}}
    other = trained(tmp_path / "run", **small)
    made = named(NAMES, tmp_path, **small, weights="run")
    assert same(made.network(), other)
    assert made.report[0] == f"{tmp_path / 'run'}: the whole network loaded"
    with pytest.raises(
        InputError, match=r"run has other classes, and nothing tells the last layer of a network of your"
    ):
        named(NAMES[::-1], tmp_path, **small, weights="run").network()
    with pytest.raises(InputError, match=r"has network\.options\.width=6, this recipe no network\.options\.width"):
        named(NAMES, tmp_path, name="own.py:Small", weights="run").network()
    parts = trained(tmp_path / "parts", name="own.py:parts")
    assert isinstance(parts, SegNet)
    reversed_ = started(named(NAMES[::-1], tmp_path, name="own.py:parts", weights="parts"))
    assert torch.equal(reversed_.head.get_parameter("weight"), parts.head.get_parameter("weight").flip(0))


def test_load_object(tmp_path: Path) -> None:
    assert load_object("pathlib:Path", None) is Path
    file = tmp_path / "own.py"
    file.write_text("VALUE = 1\n")
    assert load_object("own.py:VALUE", tmp_path) == 1
    assert load_object(f"{file}:VALUE", None) == 1
    file.write_text("VALUE = 2\n")
    assert load_object("own.py:VALUE", tmp_path) == 2, "an edited file is read again"
