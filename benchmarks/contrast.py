"""What U2PL's contrastive part costs, against a plain loop over the classes, and as a share of the whole step.

    python benchmarks/contrast.py [--device cpu|cuda] [--rounds 9] [--classes 21] [--images 8] [--side 129]
                                  [--width 256] [--queue 30000] [--step RECIPE] [--json]

The part: choosing anchors and negatives, the queues, the loss and its gradient to the features, for maps of random
numbers whose labels lie in blocks. The loop does the same for one class after another with queues on the host, as the
released code does: it sorts the classes, selects by boolean masks, pushes all negatives, and gathers every anchor's
keys. Channels are last in memory, as in the recipes. Both take turns in one process; times are medians. --step also
measures one whole step of a recipe with as many images, and says how much of it the part is.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import ROOT, finish, parser, run_script, table
from passes import prepare
from step import take_turns
from torch import Tensor

from semiseg.config import load_recipe
from semiseg.methods import U2PL
from semiseg.methods.u2pl import Taught
from semiseg.networks.factory import Build, NetworkConfig, OptimConfig
from semiseg.ops.partition import entropy
from semiseg.types import IGNORE

FASTER, PART = 8.0, 0.10
"""How much faster than the loop, and the most of a step on a GPU."""
BLOCK = 8
TINY = NetworkConfig(name="deeplabv3plus", encoder="test_resnet", weights="random", options={"decoder_channels": 16})


class Maps:
    """Random inputs: half of the images labelled, half pseudo-labelled; (B, H, W) at 4 px a feature."""

    def __init__(self, classes: int, images: int, side: int, width: int, device: torch.device) -> None:
        torch.manual_seed(0)
        blocks = torch.randint(classes, (images, 1, -(-side // BLOCK), -(-side // BLOCK)), device=device).float()
        label = F.interpolate(blocks, scale_factor=BLOCK)[:, 0, :side, :side].long()
        logits = 3 * F.one_hot(label, classes).movedim(-1, 1) + 1.5 * torch.randn(
            images, classes, side, side, device=device
        )
        self.probs = logits.softmax(1)
        layout = torch.channels_last
        self.keys = torch.randn(images, width, side, side, device=device).contiguous(memory_format=layout)
        self.features = torch.randn(images, width, side, side, device=device).contiguous(memory_format=layout)
        self.features.requires_grad_()
        label[:, :2] = IGNORE
        half = images // 2
        self.small, self.nats = label, entropy(self.probs)[half:]
        limit = self.nats.quantile(0.8)
        self.reliable, self.unreliable = self.nats < limit, self.nats >= limit

    def large(self) -> tuple[Tensor, ...]:
        """Mask, label, reliable and unreliable at the images' size."""
        half = len(self.small) // 2
        maps = (self.small[:half], self.small[half:], self.reliable, self.unreliable)
        return tuple(m.repeat_interleave(4, 1).repeat_interleave(4, 2) for m in maps)


def ours(method: U2PL, maps: Maps) -> Callable[[], None]:
    mask, label, reliable, unreliable = maps.large()
    taught = Taught(label, label, label, label, maps.probs, maps.keys)  # of the first four only the label is read

    def part() -> None:
        share, _ = method._contrast(mask, taught, reliable, unreliable, maps.features)
        (share.total / share.count.clamp(min=1)).backward()
        maps.features.grad = None

    return part


