"""Train a Transformers model and the small model inside it at the same time."""

from . import loading  # noqa: F401  (registers the factorised core with transformers)
from .arguments import MaskedArgumentsMixin, MaskedSeq2SeqTrainingArguments, MaskedTrainingArguments
from .cores import (
    Core,
    CoreConfig,
    DepthCoreConfig,
    LoraCoreConfig,
    LowRankCoreConfig,
    ParametrizedCore,
    SparseCoreConfig,
    WidthCoreConfig,
    add_core,
    core_mode,
    get_core,
    get_cores,
    has_core,
    split,
    to_semi_structured,
)
from .drafting import draft_view, measure_acceptance
from .export import export, extract_core, merge_full
from .plan import Plan
from .summary import core_summary
from .trainer import MaskedSeq2SeqTrainer, MaskedTrainer, MaskedTrainerMixin
from .types import Phase, StepInfo

__all__ = [
    "Core",
    "CoreConfig",
    "DepthCoreConfig",
    "LoraCoreConfig",
    "LowRankCoreConfig",
    "MaskedArgumentsMixin",
    "MaskedSeq2SeqTrainer",
    "MaskedSeq2SeqTrainingArguments",
    "MaskedTrainer",
    "MaskedTrainerMixin",
    "MaskedTrainingArguments",
    "ParametrizedCore",
    "Phase",
    "Plan",
    "SparseCoreConfig",
    "StepInfo",
    "WidthCoreConfig",
    "add_core",
    "core_mode",
    "core_summary",
    "draft_view",
    "export",
    "extract_core",
    "get_core",
    "get_cores",
    "has_core",
    "measure_acceptance",
    "merge_full",
    "split",
    "to_semi_structured",
]
