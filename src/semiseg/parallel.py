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
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm

from semiseg.types import InputError
from semiseg.watch import GRACE, Watch, patience

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

T = TypeVar("T")

BUCKET = {"cpu": 1_500_000, "cuda": 25_000_000}
"""Bytes of gradients that travel together: large enough to be quick, small enough to leave while backward runs."""

LONGEST = timedelta(days=2)
"""Of one process' wait for another that works. One that is gone is the watch's business."""

_watches: list[Watch] = []
"""The one of this process, once it has met the others."""


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
    """Meets the other processes, once; each waits here for all, and takes its share of the cores.

    From here on the loss of one ends all; see `semiseg.watch`.

    Raises:
        InputError: one did not come.
    """
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
    store = _store()
    _watches.append(Watch.meet(store, os.environ["MASTER_ADDR"], rank(), world()))
    store.set_timeout(LONGEST)  # NCCL asks it at its first collective
    dist.init_process_group(backend, store=store, rank=rank(), world_size=world(), timeout=LONGEST)
    atexit.register(_leave, place.type)


def _store() -> "Store":
    """Where the processes find each other: torchrun's, or process 0's at MASTER_ADDR and MASTER_PORT.

    Raises:
        InputError: the environment does not name it, or it cannot be reached.
    """
    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        own = int(os.environ["RANK"]) == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    except (KeyError, ValueError) as error:
        raise InputError(
            "WORLD_SIZE says that there are several processes, and RANK, MASTER_ADDR or MASTER_PORT is not set or no "
            "number: launch them by torchrun, or set all four."
        ) from error
    try:
        limit = timedelta(seconds=patience())
        store = dist.TCPStore(  # type: ignore[attr-defined]
            host, port, is_master=own, timeout=limit, wait_for_workers=False
        )
    except RuntimeError as error:
        what = "cannot listen" if own else "cannot reach process 0"
        raise InputError(
            f"process {rank()} of {world()} {what} at {host}, port {port}, within {patience():g} s: see what process 0 "
            "said, and that MASTER_ADDR is its machine and MASTER_PORT free there."
        ) from error
    return dist.PrefixStore(  # type: ignore[attr-defined]
        f"semiseg {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store
    )


def _leave(kind: str) -> None:
    failed = _watches[0].leaving.is_set()
    _watches[0].leave()
    if not (failed and kind == "cuda"):  # NCCL would wait for what the lost process owes
        dist.destroy_process_group()


def wait() -> None:
    """Until all processes are here: what process 0 has written can be read then."""
    if world() > 1:
        gather(None)


@contextmanager
def peers() -> Iterator[None]:
    """A block whose end by an exception ends the other processes too: without this one they would wait for ever.

    Raises:
        InputError: another process ended: what was wrong, that one has said. Or they cannot talk to each other.
    """
    try:
        yield
    except BaseException as error:
        if not _watches:
            raise
        text = str(error)
        broken = isinstance(error, RuntimeError) and any(w in text for w in ("by peer", "gloo", "NCCL", "onnection"))
        sentence = _watches[0].fail(wait=GRACE if broken else 0.0)
        if not broken:
            raise
        reason = text.strip().partition("\n")[0]
        raise InputError(
            sentence or f"the processes cannot talk to each other, and none has ended ({reason})."
        ) from error


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


def first(value: T) -> T:
    """The value of process 0. For what lies on a disk: on a shared one the others may see it later."""
    if world() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, 0)
    return values[0]


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
    """The weights in the order in which backward reaches them, last layers first, in parts of BUCKET bytes or more."""
    buckets: list[list[Tensor]] = [[]]
    size = 0
    for weight in reversed(weights):
        if size > BUCKET[weight.device.type]:
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
    return torch.cat([*(_line(grad, weight) for grad, weight in zip(grads, bucket, strict=True)), there])


def _unflat(flat: Tensor, bucket: list[Tensor]) -> None:
    *parts, there = flat.split([*(weight.numel() for weight in bucket), len(bucket)])
    reached = [True] * len(bucket)
    if any(weight.grad is None for weight in bucket):
        reached = (there > 0).tolist()  # waits for the device, in a case that methods avoid
    for weight, part, known in zip(bucket, parts, reached, strict=True):
        if known:
            weight.grad = _shaped(part, weight)


def _line(grad: Tensor, weight: Tensor) -> Tensor:
    """A gradient (n,) in the order in which the weight lies in memory: a view, as it lies there likewise."""
    return (grad.permute(0, 2, 3, 1) if _channels_last(weight) else grad).flatten()


def _shaped(line: Tensor, weight: Tensor) -> Tensor:
    """The inverse of `_line`, a view."""
    if not _channels_last(weight):
        return line.view_as(weight)
    return line.view(weight.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)


def _channels_last(weight: Tensor) -> bool:
    return weight.dim() == 4 and not weight.is_contiguous()


def running_statistics(modules: Iterable[nn.Module]) -> list[Tensor]:
    """Batch norm's running statistics where the layers do not share them themselves; nothing in one process."""
    if world() == 1:
        return []
    norms = [m for m in modules if isinstance(m, _BatchNorm) and not isinstance(m, SyncBatchNorm)]
    return [b for m in norms for b in (m.running_mean, m.running_var) if b is not None]


@torch.no_grad()
def average(tensors: list[Tensor]) -> None:
    """Gives all processes the mean over them of each tensor.

    Averages of averages are averages: a teacher that follows its student by EMA follows the mean.
    """
    if world() == 1 or not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors]) / world()
    dist.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(tensors, [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)])
