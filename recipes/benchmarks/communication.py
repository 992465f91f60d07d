"""What an update that trains a part costs on two processes, by who reduces its gradients: seconds, and bytes on the wire.

    OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 recipes/benchmarks/communication.py --output communication.json

A Llama and its low-rank core, gloo on processors. The updates of `alternate` and `ride_along` are those of two networks in turn;
`blocks` (badam, lisa) trains one block of the full network after another. One update is forward, backward and reduction. All ways take turns in every round, and the
median over rounds is reported, of this process's clock and of its processor; bytes are of the tensors that the profiler saw
handed to gloo's all-reduce in one more update, 4 an entry. `within backward` is the share of the reductions' time in which backward
went on, by DistributedDataParallel's own record.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from hf_masked import LowRankCoreConfig, StepInfo, add_core, get_core
from hf_masked.tensor_reduction import TensorReduction

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from kit.machine import hardware, versions

from benchmarks.clock import Taken


@dataclass
class Way:
    """A way to reduce.

    Args:
        update: makes one of the part that it is told.
        wrapper: part -> what reduces it.
    """

    update: Callable[[str], None]
    wrapper: Callable[[str], DistributedDataParallel]


@dataclass
class Trained:
    """The mask of the parameters whose names begin as told; as an update of `hf_masked` asks for it."""

    whole_tensors: ClassVar[bool] = True
    part: str = ""
    updates: int = 0

    def __call__(self, info: StepInfo, tensors: Any) -> dict[str, bool]:
        return {name: name.startswith(self.part) for name in tensors}

    def now(self) -> StepInfo:
        return StepInfo(self.updates, 1)


class Both(nn.Module):
    """Two networks in one DistributedDataParallel."""

    def __init__(self, full: nn.Module, core: nn.Module):
        super().__init__()
        self.full, self.core = full, core

    def forward(self, part: str, **batch: torch.Tensor) -> Any:
        return self.get_submodule(part)(**batch)


@dataclass
class Bench:
    """The setting of all ways to reduce.

    Args: as the flags of the command line.
    """

    width: int
    layers: int
    tokens: int
    bucket_mb: float

    def networks(self) -> tuple[Any, Any]:
        """The same ones, anew for each way."""
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=2048, hidden_size=self.width, intermediate_size=4 * self.width,
            num_hidden_layers=self.layers, num_attention_heads=self.width // 64,
        )  # fmt: skip
        full = add_core(LlamaForCausalLM(config), LowRankCoreConfig(rank=0.125))
        return full, get_core(full).model

    def batch(self) -> dict[str, torch.Tensor]:
        """This process's."""
        generator = torch.Generator().manual_seed(dist.get_rank())
        ids = torch.randint(2048, (max(1, self.tokens // 128), 128), generator=generator)
        return {"input_ids": ids, "labels": ids}

    def wrap(self, network: nn.Module, looks: bool) -> DistributedDataParallel:
        return DistributedDataParallel(network, find_unused_parameters=looks, bucket_cap_mb=self.bucket_mb)

    # ---- two networks ----

    def a_wrapper_each(self, core_looks: bool) -> Way:
        """The full network as Trainer wraps it by default."""
        full, core = self.networks()
        wrapped = {"full": self.wrap(full, True), "core": self.wrap(core, core_looks)}
        batch = self.batch()

        def update(part: str) -> None:
            wrapped[part](**batch).loss.backward()
            wrapped[part].zero_grad()

        return Way(update, wrapped.__getitem__)

    def one_wrapper(self, skips: bool) -> Way:
        """Both networks in one wrapper, which looks for what is not used, and may leave it out of the reduction."""
        both, rule, batch = Both(*self.networks()), Trained(), self.batch()
        wrapped = self.wrap(both, True)
        if skips:
            TensorReduction(rule).attach(wrapped, dict(both.named_parameters()), rule.now)

        def update(part: str) -> None:
            rule.part, rule.updates = f"{part}.", rule.updates + 1
            wrapped(part, **batch).loss.backward()
            wrapped.zero_grad()

        return Way(update, lambda part: wrapped)

    # ---- one block of one network ----

    def blocks(self, held: bool, skips: bool, looks: bool) -> Way:
        """One wrapper; the other blocks' gradients are computed or `held` back, reduced or skipped."""
        full, rule, batch = self.networks()[0], Trained(), self.batch()
        wrapped = self.wrap(full, looks)
        if skips:
            TensorReduction(rule).attach(wrapped, dict(full.named_parameters()), rule.now)

        def update(part: str) -> None:
            rule.part, rule.updates = part, rule.updates + 1
            with only(full, part if held else ""):
                wrapped(**batch).loss.backward()
            wrapped.zero_grad()

        return Way(update, lambda part: wrapped)

    def a_wrapper_per_block(self) -> Way:
        """Each made of one block's parameters; the others are held back."""
        full, batch = self.networks()[0], self.batch()
        wrapped = {}
        for part in self.parts("blocks"):
            with only(full, part):
                wrapped[part] = self.wrap(full, False)

        def update(part: str) -> None:
            with only(full, part):
                wrapped[part](**batch).loss.backward()
            full.zero_grad()

        return Way(update, wrapped.__getitem__)

    # ---- all of them ----

    def parts(self, phases: str) -> list[str]:
        """What the updates of a cycle train."""
        return [f"model.layers.{i}." for i in range(self.layers)] if phases == "blocks" else ["full", "core"]

    def ways(self, phases: str) -> dict[str, Callable[[], Way]]:
        """By name; the first is what the others are compared with."""
        if phases == "blocks":
            return {
                "one wrapper, all gradients": lambda: self.blocks(False, False, True),
                "one wrapper, others held still": lambda: self.blocks(True, False, True),
                "a hook that skips them": lambda: self.blocks(False, True, False),
                "a hook that skips them, others held still": lambda: self.blocks(True, True, True),
                "a wrapper per block, others held still": self.a_wrapper_per_block,
            }
        return {
            "a wrapper per network": lambda: self.a_wrapper_each(False),
            "a wrapper per network, both look for unused": lambda: self.a_wrapper_each(True),
            "one wrapper that looks for unused": lambda: self.one_wrapper(False),
            "one wrapper, a hook that skips them": lambda: self.one_wrapper(True),
        }

    def measure(self, phases: str, rounds: int) -> list[dict[str, Any]]:
        """A row per way and kind of update."""
        ways = {name: make() for name, make in self.ways(phases).items()}
        kinds = self.parts(phases)
        taken: dict[tuple[str, str], list[Taken]] = {(name, kind): [] for name in ways for kind in kinds}
        for number in range(-2, rounds):
            for name in list(ways)[:: 1 if number % 2 else -1]:
                for kind in kinds:
                    dist.barrier()
                    started = Taken.stamp()
                    ways[name].update(kind)
                    if number >= 0:
                        taken[name, kind].append(Taken.stamp() - started)
        rows = []
        for (name, kind), samples in taken.items():
            sent = sent_by(lambda: ways[name].update(kind))  # noqa: B023, called at once
            rows.append(
                {
                    "phases": phases,
                    "way": name,
                    "update": kind.rstrip("."),
                    "ms": 1000 * statistics.median(s.wall for s in samples),
                    "processor_ms": 1000 * statistics.median(s.processor for s in samples),
                    "overlap": overlap(ways[name].wrapper(kind)),
                    "bytes": sent,
                    "bytes_of_part": self.bytes_of(kind),
                }
            )
        return rows

    def bytes_of(self, part: str) -> int:
        full, core = self.networks()
        named = (core if part == "core" else full).named_parameters()
        return sum(p.nbytes for name, p in named if part in ("full", "core") or name.startswith(part))


@contextmanager
def only(network: nn.Module, part: str) -> Iterator[None]:
    """Inside, nothing is differentiated by other parameters."""
    others = [p for name, p in network.named_parameters() if not name.startswith(part)]
    for p in others:
        p.requires_grad_(False)
    yield
    for p in others:
        p.requires_grad_(True)


def overlap(wrapped: DistributedDataParallel) -> float:
    """The share of the time of its reductions in which backward went on, by its own record."""
    record = wrapped._get_ddp_logging_data()
    within: float = record["avg_backward_compute_comm_overlap_time"] / record["avg_backward_comm_time"]
    return within


def sent_by(update: Callable[[], None]) -> int:
    """Bytes that this process hands to all-reduce meanwhile."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        update()
    shapes = [event.input_shapes[0] for event in seen.events() if event.name == "gloo:all_reduce"]
    return sum(4 * torch.Size(shape).numel() for shape in shapes)


def table(rows: list[dict[str, Any]]) -> str:
    """In markdown: means over the updates of a cycle where they are alike, blocks that is."""
    lines = ["| phases | way | update | ms | processor ms | bytes reduced | / bytes of what it trains | within backward |",
             "|---|---|---|---:|---:|---:|---:|---:|"]  # fmt: skip
    keys = dict.fromkeys((r["phases"], r["way"], "block" if r["phases"] == "blocks" else r["update"]) for r in rows)
    for phases, way, kind in keys:
        alike = [r for r in rows if (r["phases"], r["way"]) == (phases, way) and kind in ("block", r["update"])]
        ms, processor, sent, part, within = (
            statistics.mean(r[field] for r in alike)
            for field in ("ms", "processor_ms", "bytes", "bytes_of_part", "overlap")
        )
        lines.append(
            f"| {phases} | {way} | {kind} | {ms:.0f} | {processor:.0f} | {sent:,.0f} | {sent / part:.3f} | {within:.2f} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Print the table, and write rows, settings, versions and hardware."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256, help="per process and update")
    parser.add_argument("--bucket_mb", type=float, default=25, help="as DistributedDataParallel has it by default")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", help="JSON file to write")
    args = parser.parse_args(argv)
    dist.init_process_group("gloo")
    bench = Bench(args.width, args.layers, args.tokens, args.bucket_mb)
    rows = [row for phases in ("networks", "blocks") for row in bench.measure(phases, args.rounds)]
    if dist.get_rank() == 0:
        print(table(rows))
        if args.output:
            words = ["OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 recipes/benchmarks/communication.py"]
            command = " ".join(words + (sys.argv[1:] if argv is None else argv))
            report = {"command": command, "versions": versions(), "hardware": hardware()}
            report |= {"settings": vars(args), "rows": rows}
            Path(args.output).write_text(json.dumps(report, indent=1), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
