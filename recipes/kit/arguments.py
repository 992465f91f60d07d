"""The settings every recipe has, and how they are read: a YAML or JSON file first, flags over it."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from hf_masked.argument_checks import PAPER
from hf_masked.typed import json_object

# settings of a model, and of a tokenizer, that are made anew
OF_NEW_MODELS = ("vocab_size", "model_type", "model_config")


@dataclass
class RecipeArguments:
    """Data, model and comparison settings that the recipes share."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "A Hub data set, or a local file (txt, jsonl, json, csv, parquet), or a local folder with one "
            "such file per split (train, validation, test). Where there is no validation split, 5 percent of the "
            "rows are held out by a hash of their text."
        },
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of a Hub data set that has several."}
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on the first n rows of the train split only."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Evaluate on the first n rows (causal_lm: blocks) of a split only."}
    )
    vocab_size: int = field(
        default=4096, metadata={"help": "Size of the BPE vocabulary that is trained on the train split."}
    )
    model_type: str | None = field(
        default=None,
        metadata={"help": "Architecture of a model that is trained from scratch, as AutoConfig names it."},
    )
    model_config: dict | str | None = field(  # type: ignore[type-arg]
        default=None,
        metadata={"help": "JSON (or a mapping in YAML): fields of the architecture's config, such as hidden_size."},
    )
    cache_dir: str | None = field(
        default=None,
        metadata={"help": "Where the tokenized data is kept for the next run; default: the HF datasets cache."},
    )
    seeds: list[int] | None = field(
        default=None, metadata={"help": "Repeat the run for each seed and report mean and standard deviation."}
    )
    compare: bool = field(
        default=False,
        metadata={
            "help": "Also train the alternatives (each part alone, the paper's alternation, SVD of the trained full "
            "and then core steps, plain or distilled) at equal update steps and at equal FLOPs, and add their rows. "
            "A ride_along schedule then gets as many core updates as the FLOPs of the distilled SVD arm pay for."
        },
    )
    compare_arms: list[str] | None = field(
        default=None, metadata={"help": "Train only these arms of --compare, by the keys in the results file."}
    )
    compare_distill_weight: float = field(
        default=0.5,
        metadata={"help": "Distillation weight of the arm that tunes the SVD core under a frozen teacher."},
    )
    compare_learning_rate_scales: list[float] | None = field(
        default=None,
        metadata={
            "help": "Try each of these core learning-rate scales in every arm that has core steps, and report the one "
            "with the lowest mean validation loss of the core. Default: --core_learning_rate_scale alone."
        },
    )

    def __post_init__(self) -> None:
        self.model_fields = json_object(self.model_config, "model_config", '{"hidden_size": 256}')
        for name in ("max_train_samples", "max_eval_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"got {name}={value}; needs at least 1, because nothing would be left; set --{name}")
        if self.vocab_size < 300:
            raise ValueError(
                f"got vocab_size={self.vocab_size}; needs at least 300, because the 256 bytes and the special tokens "
                "are part of it; set --vocab_size"
            )
        scales = self.compare_learning_rate_scales
        if scales is not None and (not scales or min(scales) <= 0):
            raise ValueError(
                f"got compare_learning_rate_scales={self.compare_learning_rate_scales}; needs positive numbers, "
                "because they multiply the learning rate; set --compare_learning_rate_scales"
            )


def parse(types: Sequence[type], argv: Sequence[str], description: str, **defaults: Any) -> tuple[Any, ...]:
    """Parse `[config.yaml] [--flag value ...]` into one object per dataclass in `types`.

    A flag beats the file, the file beats `defaults`, and these beat the defaults of the dataclasses. A flag that names another
    core, the preset "paper" or a pretrained model also beats what the file says of the core, of what the preset fixes, or of
    new models.
    """
    parser = HfArgumentParser(
        list(types),  # type: ignore[arg-type]
        description=description,
        usage="%(prog)s [config.yaml | config.json] [--flag value ...]",
        allow_abbrev=False,
    )
    parser.set_defaults(**defaults)
    known = {action.dest for action in parser._actions}
    fixed = {name: parser.get_default(name) for name in PAPER if name in known}
    of_new = {name: parser.get_default(name) for name in OF_NEW_MODELS if name in known}
    flags = list(argv)
    if flags and not flags[0].startswith("-"):
        parser.set_defaults(**_read_settings(flags.pop(0), known))
    given = {flag.removeprefix("--").partition("=")[0] for flag in flags if flag.startswith("--")}
    asked = parser.parse_known_args(flags)[0]
    if parser.get_default("cores") or "cores" in given:
        parser.set_defaults(core=None, core_config=None)  # those of a single core, in a file or of the recipe
    elif "core" in given and asked.core != parser.get_default("core"):
        parser.set_defaults(core_config=None)
    if "preset" in given and asked.preset == "paper":
        parser.set_defaults(**fixed)
    if "model_name_or_path" in given:
        parser.set_defaults(**of_new)
    *parsed, unread = parser.parse_args_into_dataclasses(
        flags, return_remaining_strings=True, look_for_args_file=False
    )
    if unread:
        rule = f"a flag of this recipe (see --help){_perhaps(unread[0].removeprefix('--'), known, '--')}"
        if not unread[0].startswith("--"):
            rule = "only flags with their values behind the settings file, which comes first; put it there"
        raise ValueError(f"got {unread[0]!r}; needs {rule}")
    return tuple(parsed)


def _perhaps(name: str, known: set[str], before: str = "") -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f", perhaps {before + close[0]!r} is meant" if close else ""


def _read_settings(path: str, known: set[str]) -> dict[str, Any]:
    if Path(path).suffix not in {".yaml", ".yml", ".json"} or not Path(path).is_file():
        raise FileNotFoundError(
            f"got {path!r} as the first argument; needs an existing .yaml or .json file of settings, because "
            "everything else is a --flag; check the path"
        )
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(
            f"got {path!r}; needs YAML or JSON, because settings are read from it; mend it: {error}"
        ) from None
    if not isinstance(settings, dict):
        raise ValueError(f"got a {type(settings).__name__} in {path!r}; needs a mapping of flag names to values")
    for name in settings.keys() - known:
        hint = _perhaps(str(name), known)
        raise ValueError(f"got setting {name!r} in {path!r}; needs a flag of this recipe (see --help){hint}")
    return {name: _as_flag(value) for name, value in settings.items()}


def _as_flag(value: Any) -> Any:
    """Hand scalars to the parser as text, so that a file's values pass the same type checks as a flag's."""
    return str(value) if isinstance(value, bool | int | float) else value
