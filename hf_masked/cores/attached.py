"""The cores that hang on a model, by name, and running a model as one of them."""

import keyword
import re
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .base import DEFAULT_NAME, Core, Rung, tables
from .modules import unwrap

# what logs, metrics and folders have under these names already
_TAKEN = (
    "full", "sum", "eval", "train", "test", "predict", "loss", "model", "samples", "steps", "runtime", "joint",
    "training_state", "runs", "logs", "checkpoint",
)  # fmt: skip


def get_cores(model: nn.Module) -> dict[str, Any]:
    """Name -> core of a model, in the order in which they were added; empty for a model without one.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> from hf_masked import DepthCoreConfig, LowRankCoreConfig, add_core
    >>> model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=32))
    >>> model = add_core(add_core(model, LowRankCoreConfig(), name="small"), DepthCoreConfig(), name="shallow")
    >>> [*get_cores(model)]
    ['small', 'shallow']
    """
    return {value.name: value for value in vars(unwrap(model)).values() if isinstance(value, Core)}


def has_core(model: nn.Module) -> bool:
    """Whether `add_core` was called on the model.

    >>> has_core(nn.Linear(2, 2))
    False
    """
    return bool(get_cores(model))


def get_core(model: nn.Module, name: str | None = None) -> Any:
    """The core of a model: a `Core`, of the class that its config made.

    Args: `name` of one of several; None for the only one.

    Raises: ValueError where the model has none, none of that name, or several and none is named.

    Cost: none; the core is looked up.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> from hf_masked import DepthCoreConfig, add_core
    >>> model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=32))
    >>> get_core(add_core(model, DepthCoreConfig())).model.config.n_layer
    1
    """
    cores = get_cores(model)
    if not cores:
        raise ValueError(
            f"got a {type(model).__name__} without a core; needs one, because this runs or saves the core; "
            "call add_core(model, LowRankCoreConfig(...)) first, or set --core low_rank"
        )
    if name is None and len(cores) == 1:
        return next(iter(cores.values()))
    if name not in cores:
        raise ValueError(
            f"got name={name!r} for a model with the cores {list(cores)}; needs one of them, because this is about "
            "one core; set name="
        )
    return cores[name]


def attach_core(model: PreTrainedModel, core: Core, name: str = DEFAULT_NAME) -> None:
    """Make `core` the core of that name of `model`: a plain attribute `hf_masked_<name>`. From now on
    `save_pretrained` of the core network saves what loads as the core, that of a full network which shares its layers
    the merged one.

    Raises: ValueError where another core has its folder.
    """
    folder = core.folder if name == DEFAULT_NAME else name
    if folder in (other.folder for other in get_cores(model).values()):
        raise ValueError(
            f"got the core name {name!r}, whose export would lie in {folder}/ as another core's does; needs a folder "
            "of its own; set another name"
        )
    core.beside(get_cores(model).values())
    core.name, core.folder = name, folder
    core.made_for = _shapes(model)
    setattr(model, f"hf_masked_{name}", core)
    # on the instances, which Transformers and Trainer ask; the classes stay as they are
    vars(core.model)["save_pretrained"] = core.save_pretrained
    if not core.full_is_plain:
        vars(model)["save_pretrained"] = MethodType(_save_merged, model)


def _save_merged(
    full: PreTrainedModel, save_directory: str, is_main_process: bool = True, state_dict: Any = None, **kwargs: Any
) -> None:
    """`save_pretrained` of a full network whose own tensors, B A + R, its class would not find: the merged one."""
    if state_dict is not None:
        raise ValueError(
            "got state_dict= for a model with a core of coupling 'shared'; needs none, because its W = B A + R are "
            "merged before they are saved; drop it, or save merge_full(model)"
        )
    merged: PreTrainedModel = next(iter(get_cores(full).values())).merge(full)
    merged.save_pretrained(save_directory, is_main_process, **kwargs)


def detach_cores(model: nn.Module, but: Collection[str]) -> None:
    """Take off all cores but these, other than those that are part of the full network."""
    for name, core in get_cores(model).items():
        if name not in but and core.full_is_plain:
            delattr(unwrap(model), f"hf_masked_{name}")


def refuse_inside_core_mode(model: nn.Module, what: str) -> None:
    """Refuse what is about the full network where `core_mode` has put the core in its place, on any thread.

    Raises: RuntimeError.
    """
    if active := [core.name for core in get_cores(model).values() if core.active_thread is not None]:
        raise RuntimeError(
            f"got {what} inside core_mode; needs the full network, because the model is its core {active[0]!r} until "
            "core_mode is left; leave it first"
        )


