"""Train a Transformers model and the small model inside it at the same time."""

from . import loading  # registers the factorised core with transformers
from .arguments import MaskedArgumentsMixin, MaskedSeq2SeqTrainingArguments, MaskedTrainingArguments
from .cores import LowRankCoreConfig, add_core, core_mode, get_core, has_core, split
from .export import export, extract_core, merge_full
from .plan import Plan
from .summary import core_summary
from .trainer import MaskedSeq2SeqTrainer, MaskedTrainer, MaskedTrainerMixin
from .types import Phase, StepInfo

__all__ = [
    "LowRankCoreConfig",
    "MaskedArgumentsMixin",
    "MaskedSeq2SeqTrainer",
    "MaskedSeq2SeqTrainingArguments",
    "MaskedTrainer",
    "MaskedTrainerMixin",
    "MaskedTrainingArguments",
    "Phase",
    "Plan",
    "StepInfo",
    "add_core",
    "core_mode",
    "core_summary",
    "export",
    "extract_core",
    "get_core",
    "has_core",
    "loading",
    "merge_full",
    "split",
]
