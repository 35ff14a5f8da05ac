"""Weights split over ranks: FSDP2 and checkpoints that any number of ranks can read.

Every block of the network is one unit that is gathered when it is needed and freed afterwards. A sharded
checkpoint is written through `torch.distributed.checkpoint`, each rank its own safetensors file; nothing is pickled.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ..model.layers import JointBlock

FOLDER = "train_state/sharded"


def shard(module: nn.Module, bf16: bool) -> None:
    """Split a module's parameters over all ranks in place, joint blocks as units of their own.

    bf16: gather weights in bf16 and reduce gradients in fp32.
    """
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
    for block in module.modules():
        if isinstance(block, JointBlock):
            fully_shard(block, mp_policy=policy)
    fully_shard(module, mp_policy=policy)


def local(tensors: list[Tensor]) -> list[Tensor]:
    """The part of every tensor that is on this rank."""
    return [x.to_local() if isinstance(x, DTensor) else x for x in tensors]


def whole(x: Tensor) -> Tensor:
    """A tensor gathered from all ranks; every rank must call this."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def save(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write this rank's part of every tensor; every rank must call this with the same names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a single process, and of replicated scalars
        dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))


def load(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill tensors, whole or sharded over any number of ranks, from a sharded checkpoint."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)))


def names(folder: Path) -> set[str]:
    """The tensors that a sharded checkpoint holds."""
    return set(HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata)
