"""An exported network answers as the original, at any batch and size, without anything of the run around it."""

import builtins
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from semiseg.engine.export import SIZES, export_onnx, onnx_network
from semiseg.networks.factory import Build, NetworkConfig, OptimConfig
from semiseg.types import InputError

pytest.importorskip("onnxscript", reason="the export extra is not installed")
pytest.importorskip("onnxruntime", reason="the export extra is not installed")


def images(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


VIT = {"embed_dim": 32, "depth": 4, "num_heads": 2, "img_size": 112}
"""Positions of 8 x 8 tokens, which the sizes below both shrink and enlarge."""


@pytest.mark.parametrize(
    ("name", "encoder", "options", "channels"),
    [
        ("deeplabv3plus", "test_efficientnet", {"pad_type": "same"}, 4),
        ("unet", "test_resnet", {}, 3),
        ("dpt", "vit_small_patch14_dinov2", VIT, 3),
    ],
)
def test_an_exported_network_is_the_original(
    name: str, encoder: str, options: dict[str, Any], channels: int, tmp_path: Path
) -> None:
    head = {"width": 16, "channels": [8, 8, 16, 16]} if name == "dpt" else {}
    config = NetworkConfig(name=name, encoder=encoder, weights="random", encoder_options=options, options=head)
    net = Build(5, channels, config, OptimConfig(), precision=torch.bfloat16, channels_last=True).network()
    net(images(2, channels, 64, 64))  # running statistics of its own
    before, state = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    agreement = export_onnx(net, tmp_path / "new" / "model.onnx", channels)

    assert agreement.difference < 1e-4 * agreement.scale
    assert agreement.equal > 0.999
    assert "of the labels agree" in str(agreement)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["model.onnx"]
    assert net.training
    assert net.precision == torch.bfloat16
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())

    exported, plain = onnx_network(tmp_path / "new" / "model.onnx"), net.eval()
    plain.precision = None
    for shape in ((1, channels, 33, 47), (3, channels, 130, 64)):
        image = images(*shape)
        with torch.no_grad():
            expected = plain(image)
        for same in (image, (image.to(torch.int32) * 257).to(torch.uint16), image / 255):
            logits = exported(same)
            assert logits.dtype == torch.float32
            torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        return self.conv(image)


class AnswersOtherwise(Small):
    def forward(self, image: Tensor) -> Tensor:
        logits = self.conv(image)
        return logits if torch.compiler.is_exporting() else -logits


class HasOneSize(Small):
    def forward(self, image: Tensor) -> Tensor:
        return self.conv(image) * torch.ones(90, 121)


def test_sizes_are_mostly_no_multiples() -> None:
    assert len(SIZES) == 3
    assert sum(side % 16 != 0 for size in SIZES for side in size[1:]) >= 3


def test_a_network_that_answers_otherwise_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_text("the last good one")
    with pytest.raises(RuntimeError, match="the exported network is not the original: logits differ by at most"):
        export_onnx(AnswersOtherwise(), path, 3)
    assert path.read_text() == "the last good one"
    assert list(tmp_path.iterdir()) == [path]


def test_a_network_of_one_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^HasOneSize cannot be exported \("):
        export_onnx(HasOneSize(), tmp_path / "model.onnx", 3)
    assert not list(tmp_path.iterdir())


def test_wrong_files(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("no")
    for name in ("text.onnx", "absent.onnx"):
        with pytest.raises(InputError, match=rf"{name} cannot be read as ONNX"):
            onnx_network(tmp_path / name)


def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def missing(name: str, *args: Any, **options: Any) -> Any:
        if name.startswith("onnx"):
            raise ImportError(name)
        return original(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(InputError, match=r"pip install 'semiseg\[export\]'"):
        export_onnx(Small(), tmp_path / "model.onnx", 3)
    with pytest.raises(InputError, match=r"pip install 'semiseg\[export\]'"):
        onnx_network(tmp_path / "model.onnx")
