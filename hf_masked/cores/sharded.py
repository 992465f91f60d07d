"""A full network whose parameters lie in parts on several processes (FSDP2), made whole where a core looks at it.

Transformers shards while it loads, `from_pretrained(..., distributed_config=DistributedConfig(fsdp_size=n))`, on any
device. The core is no part of that: it is whole on every process, and DistributedDataParallel reduces its gradients.
"""

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..compressed_reduction import CompressedReduction
from ..loss_scale import in_fp16
from ..parts import works_on_parts
from .modules import parameter_sites


def is_sharded(model: nn.Module) -> bool:
    """Whether some parameters of the model are DTensors, of which this process holds a part."""
    return any(hasattr(p, "full_tensor") for p in model.parameters())


def gathered(model: PreTrainedModel) -> PreTrainedModel:
    """A whole model of the unchanged class with the values of a sharded one; to be called on every process.

    Cost: memory of the whole network, on every process.
    """
    whole = _skeleton(model)
    made: dict[int, nn.Parameter] = {}
    theirs = {(path, name): p for _, path, name, p in parameter_sites(model)}
    with torch.no_grad():
        for module, path, name, _ in list(parameter_sites(whole)):
            sharded: Any = theirs[path, name]
            if id(sharded) not in made:
                value = sharded.full_tensor() if hasattr(sharded, "full_tensor") else sharded.detach().clone()
                made[id(sharded)] = nn.Parameter(value, requires_grad=sharded.requires_grad)
            module._parameters[name] = made[id(sharded)]
        buffers = dict(model.named_buffers(remove_duplicate=False))
        for path, module in whole.named_modules():
            for name in module._buffers:
                buffer = buffers.get(f"{path}.{name}" if path else name)
                module._buffers[name] = None if buffer is None else buffer.clone()
    return whole.train(model.training)


def _skeleton(model: PreTrainedModel) -> PreTrainedModel:
    """The same model without values and without what sharding adds to it: a class of its own, and a note in the
    config."""
    plain = next(c for c in type(model).__mro__ if issubclass(c, PreTrainedModel) and c.__name__ == _class_name(model))
    config = copy.deepcopy(model.config)
    if hasattr(config, "distributed_config"):
        del config.distributed_config
    with torch.device("meta"):
        made: Any = plain(config)
    if hasattr(model, "generation_config"):
        made.generation_config = copy.deepcopy(model.generation_config)
    return made


def _class_name(model: PreTrainedModel) -> str:
    """What the class is called without torch's prefix for a sharded one."""
    return type(model).__name__.removeprefix("FSDP")


def refuse_sharded(trainer: Any, what: str) -> None:
    """Refuse, before any training, what `what` ("a core", or else what is asked of a run without) would do wrongly to
    a sharded model.

    Raises: ValueError.
    """
    if not getattr(trainer.model, "is_distributed_loading_by_transformers", False):
        return
    for other, (applies, reason) in (_of_the_run(trainer, what) | _of_the_slots(trainer)).items():
        if applies:
            raise ValueError(f"got {what} for a sharded model with {other}; needs a run without, because {reason}")


def _of_the_run(trainer: Any, what: str) -> dict[str, tuple[bool, str]]:
    """What is asked of the run -> whether it is, and why that would be wrong."""
    args, sizes = trainer.args, trainer.model.config.distributed_config
    return {
        "parallelism besides FSDP": (
            max(sizes.tp_size, sizes.pp_size, sizes.ep_size) > 1,
            "the processes would share batches or layers; set fsdp_size alone",
        ),
        "fsdp_cpu_offload": (sizes.fsdp_cpu_offload, "the core is split from tensors gathered on the device"),
        "one optimizer state for both networks": (
            what == "a core" and trainer._one_state(),
            "no optimizer takes whole tensors and parts in one step; set --moments per_phase and another --schedule "
            "than sum",
        ),
        "--diagnostics_steps or --audit": (args.diagnostics_steps > 0 or args.audit, "they look at whole tensors"),
        "--fp16": (in_fp16(args), "GradScaler was not tried on parts; set --bf16"),
        "--load_best_model_at_end": (args.load_best_model_at_end, "checkpoints hold whole tensors"),
    }


def _of_the_slots(trainer: Any) -> dict[str, tuple[bool, str]]:
    """What the full network's slots hold -> whether they do, and why that would be wrong."""
    phase = trainer.plan.full
    rules = [rule for rule in (phase.perturbation, phase.grad_mask, phase.update_mask) if rule is not None]
    alone = [getattr(rule, "__self__", rule) for rule in rules if not works_on_parts(rule)]
    at_once = trainer.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
    several = trainer.args.gradient_accumulation_steps > 1
    return {
        f"the backward of {type(phase.backward).__name__}": (
            phase.backward is not None,
            "layers exchange their forward, in which FSDP puts their weights together; set apply_to core",
        ),
        '"communicate": "compressed"': (
            any(isinstance(rule, CompressedReduction) for rule in rules),
            'it is a hook of DistributedDataParallel, which does not wrap this model; set "dense"',
        ),
        f"the rule {type(alone[0]).__name__ if alone else None}": (
            bool(alone),
            "it ranks, scales or deals out what whole tensors hold, of which a process has a part; set apply_to core, "
            "or a method that does not: random_coordinates, rand_k, fixed, parameters, badam, lisa, freeze_out, sam, "
            "asam, extragradient, gaussian, stale, drop_connect, dropout, quantize or binary_connect per channel",
        ),
        "two passes and microbatches that are reduced together": (
            getattr(phase.perturbation, "needs_gradient", False) and several and not at_once,
            "the first pass needs this microbatch's gradient, reduced; set --accelerator_config "
            '\'{"gradient_accumulation_kwargs": {"sync_each_batch": true}}\'',
        ),
    }


def refuse_resuming(model: nn.Module, checkpoint: str) -> None:
    """Refuse to go on from a checkpoint with a sharded model.

    Raises: ValueError.
    """
    if is_sharded(model):
        raise ValueError(
            f"got resume_from_checkpoint={checkpoint!r} for a sharded model; needs a run from its beginning, because "
            "Transformers saves no optimizer state of such models; to go on from the weights alone, load the "
            "checkpoint by from_pretrained"
        )
