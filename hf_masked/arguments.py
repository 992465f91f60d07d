"""The fields that joint training adds to `TrainingArguments`, each checked when it is parsed."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import Seq2SeqTrainingArguments, TrainingArguments

from .argument_checks import CORE_RATE, apply_preset, as_number, refuse_together, refuse_values
from .cores import CORE_KINDS, CoreConfig
from .cores.base import DEFAULT_NAME
from .described import described_core, described_plan
from .launch import join_processes, refuse_deepspeed
from .methods import summaries
from .named_cores import OWN, NamedCore, parse_cores
from .plan import Plan
from .typed import as_json, check_types


@dataclass
class MaskedArgumentsMixin:
    """Joint training of a full network and its core. Mix it into any `TrainingArguments` subclass, in front of it.

    Each field says in its `help` what it is, with its default and legal range; those that hold options take a dict or
    JSON. A core update minimises core_loss_weight * ((1 - w) * label loss + w * divergence), w = distill_weight.

    Raises: ValueError for a value out of range, an option that there is not, and fields that contradict each other.

    Source: `preset="paper"` is Mohtashami, Jaggi, Stich, AISTATS 2022, arXiv 2106.08895; `divergence` says that of
        teaching.

    >>> @dataclass
    ... class MyArguments(MaskedArgumentsMixin, Seq2SeqTrainingArguments): ...
    >>> MyArguments("out", schedule="alternate", report_to="none").make_plan().schedule.core_steps
    1
    """

    core: str | None = field(
        default=None,
        metadata={
            "help": f"The small network trained inside the full one: {', '.join(CORE_KINDS)}; or 'none' for plain "
            "training. A model that already went through add_core needs no value."
        },
    )
    core_config: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "JSON of the core's options. All kinds: coupling (free | shared), split_at, split_every. "
            "low_rank, e.g. '{\"rank\": 0.125}': rank (int, or float as a fraction of min(in, out), or chosen by "
            "singular values: 'energy:0.9', 'stable'), rank_pattern, budget (in place of rank: the share of the "
            "targets' parameters that the core has, distributed over layers), ranks (in place of rank: a ladder of "
            "nested ranks, each evaluated and exported) and rung_sampling (sandwich | sandwich_sum | round_robin), "
            "target_modules ('all-linear', names, or a regular expression), exclude_modules, init (svd | activation: "
            "nearest in outputs on the last batches, of which calibration_batches | random), private (none | norms | "
            "biases | embeddings | all). lora, e.g. '{\"r\": 8}': PEFT's own names: r, lora_alpha, target_modules, "
            "exclude_modules, rank_pattern, alpha_pattern, modules_to_save, lora_dropout, use_rslora, "
            "init_lora_weights, task_type; or ranks and rung_sampling, as of low_rank. depth: keep, keep_encoder, "
            "keep_decoder (a fraction of the blocks, or their numbers; a list of either is a ladder, as ranks). "
            "width: neurons, heads (a fraction or a number; a list is a ladder), order (first | magnitude). sparse: "
            "sparsity (a fraction, or 'n:m'), target_modules, exclude_modules, grow_every (core updates; "
            "gradient-grown masks), grow_share, grow_until."
        },
    )
    cores: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": 'Several cores in one run, in place of core and core_config: JSON of {name: {"kind": ..., option: '
            'value}}, e.g. \'{"small": {"kind": "low_rank", "rank": 0.125}, "shallow": {"kind": "depth", '
            '"core_updates": 2}}\'. kind is what core chooses from, options are those of core_config (coupling free '
            f"for low_rank and lora) and {', '.join(OWN)}. core_updates and start are those of ride_along; the core "
            "steps of any other schedule go round the cores, each as often as its share says (default 1). What is not "
            "said of a core is as the flags say. Each is evaluated as eval_<name>_* and exported to <name>/."
        },
    )
    preset: str = field(
        default="ride_along",
        metadata={
            "help": "'ride_along': the default of every field below. 'paper': plain alternation of full and core "
            "steps that share A and B (W = B A + R), as in Mohtashami et al. 2022: schedule alternate, coupling "
            "shared, shared moments and learning-rate curve, no distillation."
        },
    )
    schedule: dict[str, Any] | str | None = field(
        default="ride_along",
        metadata={
            "help": 'Which network each update step trains; a name or JSON such as \'{"name": "ride_along", '
            '"core_updates": 15.0, "start": 0.9}\'. ride_along: every step is an ordinary full update, and from '
            "`start` (update step, or fraction of the run) on `core_updates` core updates follow it (0: a core is "
            "made, and never trained); alternate: `full_steps` full, `core_steps` core; random: core with "
            "`probability`; sum: both losses in one update; full_then_joint: `full_steps` full ones, then in turn; "
            "heal: in turn, the last `core_steps` core only; core_only; full_only."
        },
    )
    method: str | None = field(
        default=None,
        metadata={
            "help": f"A method of partial SGD for the updates; with or without a core. {summaries()} Default: none of "
            "them."
        },
    )
    method_config: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "JSON of the method's options, e.g. '{\"density\": 0.05}'; they are the parameters of the "
            'function of its name in hf_masked/methods/. A scalar may be a schedule: \'{"density": {"name": "cubic", '
            '"start": 1.0, "end": 0.1, "until": 0.8}}\' (constant, linear, cosine, cubic, piecewise, warmup). '
            "apply_to (full | core | both): whose updates."
        },
    )
    diagnostics_steps: int = field(
        default=0,
        metadata={
            "help": "Every how many update steps to measure what the update keeps of the gradient (captured energy, "
            "drift ratio, alignment, relative perturbation, coverage, core-full gap), with one more forward and "
            "backward, and with several processes the bytes of gradients that each network reduced; "
            "summarised in diagnostics.json and diagnostics.png (needs matplotlib). 0: never."
        },
    )
    audit: bool = field(
        default=False,
        metadata={
            "help": "Prove by checksum, in every update on every process, that masked entries did not move and "
            "displaced parameters came back; the run fails where one did not. Slow."
        },
    )
    core_loss_weight: float = field(default=1.0, metadata={"help": "Factor of the core's loss, > 0."})
    core_learning_rate_scale: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of core updates over --learning_rate, > 0. A factorised layer moves less per step "
            "than a dense one, so the default is 2; with --preset paper it is 1."
        },
    )
    distill_weight: float = field(
        default=0.4,
        metadata={
            "help": "w in [0, 1] of the core's loss (1 - w) * label loss + w * divergence from the full network's "
            "(detached) logits. It yields by itself as the core's label loss nears the full network's on batches that "
            "neither has seen (those of the first epoch); once data repeat it stays as it is. Less (0.2) suits a "
            "full network that the run leaves far from trained out."
        },
    )
    distill_temperature: float = field(
        default=1.0, metadata={"help": "Temperature T > 0 of the divergence; it is multiplied by T^2."}
    )
    distill_buffer: int = field(
        default=512,
        metadata={
            "help": "Under ride_along: how many of the last batches, those before the core starts too, are kept in "
            "main memory, with the top-k logits that the full updates computed anyway (each takes about 1.04 of one "
            "that keeps none, at a vocabulary of 32,000), for core updates to draw from, least used ones first. 0: "
            "the current batch only. Checkpoints carry it as joint/replay.safetensors; its size is logged as "
            "distill_buffer_bytes."
        },
    )
    distill_top_k: int = field(
        default=16,
        metadata={
            "help": "How many logits per token the buffer keeps, >= 1; the rest counts as one class with their joint "
            "probability."
        },
    )
    moments: str | None = field(
        default=None,
        metadata={
            "help": "'per_phase': core updates have an optimizer state of their own; 'shared': one state for both, "
            "which matters for parameters that both train. Default: per_phase; shared for the schedule sum."
        },
    )
    lr_curve: str = field(
        default="per_phase",
        metadata={
            "help": "'per_phase': full and core each follow the learning-rate schedule over their own updates; "
            "'shared': both over the update steps of the run."
        },
    )
    mask_seed: int = field(
        default=0, metadata={"help": "Seed of everything that joint training draws: schedules, replay, core dropout."}
    )

    def __post_init__(self) -> None:
        refuse_deepspeed(self)
        join_processes(self)
        super().__post_init__()  # type: ignore[misc]
        for name in ("core_loss_weight", "core_learning_rate_scale", "distill_weight", "distill_temperature"):
            setattr(self, name, as_number(getattr(self, name)))
        self.core_config, self.cores = as_json(self.core_config), as_json(self.cores)
        check_types(self, MaskedArgumentsMixin, lambda name: f"set --{name}")
        apply_preset(self)
        refuse_values(self)
        if self.core_learning_rate_scale is None:
            self.core_learning_rate_scale = 1.0 if self.preset == "paper" else CORE_RATE
        refuse_together(self)
        for core in self.named_cores():
            self.make_plan(core)
        self.make_plan()
        self.make_core_configs()

    @property
    def wants_cores(self) -> bool:
        """Whether the fields ask for a core, or several; a model may bring its own."""
        return self.core not in (None, "none") or self.cores is not None

    def named_cores(self) -> dict[str, NamedCore]:
        """What `cores` says of each; empty without."""
        return {} if self.cores is None else parse_cores(self.cores)

    def make_plan(self, name: str | None = None, among: Sequence[str] | None = None) -> Plan:
        """The plan that the fields describe, for the core of that name in `cores` with what is its own.

        Args: `among`: the names of all cores of the model, which take turns; default: those in `cores`.

        Raises: ValueError for fields that do not go together.
        """
        return described_plan(self, self.named_cores(), name, among)

    def make_core_configs(self) -> dict[str, CoreConfig]:
        """Name -> configuration of every core that the fields describe."""
        if self.cores is None:
            return {DEFAULT_NAME: self.make_core_config()}
        return {name: core.config for name, core in self.named_cores().items()}

    def make_core_config(self) -> CoreConfig:
        """The configuration that `core` and `core_config` describe."""
        return described_core(self.core, self.core_config, self.preset)


@dataclass
class MaskedTrainingArguments(MaskedArgumentsMixin, TrainingArguments):
    """`TrainingArguments` with the fields of joint training.

    Raises: ValueError as `MaskedArgumentsMixin`.

    >>> args = MaskedTrainingArguments("out", core="low_rank", core_config='{"rank": 8}', report_to="none")
    >>> args.make_core_config().to_dict()["rank"]
    8
    """


@dataclass
class MaskedSeq2SeqTrainingArguments(MaskedArgumentsMixin, Seq2SeqTrainingArguments):
    """`Seq2SeqTrainingArguments` with the fields of joint training.

    Raises: ValueError as `MaskedArgumentsMixin`.

    >>> args = MaskedSeq2SeqTrainingArguments("out", predict_with_generate=True, core="width", report_to="none")
    >>> args.make_core_config().kind
    'width'
    """
