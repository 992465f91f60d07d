"""The model and the data that everything is measured on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_masked import LowRankCoreConfig, add_core

Precision = Literal["fp32", "tf32", "bf16"]
PRECISION_HELP = "'fp32'; 'tf32': its products in TF32; 'bf16': autocast to it, and TF32 for the rest."


@dataclass(frozen=True)
class Setting:
    """A decoder and the batches it is trained on.

    Args:
        width, layers, vocabulary: of a Llama whose feed-forward layers are 8/3 as wide.
        tokens: of one batch, in rows of `sequence`.
        rank: of the core, an int, or a float as a fraction of the width.
        precision: of training.
    """

    width: int
    layers: int
    vocabulary: int
    tokens: int
    sequence: int
    rank: int | float
    precision: Precision = "fp32"

    @property
    def training_arguments(self) -> dict[str, Any]:
        """Trainer's options for the precision; bf16 has TF32 for what autocast leaves in float32."""
        cuda = torch.cuda.is_available()
        tf32 = self.precision == "tf32" or (self.precision == "bf16" and cuda)
        return {"bf16": self.precision == "bf16", "use_cpu": not cuda} | ({"tf32": True} if tf32 else {})

    @property
    def rows(self) -> int:
        """Rows of a batch."""
        return max(1, self.tokens // self.sequence)

    @property
    def inner_width(self) -> int:
        """Width of the feed-forward layers."""
        return round(self.width * 8 / 3 / 16) * 16

    def new_model(self) -> LlamaForCausalLM:
        """A freshly initialised full network, always the same."""
        torch.manual_seed(0)
        heads = max(1, self.width // 64)
        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=self.inner_width,
            num_hidden_layers=self.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=self.sequence,
        )
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model: Any = LlamaForCausalLM(config)
        return model

    def with_core(self, coupling: str, split: bool = False) -> Any:
        """The same network with a core.

        Args: `split`: where the schedule starts the core; else never, for that is one SVD per layer, once in a run, and no part
            of an update.
        """
        split_at: Any = None if split else []
        config = LowRankCoreConfig(rank=self.rank, coupling=coupling, split_at=split_at, init="random")  # type: ignore[arg-type]
        return add_core(self.new_model(), config)

    def dataset(self, batches: int) -> list[dict[str, torch.Tensor]]:
        """Random tokens: what they say costs nothing."""
        generator = torch.Generator().manual_seed(0)
        rows = torch.randint(self.vocabulary, (batches * self.rows, self.sequence), generator=generator)
        return [{"input_ids": row, "labels": row} for row in rows]


@dataclass
class BenchmarkArguments:
    """Options of the benchmark."""

    width: int = field(default=512, metadata={"help": "Hidden size of the Llama that is trained; a multiple of 64."})
    layers: int = field(default=4, metadata={"help": "Its layers."})
    vocabulary: int = field(default=4096, metadata={"help": "Its vocabulary."})
    tokens: int = field(default=2048, metadata={"help": "Tokens of one batch."})
    sequence: int = field(default=256, metadata={"help": "Tokens of one row of it."})
    rank: float = field(default=0.125, metadata={"help": "Rank of the core, < 1 as a fraction of the width."})
    precision: Precision = field(default="fp32", metadata={"help": PRECISION_HELP})
    repeats: int = field(default=15, metadata={"help": "Rounds; each runs every trainer once, in turn."})
    steps: int = field(
        default=3, metadata={"help": "Timed update steps of a trainer in one round, after one untimed."}
    )
    memory_width: int = field(
        default=768, metadata={"help": "Hidden size for the peak memory, where weights have to outweigh activations."}
    )
    memory_layers: int = field(default=8, metadata={"help": "Layers for the peak memory."})
    memory_tokens: int = field(default=256, metadata={"help": "Tokens of one batch for the peak memory."})
    clock: str = field(
        default="wall",
        metadata={
            "help": "'wall': seconds; 'processor': processor seconds of this process, for a machine that does other work "
            "too. Set OMP_NUM_THREADS=1 then, since threads that wait for each other count as busy."
        },
    )
    parts: list[str] = field(
        default_factory=lambda: ["steps", "linear", "memory"],
        metadata={"help": "What to measure: 'steps', 'linear' (merging B A into R against the side path), 'memory'."},
    )
    output: str | None = field(
        default=None,
        metadata={"help": "JSON file to write; the tables go beside it as Markdown. Default: print only."},
    )

    def __post_init__(self) -> None:
        for name in ("width", "layers", "vocabulary", "tokens", "sequence", "repeats", "steps", "memory_width",
                     "memory_layers", "memory_tokens"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"got {name}={getattr(self, name)}; needs an integer >= 1; set --{name}")
        for name in ("width", "memory_width"):
            if getattr(self, name) % 64:
                raise ValueError(
                    f"got {name}={getattr(self, name)}; needs a multiple of 64, because attention heads are 64 wide; "
                    f"set --{name}"
                )
        if self.clock not in ("wall", "processor"):
            raise ValueError(f"got clock={self.clock!r}; needs 'wall' or 'processor'; set --clock")
        if unknown := set(self.parts) - {"steps", "linear", "memory"}:
            raise ValueError(f"got parts {sorted(unknown)}; needs some of 'steps', 'linear', 'memory'; set --parts")

    def _rank(self) -> int | float:
        return self.rank if self.rank < 1 else int(self.rank)

    def for_steps(self) -> Setting:
        """What steps are timed on."""
        return Setting(
            self.width, self.layers, self.vocabulary, self.tokens, self.sequence, self._rank(), self.precision
        )

    def for_memory(self) -> Setting:
        """What the peak memory is measured on."""
        sequence = min(self.sequence, self.memory_tokens)
        return Setting(
            self.memory_width,
            self.memory_layers,
            self.vocabulary,
            self.memory_tokens,
            sequence,
            self._rank(),
            self.precision,
        )
