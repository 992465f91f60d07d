"""Nested state on disk without pickles: `NAME.json` says how it is built, `NAME.safetensors` holds its tensors.

>>> import tempfile
>>> folder = Path(tempfile.mkdtemp())
>>> save_state(folder, "optimizer", {"state": {0: {"step": torch.tensor(3.0), "betas": (0.9, 0.95)}}})
>>> load_state(folder, "optimizer")
{'state': {0: {'step': tensor(3.), 'betas': (0.9, 0.95)}}}

JSON has no tuples, no keys but strings and no tensors: an object is {"tuple": [...]}, {"items": [[key, value], ...]},
{"tensor": name, "shape": [...]} or, for any other dict, {"dict": {...}}.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .loading import tensor_shapes
from .transfer import finish_moves

VERSION = 1


def save_state(folder: Path, name: str, state: Any) -> None:
    """Write numbers, strings, None, lists, tuples, dicts and tensors, nested in any way.

    Raises: TypeError for anything else, such as a function or a tensor subclass.

    Cost: memory of the tensors that are not contiguous, or share theirs with another one.
    """
    tensors: dict[str, torch.Tensor] = {}
    tree = _encode(state, name, tensors)
    folder.mkdir(parents=True, exist_ok=True)
    if tensors:
        write_tensors(folder / f"{name}.safetensors", tensors)
    (folder / f"{name}.json").write_text(json.dumps({"version": VERSION, "state": tree}), encoding="utf-8")


def write_tensors(file: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file.

    Cost: memory of the tensors that are not contiguous, or share theirs with another one.
    """
    finish_moves()
    save_file(_apart(tensors), file, metadata)


def check_savable(name: str, state: Any) -> None:
    """Refuse what `save_state` would; nothing is written.

    Raises: TypeError.
    """
    _encode(state, name, {})


def check_state(folder: Path, name: str) -> None:
    """Refuse files that are missing, damaged, of another version or not of one save, by all but the tensors' values.

    Raises: ValueError.
    """
    _checked(folder, name)


def load_state(folder: Path, name: str) -> Any:
    """Read what `save_state` wrote, tensors on the CPU; nothing in the files is executed.

    Raises: ValueError as `check_state`.
    """
    tree, has_tensors = _checked(folder, name)
    file = folder / f"{name}.safetensors"
    with reading(file):
        # copies, since safetensors maps the file, which would keep a deleted checkpoint's room on the disk
        tensors = {key: tensor.clone() for key, tensor in load_file(file).items()} if has_tensors else {}
    return _decode(tree, lambda key, shape: tensors[key])


def _checked(folder: Path, name: str) -> tuple[Any, bool]:
    """The tree that the JSON describes, and whether there are tensors in it."""
    file, of_tensors = folder / f"{name}.json", folder / f"{name}.safetensors"
    wanted: dict[str, tuple[int, ...]] = {}
    with reading(file):
        told = json.loads(file.read_text(encoding="utf-8"))
        version, tree = told["version"], told["state"]
    if version != VERSION:
        raise ValueError(
            f"got {file} of format version {version!r}; needs {VERSION}, because that is what this hf_masked reads; "
            "install the version of hf_masked that wrote it"
        )
    with reading(file):
        _decode(tree, lambda key, shape: wanted.update({key: tuple(shape)}))
    stored = stored_shapes(of_tensors) if wanted else {}
    if wrong := sorted(key for key in wanted.keys() | stored.keys() if wanted.get(key) != stored.get(key)):
        raise ValueError(
            f"got {of_tensors}, which differs from {file.name} at {wrong[:3]}; needs the tensors that it was saved "
            "with, because a half-loaded state would train on; name another checkpoint"
        )
    return tree, bool(wanted)


def _encode(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if type(value) in (torch.Tensor, torch.nn.Parameter) and value.layout == torch.strided:
        key = f"{len(tensors)}.{path}"
        tensors[key] = value.detach()
        return {"tensor": key, "shape": list(value.shape)}
    if isinstance(value, dict):
        members = {key: _encode(v, f"{path}.{key}", tensors) for key, v in value.items()}
        if all(isinstance(key, str) for key in value):
            return {"dict": members}
        return {"items": [[_encode(key, path, tensors), member] for key, member in members.items()]}
    if type(value) in (list, tuple, torch.Size):
        listed = [_encode(v, f"{path}.{index}", tensors) for index, v in enumerate(value)]
        return listed if isinstance(value, list) else {"tuple": listed}
    raise TypeError(
        f"got a {type(value).__name__} as {path}; needs tensors, numbers, strings, lists and dicts, because a "
        "checkpoint holds no pickles; set another --optim or --lr_scheduler_type, or --save_only_model"
    )


def _decode(tree: Any, tensor: Callable[[str, list[int]], Any]) -> Any:
    if isinstance(tree, list):
        return [_decode(member, tensor) for member in tree]
    if not isinstance(tree, dict):
        return tree
    if tree.keys() == {"tensor", "shape"}:
        return tensor(tree["tensor"], tree["shape"])
    ((tag, members),) = tree.items()
    if tag == "tuple":
        return tuple(_decode(member, tensor) for member in members)
    if tag == "dict":
        return {key: _decode(member, tensor) for key, member in members.items()}
    if tag == "items":
        return {_decode(key, tensor): _decode(member, tensor) for key, member in members}
    raise ValueError(f"an object with the key {tag!r}")


def _apart(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each contiguous and in memory of its own, as safetensors asks."""
    seen: set[int] = set()
    made = {}
    for key, given in tensors.items():
        tensor = given.detach()
        place = tensor.untyped_storage().data_ptr()
        made[key] = tensor.clone(memory_format=torch.contiguous_format) if place in seen else tensor.contiguous()
        seen.add(place)
    return made


def stored_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors in a safetensors file, from its header; the format ties that to the file's length.

    Raises: ValueError for a missing or damaged file.
    """
    with reading(file):
        return tensor_shapes(file)


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Whatever goes wrong inside is the fault of that file's content.

    Raises: ValueError.
    """
    try:
        yield
    except (
        OSError,
        SafetensorError,
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise ValueError(
            f"got the unreadable file {file} ({type(error).__name__}: {error}); needs what was saved there; it is "
            "missing, damaged or cut off: name another checkpoint"
        ) from error
