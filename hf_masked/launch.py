"""A run as one process of several: what launches it, and how long the others are waited for."""

import os
from typing import Any

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def refuse_deepspeed(args: Any) -> None:
    """Refuse a core or a method under DeepSpeed, before Transformers imports it and takes its configuration for that
    of the run.

    Raises: ValueError.
    """
    asked = args.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    trained = {"core": args.core, "cores": args.cores, "method": args.method}
    named = [f"{name}={value!r}" for name, value in trained.items() if value not in (None, "none")]
    if asked and named:
        raise ValueError(
            f"got {named[0]} with DeepSpeed; needs a run without, because its engine makes the steps, of one network "
            "and of all of it; drop one of them, or shard the full network with FSDP2 as the guide shows"
        )


def join_processes(args: Any) -> None:
    """Make the process group of a run on processors, which Transformers would make without --ddp_timeout.

    One that is there already stays as it is, so Transformers goes on with this one.
    """
    if args.use_cpu or parse_flag_from_env("ACCELERATE_USE_CPU"):
        PartialState(cpu=True, backend=args.ddp_backend, timeout=args.ddp_timeout_delta)
