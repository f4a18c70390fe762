"""Networks: the three parts against smp's own, images of every kind and size, weights, seeds, and wrong input."""

import copy
import json
import os
import socket
import time
from pathlib import Path
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

from semiseg.networks import factory
from semiseg.networks.factory import Build, NetworkConfig, OptimConfig, load_object
from semiseg.networks.net import SegNet, Wrapped, _SameConv2d
from semiseg.networks.weights import load_tensors, read_model, read_weights, save_model
from semiseg.types import InputError

TINY = {"encoder": "test_resnet", "weights": "random"}
DECODERS = ("deeplabv3", "fpn", "linknet", "manet", "pspnet", "segformer", "unet", "unetplusplus", "upernet")


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
    cases = {
        "other.safetensors": r"other.safetensors: none of its 1 tensors \(a\) fits the encoder; set network.encoder",
        "text.safetensors": r"text.safetensors cannot be read as safetensors",
        "absent.safetensors": r"network.weights: absent.safetensors is not there \(looked for in .*correct the path",
        "folder": r"network.weights: .*folder is a folder; name a .safetensors file.",
    }
    for weights, message in cases.items():
        with pytest.raises(InputError, match=message):
            build(weights=weights, base=tmp_path).network()


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
    monkeypatch.setattr(factory, "_PROBE_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(TimeoutError):
        factory._probe(f"http://127.0.0.1:{server.getsockname()[1]}")


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
    with pytest.raises(InputError, match=r"own.py:Small loads its own weights"):
        build(base=tmp_path, name="own.py:Small", weights="w.safetensors").network()


def test_load_object(tmp_path: Path) -> None:
    assert load_object("pathlib:Path", None) is Path
    file = tmp_path / "own.py"
    file.write_text("VALUE = 1\n")
    assert load_object("own.py:VALUE", tmp_path) == 1
    assert load_object(f"{file}:VALUE", None) == 1
    file.write_text("VALUE = 2\n")
    assert load_object("own.py:VALUE", tmp_path) == 2, "an edited file is read again"