def refuse_changed(model: PreTrainedModel) -> None:
    """Refuse a model whose parameters are no longer those that its cores were made for.

    Raises: ValueError.
    """
    now = _shapes(model)
    for name, core in get_cores(model).items():
        for path, shape in core.made_for.items():
            if now.get(path) != shape:
                raise ValueError(
                    f"got a model whose {path} of shape {shape} when its core {name!r} was made is "
                    f"{now.get(path, 'gone')} now; needs the same, because the core has one that fits and starts from "
                    "the model again in training; resize or wrap the model before add_core"
                )


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {path: tuple(parameter.shape) for path, parameter in model.named_parameters(remove_duplicate=False)}


@contextmanager
def cores_apart(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model has no core, so that a copy of it has none either."""
    held = {key: value for key, value in vars(model).items() if isinstance(value, Core)}
    for key in held:
        delattr(model, key)
    try:
        yield
    finally:
        vars(model).update(held)


def check_name(name: str, others: dict[str, Any]) -> None:
    """Refuse a name that metrics `eval_<name>_...`, log rows and a folder cannot have.

    Args: `others`: the cores, by name, beside which it is to stand.

    Raises: ValueError.

    >>> check_name("small", {"core": None})
    """
    reasons = {
        "a lower-case identifier of ASCII letters, digits and _": (
            re.fullmatch(r"[a-z][a-z0-9_]*", name) is None or keyword.iskeyword(name),
            "it is part of metrics, a folder and a line of Python",
        ),
        f"none of {_TAKEN}": (name in _TAKEN, "metrics, log rows and folders are called so already"),
        f"none that begins one of {list(others)} or begins with one": (
            any(f"{name}_".startswith(f"{other}_") or f"{other}_".startswith(f"{name}_") for other in others),
            "their metrics would be mistaken for each other's",
        ),
    }
    for rule, (applies, reason) in reasons.items():
        if applies:
            raise ValueError(f"got the core name {name!r}; needs {rule}, because {reason}; set another name")


@contextmanager
def core_mode(model: PreTrainedModel, rung: Rung | None = None, name: str | None = None) -> Iterator[PreTrainedModel]:
    """Inside this context the model is its core: `forward`, `generate`, `save_pretrained`, `named_parameters`.

    May be nested; the full network is back afterwards, also after an exception. Not for two threads at once: the
    switch belongs to the model object, so a second thread would run whichever network the first one chose. Threads
    that want both call `get_core(model).model` directly.

    Args:
        rung: run a smaller core inside the core: one of its `nested`; of a low-rank core any rank, an int, or a
            fraction of min(in_features, out_features).
        name: which of several cores.

    Raises: ValueError without a core, or for a rung that it does not hold; RuntimeError when another thread is inside,
        or inside another core.

    Cost: none per layer; the model's tables of children are exchanged.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> from hf_masked import DepthCoreConfig, add_core
    >>> model = add_core(GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=32)), DepthCoreConfig())
    >>> with core_mode(model):
    ...     len(model.transformer.h), model.config.n_layer
    (1, 1)
    >>> len(model.transformer.h)
    2
    """
    full = unwrap(model)
    core = get_core(full, name)
    inside = core.active_thread == threading.get_ident()
    if core.active_thread is not None and not inside:
        raise RuntimeError(
            "got core_mode(model) from a second thread; needs one thread at a time, because the switch belongs to the "
            "model object; call get_core(model).model(...) instead, which switches nothing"
        )
    if active := [
        other.name for other in get_cores(full).values() if other is not core and other.active_thread is not None
    ]:
        raise RuntimeError(
            f"got core_mode of {core.name!r} inside that of {active[0]!r}; needs one at a time, because the model is "
            f"{active[0]!r} now, not the full network; leave it first, or call get_core(model, "
            f"{core.name!r}).model(...)"
        )
    if not inside:
        core.sync(full)
        core.model.train(full.training)
    with core.at_rung(rung):
        theirs, mine = tables(full), tables(core.model)
        held, core.active_thread = core.active_thread, threading.get_ident()
        full.__dict__.update(mine)
        try:
            yield model
        finally:
            full.__dict__.update(theirs)
            for only_mine in mine.keys() - theirs.keys():
                del full.__dict__[only_mine]
            core.active_thread = held
