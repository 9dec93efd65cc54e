"""More than one process: torchrun starts them, each takes its share of every batch, and all end with equal weights."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def start(device: str | None = None) -> torch.device:
    """Join the processes that torchrun started, if it did; return the device that this one computes on.

    Args:
        device: "cpu", "cuda", "cuda:1"; by default a GPU where there is one. Of several processes on a machine each
            takes the GPU of its local rank.
    Raises:
        ValueError: no such device.
    """
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(name)
    except RuntimeError:
        raise ValueError(f"expected a device like 'cpu', 'cuda' or 'cuda:1', got {name!r}") from None
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"expected a device like 'cpu', 'cuda' or 'cuda:1', got {name!r}")
    if chosen.type == "cuda":
        count = torch.cuda.device_count()
        if (chosen.index or 0) >= count > 0:
            raise ValueError(f"expected a device that is there, got {name!r}, but this machine has {count} GPUs")
        if not torch.cuda.is_available():
            raise ValueError(f"expected a device that is there, got {name!r}, but this machine has no CUDA GPU")
        if chosen.index is None:
            chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        torch.cuda.set_device(chosen)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    return chosen


def stop() -> None:
    """Leave the other processes; without them this does nothing."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def rank_and_world() -> tuple[int, int]:
    """Which process this is, and of how many; (0, 1) without torchrun."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_main() -> bool:
    """Whether this process writes files and prints; one of them does."""
    return rank_and_world()[0] == 0


def wait() -> None:
    """Wait for the other processes, e.g. until the file is there that the first one writes."""
    if rank_and_world()[1] > 1:
        dist.barrier()


def total_of(value: Tensor) -> Tensor:
    """The sum of a tensor over all processes, in place."""
    if rank_and_world()[1] > 1:
        dist.all_reduce(value)
    return value


@torch.no_grad()
def average_buffers_(model: nn.Module) -> None:
    """Give every process the mean of the float buffers (batch-norm statistics), and the first one's integers."""
    _, world = rank_and_world()
    if world == 1:
        return
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.copy_(total_of(buffer.clone()) / world)
        else:
            dist.broadcast(buffer, 0)


@contextmanager
def shared(step: nn.Module) -> Iterator[nn.Module]:
    """Yield a module that averages its gradients over all processes (DDP); with one process ``step`` itself.

    On GPUs batch norm takes its statistics over all processes while the block runs (SyncBatchNorm, which has no CPU
    form: there each process takes those of its share).
    """
    _, world = rank_and_world()
    if world == 1:
        yield step
        return
    on_gpu = next(step.parameters()).is_cuda
    norms = {name: module for name, module in step.named_modules() if isinstance(module, _BatchNorm)} if on_gpu else {}
    try:
        for name, norm in norms.items():  # the new module shares parameters and buffers with the one it replaces
            _replace(step, name, nn.SyncBatchNorm.convert_sync_batchnorm(norm))
        yield nn.parallel.DistributedDataParallel(step)
    finally:
        for name, norm in norms.items():
            _replace(step, name, norm)


def _replace(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(root.get_submodule(parent), last, module)
