"""A recipe may be one process of several: its start and its end, who writes, and a model in parts on all of them."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate import PartialState
from transformers import PreTrainedModel

_sharded = False


def run_main(main: Callable[[list[str]], None]) -> None:
    """Run `main` on the command line's flags, then leave the process group, also after an error.

    A process that ends while others still wait for it would take them down with it, and one whose group is still there when
    Python shuts down may be aborted by the threads that serve it. After an error nobody is waited for: the others may be in the
    middle of something that this one will never join, and end with an error of their own.
    """
    global _sharded
    # accelerate would prepare one model only; see `sharded`
    _sharded = os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() == "true"
    try:
        main(sys.argv[1:])
        if dist.is_initialized():
            PartialState().wait_for_everyone()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def writes() -> bool:
    """Whether this is the process that writes and prints."""
    return not dist.is_initialized() or dist.get_rank() == 0


def shards() -> bool:
    """Whether accelerate was asked for FSDP, and there is more than one process."""
    return _sharded and dist.is_initialized() and dist.get_world_size() > 1


def in_parts(model: PreTrainedModel, auto_class: Any, output_dir: str) -> PreTrainedModel:
    """The model sharded over all processes; by way of a folder, since Transformers shards what it loads."""
    from transformers.distributed import (
        DistributedConfig,
    )  # newer than the oldest Transformers that the rest runs with

    folder = Path(output_dir, "_start")
    if writes():
        model.save_pretrained(folder)
    dist.barrier()
    config = DistributedConfig(fsdp_size=dist.get_world_size())
    parts: PreTrainedModel = auto_class.from_pretrained(folder, distributed_config=config)
    parts.name_or_path = parts.config._name_or_path = model.name_or_path
    dist.barrier()
    if writes():
        shutil.rmtree(folder)
    return parts
