"""A trained network as an ONNX file that runs without torch, compared with the original before anybody uses it."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from semiseg.files import replacing
from semiseg.types import InputError, white

SIZES = ((1, 64, 96), (2, 97, 131), (1, 160, 90))
"""Batch, height and width in px of the images on which an export is compared: most sides are multiples of nothing."""

_OPSET = 20
_MISSING = "ONNX needs packages that are not installed: pip install 'semiseg[export]'."


@dataclass(frozen=True)
class Agreement:
    """How close an exported network is to the original.

    difference  largest difference of two logits
    scale       largest absolute logit
    equal       share of the pixels whose class is the same
    """

    difference: float
    scale: float
    equal: float

    def __str__(self) -> str:
        return (
            f"logits differ by at most {self.difference:.1e} of {self.scale:.3g}, {self.equal:.3%} of the labels agree"
        )


def export_onnx(net: nn.Module, path: Path, channels: int) -> Agreement:
    """Writes a network as ONNX and compares it with torch on images of three sizes.

    The file's input `image` is (B, N, H, W) float32 in 0..1, of any batch and size; its output `logits` (B, C, H, W)
    float32. Normalising, padding and resizing are inside.

    Raises:
        InputError: the export extra is missing, or the network cannot be exported.
        RuntimeError: the two networks disagree; `path` is as it was.
    """
    try:
        import onnxscript  # noqa: F401 - torch asks for it late
    except ImportError as error:
        raise InputError(_MISSING) from error
    plain = _plain(net)
    free = torch.export.Dim.DYNAMIC
    try:
        program = torch.onnx.export(
            plain,
            (torch.zeros(2, channels, 90, 121),),
            dynamo=True,
            opset_version=_OPSET,
            dynamic_shapes=({0: free, 2: free, 3: free},),
            input_names=["image"],
            output_names=["logits"],
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise InputError(f"{type(net).__name__} cannot be exported ({reason}).") from error
    assert program is not None, "torch.onnx.export without dynamo"
    with replacing(path) as part:
        program.save(part)
        agreement = _compare(plain, onnx_network(part), channels)
        if not (agreement.difference <= 1e-3 * agreement.scale and agreement.equal >= 0.999):
            raise RuntimeError(f"the exported network is not the original: {agreement}")
    return agreement


def _plain(net: nn.Module) -> nn.Module:
    """A copy for one device and one precision."""
    plain = deepcopy(net).cpu().float().eval().requires_grad_(False)
    for module in plain.modules():
        if hasattr(module, "precision"):
            module.precision = None  # type: ignore[assignment]
    return plain


@torch.no_grad()
def _compare(net: nn.Module, exported: Callable[[Tensor], Tensor], channels: int) -> Agreement:
    generator = torch.Generator().manual_seed(0)
    difference, scale, equal, pixels = 0.0, 0.0, 0, 0
    for batch, height, width in SIZES:
        image = torch.rand(batch, channels, height, width, generator=generator)
        here, there = net(image), exported(image)
        assert here.shape == there.shape, (here.shape, there.shape)
        difference = max(difference, float((here - there).abs().max()))
        scale = max(scale, float(here.abs().max()))
        equal += int((here.argmax(1) == there.argmax(1)).sum())
        pixels += batch * height * width
    return Agreement(difference, scale, equal / pixels)


def onnx_network(path: Path) -> Callable[[Tensor], Tensor]:
    """An exported network: image (B, N, H, W) uint8, uint16, or floating in 0..1 -> logits (B, C, H, W) float32.

    It runs on the CPU with torch's number of threads; the logits come back to the image's device.

    Raises:
        InputError: the export extra is missing, or the file cannot be read.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise InputError(_MISSING) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no common public class
        raise InputError(
            f"{path} cannot be read as ONNX ({error}): name another file, or export the model again."
        ) from error

    def run(image: Tensor) -> Tensor:
        scaled = image.detach().cpu().float() / white(image)
        return torch.from_numpy(session.run(["logits"], {"image": scaled.numpy()})[0]).to(image.device)

    return run
