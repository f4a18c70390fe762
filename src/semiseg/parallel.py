"""The processes of a run: which one is this, and sums over all of them. In one process every function does nothing.

torchrun launches them, and each runs the same program on its own block of every batch. GPUs meet through NCCL, CPUs
through gloo.
"""

import atexit
import importlib
import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm

from semiseg.types import InputError

T = TypeVar("T")

BUCKET = 25_000_000
"""Bytes of gradients that travel together: large enough to be quick, small enough to leave while backward runs."""


def rank() -> int:
    """The number of this process, from 0; only process 0 writes files."""
    return int(os.environ.get("RANK", "0")) if world() > 1 else 0


def world() -> int:
    """How many processes share the run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def device(name: str) -> torch.device:
    """The device that `train.device` names; `auto` takes a GPU where there is one, each local process its own.

    Raises:
        InputError: a GPU is asked for and there is none, or fewer than local processes.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("train.device: cuda was asked for and torch sees no GPU; use cpu or auto.")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if world() == 1:
        return torch.device("cuda")
    local, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= there:
        raise InputError(f"{_local_world()} processes were launched here and torch sees {there} GPUs: launch {there}.")
    return torch.device("cuda", local)


def threads() -> int:
    """CPU threads that are this process' share: its physical cores, or what the environment says.

    Several processes divide the cores, whatever OMP_NUM_THREADS is: torchrun sets it to 1.
    """
    if _local_world() == 1 or not hasattr(os, "sched_getaffinity"):
        return torch.get_num_threads()
    topology = Path("/sys/devices/system/cpu")
    siblings = (topology / f"cpu{i}/topology/thread_siblings_list" for i in os.sched_getaffinity(0))
    cores = {path.read_text() if path.exists() else str(path) for path in siblings}
    return max(1, len(cores) // _local_world())


def _local_world() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def start(place: torch.device) -> None:
    """Meets the other processes, once; each waits here for all, and takes its share of the cores."""
    if world() == 1 or dist.is_initialized():
        return
    torch.set_num_threads(threads())
    if place.type == "cuda":
        torch.cuda.set_device(place)
    # Objects and counts of evaluations travel as CPU tensors, gradients as the device's. A process that has predicted
    # its images waits for the slowest one, which may take hours.
    backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
    # Its functions have the group as a default: imported later, as the optimisers do, they would keep it alive, and
    # gloo's threads that outlive Python abort the process.
    importlib.import_module("torch.distributed.nn.functional")
    dist.init_process_group(backend, timeout=timedelta(days=2))
    atexit.register(dist.destroy_process_group)


def wait() -> None:
    """Until all processes are here: what process 0 has written can be read then."""
    if world() > 1:
        gather(None)


@contextmanager
def peers() -> Iterator[None]:
    """A block in which the end of another process is told in a sentence: what was wrong, that process has said.

    Raises:
        InputError: another process ended.
    """
    try:
        yield
    except RuntimeError as error:
        if world() == 1 or not any(word in str(error) for word in ("by peer", "gloo", "NCCL", "onnection")):
            raise
        raise InputError("another process of this run ended: see what it said.") from error


@torch.no_grad()
def same(tensors: Iterable[Tensor]) -> None:
    """Gives all processes the weights and buffers of process 0: another one may have found no file to start from."""
    if world() > 1:
        for tensor in tensors:
            flat = tensor.contiguous()
            dist.broadcast(flat, 0)
            tensor.copy_(flat)


def gather(value: T) -> list[T]:
    """The value of every process, in the order of their numbers."""
    if world() == 1:
        return [value]
    values: list[T | None] = [None] * world()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def shared_sum(values: Sequence[Tensor]) -> list[Tensor]:
    """Adds each scalar over all processes, in one message; stays on the device."""
    values = [value.detach() for value in values]
    if world() == 1:
        return values
    sums = torch.stack([value.double() for value in values])
    dist.all_reduce(sums)
    return [total.to(value.dtype) for total, value in zip(sums, values, strict=True)]


def quiet_worker(_: int) -> None:
    """What a process that reads files begins with: one thread, and signals are the main process' business."""
    # Both may reach the whole process group; the main process answers them and ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)


def added(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes, without gradient."""
    if world() == 1:
        return tensor.detach()
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


def joined(tensor: Tensor, dim: int = 0) -> Tensor:
    """The tensors of all processes, of one shape, one behind the other in the order of the processes' numbers."""
    if world() == 1:
        return tensor.detach()
    own = tensor.detach().to(torch.uint8 if tensor.dtype == torch.bool else tensor.dtype).contiguous()
    parts = [torch.empty_like(own) for _ in range(world())]
    dist.all_gather(parts, own)
    return torch.cat(parts, dim).to(tensor.dtype)


@contextmanager
def summed_gradients(weights: Sequence[Tensor]) -> Iterator[None]:
    """A block with the last backward pass before a step: after it every process has the sum of all gradients.

    A bucket of gradients leaves as soon as all of it are there, while backward goes on with earlier layers. A weight
    that the loss of no process reached keeps no gradient: with zeros, weight decay and momentum would move it.
    """
    if world() == 1:
        yield
        return
    buckets = _buckets(weights)
    place = {id(weight): i for i, bucket in enumerate(buckets) for weight in bucket}
    missing = [len(bucket) for bucket in buckets]
    sent: list[tuple[Tensor, dist.Work]] = []

    def send() -> None:
        flat = _flat(buckets[len(sent)])
        sent.append((flat, dist.all_reduce(flat, async_op=True)))

    def arrived(weight: Tensor) -> None:
        missing[place[id(weight)]] -= 1
        # In order: all processes must send the same bucket as their n-th.
        while len(sent) < len(buckets) and missing[len(sent)] == 0:
            send()

    hooks = [weight.register_post_accumulate_grad_hook(arrived) for weight in weights]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    while len(sent) < len(buckets):
        send()
    for bucket, (flat, work) in zip(buckets, sent, strict=True):
        work.wait()
        _unflat(flat, bucket)


def _buckets(weights: Sequence[Tensor]) -> list[list[Tensor]]:
    """The weights in the order in which backward reaches them, last layers first, in parts of BUCKET bytes."""
    buckets: list[list[Tensor]] = [[]]
    size = 0
    for weight in reversed(weights):
        if size > BUCKET:
            buckets.append([])
            size = 0
        buckets[-1].append(weight)
        size += weight.nbytes
    return buckets


def _flat(bucket: list[Tensor]) -> Tensor:
    """The gradients one after another, zeros where there is none; then for each whether it is there."""
    there = bucket[0].new_ones(len(bucket))  # not from a list: that copy would wait for the device
    for place, weight in enumerate(bucket):
        if weight.grad is None:
            there[place].zero_()
    grads = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in bucket]
    return torch.cat([*(grad.flatten() for grad in grads), there])


def _unflat(flat: Tensor, bucket: list[Tensor]) -> None:
    *parts, there = flat.split([*(weight.numel() for weight in bucket), len(bucket)])
    reached = [True] * len(bucket)
    if any(weight.grad is None for weight in bucket):
        reached = (there > 0).tolist()  # waits for the device, in a case that methods avoid
    for weight, known in zip(bucket, reached, strict=True):
        if weight.grad is None and known:
            weight.grad = torch.zeros_like(weight)
    pairs = [(weight.grad, part.view_as(weight)) for weight, part in zip(bucket, parts, strict=True)]
    there_pairs = [(grad, part) for grad, part in pairs if grad is not None]
    if there_pairs:
        torch._foreach_copy_([grad for grad, _ in there_pairs], [part for _, part in there_pairs])


@torch.no_grad()
def average_statistics(modules: Iterable[nn.Module]) -> None:
    """Gives all processes the mean of batch norm's running statistics, where the layers themselves do not share them.

    Averages of averages are averages: a teacher that follows its student by EMA follows the mean.
    """
    if world() == 1:
        return
    norms = [m for m in modules if isinstance(m, _BatchNorm) and not isinstance(m, SyncBatchNorm)]
    kept = [b for m in norms for b in (m.running_mean, m.running_var) if b is not None]
    if not kept:
        return
    flat = torch.cat(kept) / world()
    dist.all_reduce(flat)
    torch._foreach_copy_(kept, list(flat.split([len(b) for b in kept])))
