"""Writing both products: the full model in its unchanged class at the root, the core beside it in `core/`."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from .cores import Core, get_core, get_cores
from .cores.attached import refuse_inside_core_mode
from .cores.base import Rung
from .cores.modules import unwrap
from .cores.sharded import gathered, is_sharded
from .durable import flush_all
from .export_folder import ADAPTER, check_writable, own_folders, staging_in, swap_in, written


def extract_core(
    model: PreTrainedModel, core_format: str | None = None, rung: Rung | None = None, name: str | None = None
) -> PreTrainedModel:
    """The core as a model of its own, independent of the full one, and in evaluation mode where that is.

    Args:
        model: a model with a core.
        core_format: one of the core's `formats`, None for the first: "factorized" (low rank: keeps x -> B (A x)) or
            "dense" (a plain model of the unchanged class; with low rank, W = B A is multiplied out).
        rung: only a smaller core inside the core, one of its `nested`; of a low-rank core the leading directions of
            any rank, an int, or a fraction of min(in_features, out_features), of which those of a ladder were trained
            to stand alone.
        name: which of several cores.

    Raises: ValueError without a core, for another format, or for a rung that the core does not hold.

    Cost: memory of the result.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> from hf_masked import DepthCoreConfig, add_core
    >>> model = add_core(GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=32)), DepthCoreConfig())
    >>> core = extract_core(model)
    >>> core.config.n_layer, core is get_core(model).model
    (1, False)
    """
    core = get_core(model, name)
    full: Any = unwrap(model)
    if core.active_thread is None:
        core.sync(full)
    with core.at_rung(rung):
        extracted: PreTrainedModel = core.extracted(_checked_format(core, core_format))
    return extracted.train(full.training)


def merge_full(model: PreTrainedModel) -> PreTrainedModel:
    """The full network as a plain model of the unchanged class, independent of the core, or of all its cores.

    Raises: ValueError without a core; RuntimeError inside `core_mode`.

    Cost: memory of the result. Of a sharded model, to be called on every process.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> from hf_masked import LowRankCoreConfig, add_core
    >>> model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=32))
    >>> merged = merge_full(add_core(model, LowRankCoreConfig(coupling="shared")))
    >>> type(model.transformer.h[0].mlp.c_fc).__name__, type(merged.transformer.h[0].mlp.c_fc).__name__
    ('MergedLinear', 'Conv1D')
    """
    full: Any = unwrap(model)
    core: Core = get_core(full, next(iter(get_cores(full)), None))
    refuse_inside_core_mode(full, "merge_full")
    return gathered(full) if is_sharded(full) else core.merge(full)


def _checked_format(core: Core, core_format: str | None) -> str:
    if core_format is not None and core_format not in core.formats:
        raise ValueError(
            f"got core_format={core_format!r}; needs one of {core.formats}, because the core is of the kind "
            f"{core.config.kind!r}; set core_format"
        )
    return core_format or core.formats[0]


def export(
    model: PreTrainedModel,
    out: str | os.PathLike[str],
    *,
    core_format: str | None = None,
    processing_class: Any = None,
    max_shard_size: int | str = "50GB",
    model_card: str | None = None,
) -> None:
    """Write full and core, or all its cores, so that stock tools load them.

    `out/` holds the full model in its unchanged class, for `AutoModel*.from_pretrained(out)` anywhere; `out/core/` the
    core, for `AutoModel*.from_pretrained(out, subfolder="core")` anywhere ("dense"), or after `import hf_masked`
    ("factorized"); the smaller cores of a ladder lie in `out/core-r8/` and so on, a core of another name in
    `out/<name>/`. All get the tokenizer and the generation config. Everything is written aside first; then config.json
    goes, the files change places, and config.json comes last, so that an interrupted export loads as nothing, and one
    that cannot take its place, or fails for lack of space, leaves the old export as it was; each stage is flushed to
    the disk before the next. Other files in `out/` are left alone; which folders are an export's own stands in
    `out/hf_masked_cores.json`.

    Args:
        model: a model with a core, with several, or without (then only the full model is written); one that is sharded
            has to be exported on every process, of which the first writes.
        out: the folder.
        core_format: see `extract_core`; of several cores, of every one.
        processing_class: tokenizer or processor to save beside each.
        max_shard_size: of one safetensors file.
        model_card: text of README.md.

    Raises: NotADirectoryError or PermissionError for a folder that cannot be written, IsADirectoryError for one where
        a file belongs; FileExistsError where a core would be written over somebody else's model, or the full model
        beside an adapter that would be loaded in its place; ValueError as `extract_core`; RuntimeError inside
        `core_mode`.

    Cost: disk space of the old export while the new one is written; memory of one core at a time, and with coupling
        "shared" of the merged model.

    >>> from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
    >>> from hf_masked import DepthCoreConfig, add_core
    >>> model = add_core(GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=32)), DepthCoreConfig())
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as out:
    ...     export(model, out)
    ...     AutoModelForCausalLM.from_pretrained(out, subfolder="core").config.n_layer
    1
    """
    full: Any = unwrap(model)
    refuse_inside_core_mode(full, "export")
    if is_sharded(full) and torch.distributed.get_rank() > 0:
        full.save_pretrained(out, is_main_process=False)  # which gathers for the first process, and writes nothing
        return
    target = check_writable(out)
    check_free(target, full)
    with staging_in(target) as staging:
        for folder in _write_networks(full, staging, core_format, max_shard_size):
            if processing_class is not None:
                processing_class.save_pretrained(folder)
        if model_card is not None:
            (staging / "README.md").write_text(model_card, encoding="utf-8")
        flush_all(staging)
        swap_in(staging, target)


def _write_networks(full: Any, out: Path, core_format: str | None, max_shard_size: int | str) -> Iterator[Path]:
    """Write the full model and every core, and say after each where it lies."""
    cores: list[Core] = list(get_cores(full).values())
    stock = full if all(core.full_is_plain for core in cores) else merge_full(full)
    stock.save_pretrained(out, max_shard_size=max_shard_size)
    yield out
    for core in cores:
        core.sync(full)
        for folder, rung in core_folders(core).items():
            with core.at_rung(rung):
                core.write(out / folder, _checked_format(core, core_format), max_shard_size)
            yield out / folder


def core_folders(core: Core) -> dict[str, Rung | None]:
    """Folder -> rung of the core in it: the whole core (None), and beside it the smaller ones of a ladder."""
    return {core.folder: None} | {f"{core.folder}-{name}": rung for name, rung in core.nested.items()}


def check_free(out: str | os.PathLike[str], model: torch.nn.Module) -> None:
    """Refuse to write the cores of a model over what no export put there, and the model beside an adapter.

    Raises: FileExistsError; as `check_writable` for folders of cores that are there.
    """
    full, own = unwrap(model), own_folders(Path(out))
    if Path(out, ADAPTER[0]).exists() and not getattr(full, "_hf_peft_config_loaded", False):
        raise FileExistsError(
            f"got the folder {out} with {ADAPTER[0]}; needs one without, because from_pretrained would load that "
            "adapter in place of the full model; move it, or set --output_dir"
        )
    for folder in [Path(out, name) for core in get_cores(full).values() for name in core_folders(core)]:
        if folder.exists():
            check_writable(folder)
        if folder.name not in own and (found := written(folder, of_core=True)):
            raise FileExistsError(
                f"got the folder {folder} with {found[0].name} that no export wrote; needs a folder of the core's "
                "own, because its files would be written over; move that folder, or set another name or --output_dir"
            )
