"""Values that came from JSON, YAML or a command line, held against the type hints of the fields they are for."""

import json
import types
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, is_dataclass
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def check_types(instance: Any, of: type, advice: Callable[[str], str]) -> None:
    """Refuse a field of another type than its hint says; an int will do for a float, a tuple or set for a list.

    Args:
        instance: a dataclass object.
        of: the dataclass whose fields are looked at; a base of the instance's class, or that class.
        advice: field name -> what to do about it, for the error.

    Raises: ValueError.
    """
    hints = get_type_hints(of)
    for field in fields(of):
        check_type(field.name, getattr(instance, field.name), hints[field.name], advice(field.name))


def check_type(name: str, value: object, hint: Any, advice: str) -> None:
    """Refuse one value of another type than its hint says, as `check_types` does.

    Raises: ValueError.
    """
    if not _fits(value, hint):
        raise ValueError(
            f"got {name}={value!r}; needs {_spelt(hint)}, because anything else would be read as something it does "
            f"not mean; {advice}"
        )


def _fits(value: object, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in inner)
    if origin is list:
        return isinstance(value, list | tuple | set) and all(_fits(one, inner[0]) for one in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(k, inner[0]) and _fits(v, inner[1]) for k, v in value.items())
    if hint in (int, float):
        return isinstance(value, (int, float) if hint is float else int) and not isinstance(value, bool)
    # what JSON knows; an object of a class of its own is the business of the field's own check
    return (origin or hint) not in (str, bool, tuple, types.NoneType) or isinstance(value, origin or hint)


def _spelt(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType) and any(get_origin(one) is Literal for one in get_args(hint)):
        return " or ".join("None" if one is types.NoneType else _spelt(one) for one in get_args(hint))
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("typing.", "")


def from_json(value: Any, name: str, rule: str, advice: str) -> Any:
    """What a text says as JSON; anything else is itself.

    Raises: ValueError for text that is no JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"got {name}={value!r}; needs {rule}, because {error}; {advice}") from None


def as_json(value: Any) -> Any:
    """What JSON would hold of a value: dicts for dataclass objects, lists for sets and tuples, their values for
    enumerations.

    >>> as_json({"target_modules": {"v_proj", "q_proj"}})
    {'target_modules': ['q_proj', 'v_proj']}
    """
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {key: as_json(one) for key, one in value.items()}
    if isinstance(value, set | frozenset | list | tuple):
        return [as_json(one) for one in (sorted(value) if isinstance(value, set | frozenset) else value)]
    return value.value if isinstance(value, Enum) else value


def json_object(value: Any, flag: str, example: str) -> dict[str, Any]:
    """The options that a flag holds, a mapping or JSON text; a copy, empty for None.

    >>> json_object('{"rank": 8}', "core_config", '{"rank": 0.125}')
    {'rank': 8}

    Raises: ValueError for what is no JSON object.
    """
    if value is None:
        return {}
    rule = f"a JSON object such as '{example}'"
    options = from_json(value, flag, rule, f"set --{flag}")
    if not isinstance(options, Mapping):
        raise ValueError(f"got {flag}={value!r}; needs {rule}, because options have names; set --{flag}")
    return dict(options)


def without_common(one: dict[str, Any], other: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two dicts without the entries that they have in common.

    >>> without_common({"rank": 4, "init": "svd"}, {"rank": 2, "init": "svd"})
    ({'rank': 4}, {'rank': 2})
    """
    same = {key for key in one.keys() & other.keys() if one[key] == other[key]}
    mine, theirs = ({key: value for key, value in values.items() if key not in same} for values in (one, other))
    return mine, theirs
