"""Reading the full network's weights back from the root of a checkpoint: all of them, or none.

Trainer's own reading skips what it does not find, and with it every tensor that transformers stores under another name
than the model has (ViT's do, as of 5.23).
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from .state_files import reading


def load_full(full: Any, checkpoint: str | Path) -> None:
    """Copy the weights that an export wrote into the model, in place.

    Raises: ValueError for missing, damaged or misshapen tensors; the model is untouched then.

    Cost: memory of the weights, and once more where transformers stores them under other names.
    """
    wanted = full.state_dict()
    stored: dict[str, torch.Tensor] = {}
    for file in sorted(Path(checkpoint).glob("model*.safetensors")):
        with reading(file):
            stored |= load_file(file)
    if _missing(full, wanted, stored) and not set(stored) <= set(wanted):
        with reading(Path(checkpoint, "model.safetensors")):
            stored = _by_the_model_s_names(full, checkpoint)
    wrong = _missing(full, wanted, stored)
    wrong += [name for name, tensor in stored.items() if name in wanted and tensor.shape != wanted[name].shape]
    if wrong:
        raise ValueError(
            f"got the checkpoint {checkpoint} whose model.safetensors differs at {wrong[:3]}; needs the tensors of "
            "this model, because a half-loaded one would train on; name another checkpoint"
        )
    with torch.no_grad():
        for name in stored.keys() & wanted.keys():
            wanted[name].copy_(stored[name])


def _by_the_model_s_names(full: Any, checkpoint: str | Path) -> dict[str, torch.Tensor]:
    fresh, told = type(full).from_pretrained(
        checkpoint,
        config=full.config,
        dtype=full.dtype,
        output_loading_info=True,
        local_files_only=True,
        use_safetensors=True,
    )
    missing = set(told["missing_keys"])
    return {name: tensor for name, tensor in fresh.state_dict().items() if name not in missing}


def _missing(full: Any, wanted: dict[str, torch.Tensor], stored: dict[str, torch.Tensor]) -> list[str]:
    """Names without a stored tensor, neither their own nor that of one they are tied to."""
    there = {tensor.data_ptr() for name, tensor in wanted.items() if name in stored}
    made_anew = set(full._keys_to_ignore_on_save or ())
    return [n for n, t in wanted.items() if n not in stored and t.data_ptr() not in there and n not in made_anew]
