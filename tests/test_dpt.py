"""DPT on plain vision transformers: sizes, parameters, and what its parts give."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from semiseg.methods import U2PL, UniMatchV2
from semiseg.networks.factory import Build, NetworkConfig, OptimConfig
from semiseg.networks.net import SegNet
from semiseg.types import InputError

TINY = {"embed_dim": 32, "depth": 4, "num_heads": 2, "img_size": 56}


def build(encoder: str = "vit_small_patch14_dinov2", **options: object) -> Build:
    tiny = TINY if "base" not in encoder else {}
    config = NetworkConfig(name="dpt", encoder=encoder, weights="random", encoder_options=tiny, options=options)
    return Build(5, 3, config, OptimConfig())


def count(module: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


@pytest.mark.parametrize("size", [(182, 252), (180, 240), (64, 64), (17, 33)])
@pytest.mark.parametrize("encoder", ["vit_small_patch14_dinov2", "vit_small_patch16_224"])
def test_any_size(encoder: str, size: tuple[int, int]) -> None:
    net = build(encoder, width=16, channels=[8, 8, 16, 16]).parts().eval()
    image = torch.rand(2, 3, *size)
    patch = 14 if "14" in encoder else 16
    tokens = [-(-side // (2 * patch)) * 2 for side in size]
    maps = net.encode(image)
    assert [tuple(m.shape) for m in maps] == [(2, 32, *tokens)] * 4
    fused = net.fuse(maps)
    assert tuple(fused.shape) == (2, 16, *(side * patch // 2 for side in tokens))
    assert (net.stride, net.width, net.strides) == (2, 16, (patch,) * 4)
    assert net(image).shape == (2, 5, *size)


def test_logits_lie_where_the_image_is() -> None:
    """A brighter quarter changes the logits there most: nothing is shifted or mirrored by the resizing."""
    torch.manual_seed(0)
    net = build(width=16, channels=[8, 8, 16, 16]).parts().eval()
    image = torch.zeros(1, 3, 140, 182)
    other = image.clone()
    other[..., 20:40, 130:160] = 1
    with torch.no_grad():
        changed: Tensor = (net(other) - net(image)).abs().sum(1)[0]
    assert 10 < changed.sum(1).argmax() < 50
    assert 120 < changed.sum(0).argmax() < 170


def test_the_encoder_is_timms() -> None:
    """Its weights have timm's names, and its maps are the tokens of four blocks behind the last norm."""
    model = timm.create_model("vit_small_patch14_dinov2", num_classes=0, dynamic_img_size=True, **TINY).eval()
    net = build(width=16, channels=[8, 8, 16, 16]).parts().eval()
    net.encoder.model.load_state_dict(model.state_dict())
    image = torch.rand(1, 3, 84, 56)
    maps = net.encode(image)
    last = model.forward_features(net.normalise(image))[:, 1:]
    assert torch.allclose(maps[3].flatten(2).transpose(1, 2), last, atol=1e-5)
    assert not torch.allclose(maps[0], maps[3])


def test_parameters_of_dinov2_base() -> None:
    """86.6 M and 10.9 M at 21 classes, as UniMatch V2 states (methods.md, case 52)."""
    config = NetworkConfig(name="dpt", encoder="vit_base_patch14_dinov2", weights="random")
    with torch.device("meta"):
        from semiseg.networks.dpt import DPT

        model = DPT(config.encoder, classes=21)
    assert count(model.encoder) / 1e6 == pytest.approx(86.6, abs=0.05)
    assert (count(model.decoder) + count(model.segmentation_head)) / 1e6 == pytest.approx(10.95, abs=0.06)


@pytest.mark.parametrize(
    ("encoder", "sentence"),
    [
        ("resnet18", "network.encoder: resnet18 is no plain vision transformer with square patches, which dpt is for"),
        ("mobilenetv2_100", "is no plain vision transformer"),
        ("vit_small_r26_s32_224", "is no plain vision transformer with square patches"),
    ],
)
def test_other_encoders(encoder: str, sentence: str) -> None:
    config = NetworkConfig(name="dpt", encoder=encoder, weights="random")
    with pytest.raises(InputError, match=sentence):
        Build(5, 3, config, OptimConfig()).network()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"taps": [0, 1, 2]}, "name four of the blocks 0 to 3"),
        ({"taps": [0, 1, 2, 4]}, "name four of the blocks 0 to 3"),
        ({"channels": [8, 8]}, "give four numbers"),
        ({"tap": [1]}, "tap is unknown; did you mean taps"),
    ],
)
def test_wrong_options(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        build(**options).network()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"patch_size": (14, 7)}, "is no plain vision transformer with square patches"),
        ({"foo": 1}, r"^network\.encoder_options: test_vit has no foo; remove it\.$"),
    ],
)
def test_wrong_options_of_the_encoder(options: dict[str, Any], sentence: str) -> None:
    config = NetworkConfig(name="dpt", encoder="test_vit", weights="random", encoder_options=options)
    with pytest.raises(InputError, match=sentence):
        Build(5, 3, config, OptimConfig()).network()


def test_weights_for_other_patches_or_images(tmp_path: Path) -> None:
    """Patches of another size are another network's; positions are resampled, as timm does."""
    model = timm.create_model("vit_small_patch16_224", num_classes=0, **TINY | {"img_size": 64})
    torch.nn.init.normal_(model.pos_embed)
    save_file(model.state_dict(), tmp_path / "vit.safetensors")

    def start(encoder: str, side: int) -> Build:
        config = NetworkConfig(
            name="dpt",
            encoder=encoder,
            weights="vit.safetensors",
            encoder_options=TINY | {"img_size": side},
            options={"width": 16, "channels": [8, 8, 16, 16]},
        )
        return Build(5, 3, config, OptimConfig(), base=tmp_path)

    with pytest.raises(InputError, match=r"network\.weights: .*vit\.safetensors has patches of 16x16 px, .* of 14x14"):
        start("vit_small_patch14_dinov2", 56).network()
    larger = start("vit_small_patch16_224", 128)
    place = larger.parts().encoder.model.pos_embed.detach()
    assert any("resampled: pos_embed from 17 to 65 places" in line for line in larger.report)
    grid = model.pos_embed.detach()[:, 1:].reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
    finer = torch.nn.functional.interpolate(grid, (8, 8), mode="bicubic", antialias=True)
    assert torch.allclose(place[:, 1:].transpose(1, 2), finer.flatten(2), atol=1e-6)
    assert torch.equal(place[:, :1], model.pos_embed[:, :1])


def test_methods_that_need_parts() -> None:
    options: dict[str, object] = {"width": 16, "channels": [8, 8, 16, 16]}
    assert isinstance(UniMatchV2(UniMatchV2.Config(), build(**options)).student, SegNet)
    assert U2PL(U2PL.Config(width=8), build(**options)).student.stride == 4
