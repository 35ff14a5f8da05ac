"""Ranks: started by torchrun, one process a device. Without torchrun everything here is a single rank."""

from __future__ import annotations

import datetime
import os

import torch
import torch.distributed as dist
from torch import Tensor


def start(device: torch.device | str) -> torch.device:
    """Join the process group if torchrun started several ranks; returns the device of this rank.

    Ranks on GPUs take one each and communicate by NCCL, ranks on the CPU by gloo.

    Raises:
        ValueError: more ranks on this machine than GPUs.
    """
    device = torch.device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return device
    backend = "gloo"
    if device.type == "cuda":
        local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= count:
            raise ValueError(f"local rank {local} has no GPU of its own: this machine has {count}")
        device, backend = torch.device("cuda", local), "nccl"
        torch.cuda.set_device(device)
    # rank 0 alone samples and evaluates while the others wait
    dist.init_process_group(backend, timeout=datetime.timedelta(hours=4))
    return device


def stop() -> None:
    """Leave the process group; nothing without one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this rank writes files and shows progress."""
    return rank() == 0


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, in place; the same tensor without ranks."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


class Vote:
    """The largest of numbers of the ranks, one round late: no rank waits for a device, or for a slower rank.

    Every rank must call it equally often, and `close` at the end.
    """

    def __init__(self) -> None:
        # by gloo on the CPU whatever the ranks compute on: reading a number of a GPU would wait for the GPU
        self.group = dist.new_group(backend="gloo") if world() > 1 else None
        self.last: tuple[Tensor, dist.Work] | None = None

    def __call__(self, number: int) -> int:
        """The largest number of the round before, the same on all ranks; on a single rank the number itself."""
        if self.group is None:
            return number
        largest, mine = self.close(), torch.tensor(number)
        self.last = mine, dist.all_reduce(mine, dist.ReduceOp.MAX, self.group, async_op=True)
        return largest

    def close(self) -> int:
        """Wait for the last round; returns its result, 0 without one."""
        if self.last is None:
            return 0
        (result, work), self.last = self.last, None
        work.wait()
        return int(result)


def share(n: int) -> range:
    """The share of this rank of n rows: contiguous, in the order of ranks, sizes that differ by at most one."""
    r, w = rank(), world()
    return range(r * n // w, (r + 1) * n // w)
