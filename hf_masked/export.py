"""Writing both products: the full model in its unchanged class at the root, the core beside it in `core/`."""

import copy
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .cores.base import get_core, has_core, linear_at, parent_and_name, unwrap
from .cores.linear import MergedLinear
from .loading import LowRankFormat

CORE_FOLDER = "core"
CoreFormat = Literal["factorized", "dense"]
_WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")
# the file without which nothing loads: gone first and back last, so that no mixture of two exports ever loads
_ENTRY = "config.json"


def extract_core(model: PreTrainedModel, core_format: CoreFormat = "factorized") -> PreTrainedModel:
    """The core as a model of its own, independent of the full one.

    Args:
        model: a model with a core.
        core_format: "factorized" keeps x -> B (A x); "dense" multiplies W = B A out, so that the result is a plain
            model of the unchanged class, of the full model's size.

    Raises: ValueError without a core or for another format.

    Cost: memory of the result.
    """
    if core_format not in ("factorized", "dense"):
        raise ValueError(f"got core_format={core_format!r}; needs 'factorized' or 'dense'")
    core = get_core(model)
    core.sync(unwrap(model))
    extracted = _without_autocast(copy.deepcopy(core.model))
    extracted.requires_grad_(True)
    if core_format == "factorized":
        ranks = {path: site.rank for path, site in core.sites.items()}
        extracted.config.quantization_config = LowRankFormat(ranks)
        return extracted
    for path, site in core.sites.items():
        factors = linear_at(extracted, path)
        _put_dense(extracted, path, factors.dense_weight(), factors.bias, site.transposed)
    return extracted


def merge_full(model: PreTrainedModel) -> PreTrainedModel:
    """The full network as a plain model of the unchanged class, independent of the core.

    Raises: ValueError without a core.

    Cost: memory of the result.
    """
    full: Any = unwrap(model)
    core = get_core(full)
    merged = _without_autocast(copy.deepcopy(full, {id(core): None}))
    for path, module in list(merged.named_modules()):
        if isinstance(module, MergedLinear):
            weight = module.dense_weight()
            _put_dense(merged, path, weight, module.bias, module.transposed)
    return merged


def _without_autocast(model: PreTrainedModel) -> PreTrainedModel:
    """Take off the forward that accelerate puts on a model for mixed precision."""
    if "_original_forward" in vars(model):
        del model._original_forward
        vars(model).pop("forward", None)
    return model


def _put_dense(model: nn.Module, path: str, weight: torch.Tensor, bias: nn.Parameter | None, transposed: bool) -> None:
    parent, name = parent_and_name(model, path)
    out_features, in_features = weight.shape
    with torch.device("meta"):
        dense = (
            Conv1D(out_features, in_features) if transposed else nn.Linear(in_features, out_features, bias is not None)
        )
    dense.weight = nn.Parameter((weight.T if transposed else weight).detach().contiguous())
    dense.bias = bias
    dense.train(parent.training)
    setattr(parent, name, dense)


def export(
    model: PreTrainedModel,
    out: str | os.PathLike[str],
    *,
    core_format: CoreFormat = "factorized",
    processing_class: Any = None,
    max_shard_size: int | str = "50GB",
    model_card: str | None = None,
) -> None:
    """Write full and core so that stock tools load them.

    `out/` holds the full model in its unchanged class, for `AutoModel*.from_pretrained(out)` anywhere; `out/core/` the
    core, for `AutoModel*.from_pretrained(out, subfolder="core")` after `import hf_masked` ("factorized"), or anywhere
    ("dense"). Both get the tokenizer and the generation config. Everything is written aside first; then config.json
    goes, the files change places, and config.json comes last, so that an interrupted export loads as nothing, and one
    that fails for lack of space leaves the old export as it was. Other files in `out/` are left alone.

    Args:
        model: a model with a core, or without (then only the full model is written).
        out: the folder.
        core_format: see `extract_core`.
        processing_class: tokenizer or processor to save beside both.
        max_shard_size: of one safetensors file.
        model_card: text of README.md.

    Raises: NotADirectoryError or PermissionError for a folder that cannot be written; ValueError as `extract_core`.

    Cost: disk space of the old export while the new one is written; memory of the core, and with coupling "shared" of
        the merged model.
    """
    full: Any = unwrap(model)
    target = check_writable(out)
    with _staging(target) as staging:
        _write_network(_stock_full(full), staging, processing_class, max_shard_size)
        if has_core(full):
            core = extract_core(full, core_format)
            _write_network(core, staging / CORE_FOLDER, processing_class, max_shard_size)
        if model_card is not None:
            (staging / "README.md").write_text(model_card, encoding="utf-8")
        _swap_in(staging, target)


def check_writable(out: str | os.PathLike[str]) -> Path:
    """The folder as a path, made if need be.

    Raises: NotADirectoryError or PermissionError where nothing can be written.
    """
    path = Path(out)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(
            f"got the output folder {path}; needs a folder, because {error.filename} is a file; set --output_dir"
        ) from None
    except OSError as error:
        raise PermissionError(
            f"got the output folder {path}; needs one that can be written, because both models are saved there "
            f"({error.strerror}); set --output_dir"
        ) from None
    return path


def _stock_full(full: Any) -> PreTrainedModel:
    shares = has_core(full) and any(isinstance(m, MergedLinear) for m in full.modules())
    return merge_full(full) if shares else full


def _write_network(model: PreTrainedModel, folder: Path, processing_class: Any, max_shard_size: int | str) -> None:
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if processing_class is not None:
        processing_class.save_pretrained(folder)


@contextmanager
def _staging(target: Path) -> Iterator[Path]:
    for abandoned in target.glob(".export-*"):
        shutil.rmtree(abandoned, ignore_errors=True)
    # inside the target, so that moving a file is a rename on one file system
    folder = Path(tempfile.mkdtemp(prefix=".export-", dir=target))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _swap_in(staging: Path, target: Path) -> None:
    """Exchange the files of two exports so that no moment of it loads as a mixture."""
    new = sorted(path.relative_to(staging) for path in staging.rglob("*") if path.is_file())
    for old_entry in (target / _ENTRY, target / CORE_FOLDER / _ENTRY):
        old_entry.unlink(missing_ok=True)
    for folder in (target, target / CORE_FOLDER):
        for pattern in _WEIGHTS:
            for stale in folder.glob(pattern):
                stale.unlink()
    for relative in sorted(new, key=lambda path: (path.name == _ENTRY, path == Path(_ENTRY))):
        (target / relative).parent.mkdir(parents=True, exist_ok=True)
        os.replace(staging / relative, target / relative)