class Loop:
    """One class after another, queues on the host."""

    def __init__(self, method: U2PL, maps: Maps) -> None:
        self.maps, self.config, self.ranks = maps, method.config, method.ranks
        classes, width = maps.probs.shape[1], maps.keys.shape[1]
        self.capacity = [method.config.queue_first, *[method.config.queue] * (classes - 1)]
        self.queues = [torch.zeros(0, width) for _ in range(classes)]

    def __call__(self) -> None:
        maps, c = self.maps, self.config
        half, device = len(maps.small) // 2, maps.probs.device
        probs, keys, features = (m.permute(0, 2, 3, 1) for m in (maps.probs, maps.keys, maps.features))
        order = probs.argsort(3, descending=True)
        masked = torch.arange(2 * half, device=device).view(-1, 1, 1) < half
        nothing = torch.zeros_like(maps.reliable)
        trusted = torch.cat([maps.small[:half] != IGNORE, maps.reliable])
        unreliable = torch.cat([nothing, maps.unreliable])
        losses = []
        for number in range(probs.shape[3]):
            own = maps.small == number
            anchor = own & trusted & (probs[..., number] > c.least)
            low, high = self.ranks
            first, middle = ((part == number).any(3) for part in (order[..., :low], order[..., low:high]))
            negative = (masked & (maps.small != IGNORE) & ~own & first) | (unreliable & middle)
            queue = torch.cat([self.queues[number], keys[negative].cpu()])
            self.queues[number] = queue[-self.capacity[number] :]
            if not anchor.any() or not len(queue):
                continue
            positive = keys[anchor].mean(0)
            candidates = features[anchor]
            drawn = candidates[torch.randint(len(candidates), (c.anchors,), device=device)]
            picks = torch.randint(len(self.queues[number]), (c.anchors * c.keys,))
            far = self.queues[number][picks].to(device).view(c.anchors, c.keys, -1)
            both = torch.cat([positive.expand(c.anchors, 1, -1), far], 1)
            near = F.cosine_similarity(drawn.unsqueeze(1), both, dim=2) / c.temperature
            losses.append(F.cross_entropy(near, torch.zeros(c.anchors, dtype=torch.long, device=device)))
        torch.stack(losses).mean().backward()
        maps.features.grad = None


def measure(sizes: dict[str, int], queue: int, device: torch.device, rounds: int, whole: Path | None) -> dict[str, Any]:
    build = Build(sizes["classes"], 3, TINY, OptimConfig(), device=device)
    # The width of the head does not matter here: its features are made up.
    method = U2PL(U2PL.Config(width=sizes["width"], queue=queue, queue_first=queue), build).to(device)
    maps = Maps(**sizes, device=device)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    loop = Loop(method, maps)
    for _ in range(3):  # so that queues are as full as they will be
        loop()
    seconds = take_turns({"ours": ours(method, maps), "loop": loop}, wait, rounds)
    bank, plain = method.bank, sum(method.bank.capacity.tolist()) * sizes["width"] * 4
    bytes_ = sum(b.nbytes for b in (bank.keys, bank.fill, bank.next))
    result: dict[str, Any] = {
        "sizes": sizes, "queue": queue, "device": str(device),
        "ours_ms": 1000 * float(np.median(seconds["ours"])), "loop_ms": 1000 * float(np.median(seconds["loop"])),
        "faster": float(np.median(seconds["loop"] / seconds["ours"])),
        "queues_mb": bytes_ / 1e6, "queues_in_float32": bytes_ / plain,
    }  # fmt: skip
    if whole is not None:
        half = sizes["images"] // 2
        bench = prepare(load_recipe(whole, [f"train.batch={half}"]), device, whole.parent)
        took = take_turns({"step": bench.whole, "ours": ours(method, maps)}, wait, rounds)
        result["step_ms"] = 1000 * float(np.median(took["step"]))
        result["part_of_step"] = float(np.median(took["ours"] / took["step"]))
    return result


def as_text(result: dict[str, Any]) -> str:
    sizes = ", ".join(f"{name} {value}" for name, value in result["sizes"].items())
    rows = [["", "ms", "ratio", "target"]]
    rows.append(["plain loop, queues on the host", f"{result['loop_ms']:.1f}", "", ""])
    rows.append(["ours", f"{result['ours_ms']:.1f}", f"{result['faster']:.1f} times faster", f">= {FASTER:g}"])
    if "step_ms" in result:
        rows.append(["a whole step", f"{result['step_ms']:.1f}", "", ""])
        rows.append(["of it ours", "", f"{result['part_of_step']:.3f}", f"<= {PART:g} on a GPU"])
    memory = f"queues {result['queues_mb']:.1f} MB, {result['queues_in_float32']:.4f} of 32-bit storage"
    return f"{result['device']}: {sizes}, queues of {result['queue']}\n\n{table(rows)}\n\n{memory}"


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--rounds", type=int, default=9)
    for name, value in (("classes", 21), ("images", 8), ("side", 129), ("width", 256), ("queue", 30_000)):
        options.add_argument(f"--{name}", type=int, default=value)
    options.add_argument("--step", type=Path, metavar="RECIPE", help="such as recipes/voc/u2pl-deeplabv3plus-1323.yaml")
    given = options.parse_args(arguments)
    sizes = {name: getattr(given, name) for name in ("classes", "images", "side", "width")}
    step = None if given.step is None else ROOT / given.step
    result = measure(sizes, given.queue, torch.device(given.device), given.rounds, step)
    finish(result, as_text(result), given.json)


if __name__ == "__main__":
    run_script(main)
