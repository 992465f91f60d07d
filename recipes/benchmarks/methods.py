"""What a method costs, as a ratio to plain training with the same optimizer, measured side by side in one process.

    OMP_NUM_THREADS=1 python recipes/benchmarks/methods.py [--width 256 --layers 8 --tokens 256] [--output FILE.json]

Prints a table with a goal next to every figure; `--help` lists all options.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import statistics
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainingArguments, default_data_collator

from hf_masked import MaskedTrainer, MaskedTrainingArguments, StepInfo
from hf_masked.masked_optimizer import MaskedSteps, StepMask
from hf_masked.meprop import MeProp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from kit.machine import PeakMemory, hardware, versions
from kit.table import render

from benchmarks.clock import CLOCK, Taken
from benchmarks.setting import PRECISION_HELP, Precision, Setting
from benchmarks.steps import WARM_UP, Contestant, Measurements, Round, train

PLAIN = "plain"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# so few that weights, gradients and moments are most of what is held
MEMORY_TOKENS = 64
# of the entries, that a masked step moves
PARTS = ("times", "memory", "single")
MASKED_SHARES = (0.01, 0.1, 0.3, 0.5, 0.75, 0.9)
# of AdamW: Trainer's own, and what the goal speaks of
MASKED_KINDS = ("fused", "foreach")


@dataclass(frozen=True)
class Row:
    """A method and its goals: of its step time and of its optimizer state, over plain training's."""

    title: str
    method: str
    config: dict[str, Any] = field(default_factory=dict)
    time_goal: float | None = None
    state_goal: float | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of training."""
        return {"method": self.method, "method_config": self.config}


def rows(layers: int) -> list[Row]:
    """Every method that a goal is set for, and a few more."""
    upper = "|".join(str(layer) for layer in range(layers // 2, layers))
    one = {"blocks": 1, "every": 1, "rest": "freeze"}
    offloaded = Row("the same, moments of all layers kept, off the accelerator", "lisa",
                    {**one, "state_policy": "freeze", "offload_state": True}, None, 0.2)  # fmt: skip
    return [
        Row("sgd (nothing on)", "sgd", {}, 1.02),
        Row("top_k, 10 %", "top_k", {"density": 0.1}, 1.25),
        Row("top_k, 1 %", "top_k", {"density": 0.01}, 1.25),
        Row("topk_ef, 1 %", "topk_ef", {"density": 0.01}),
        Row("parameters: upper half of the layers, head", "parameters",
            {"trained": rf".*layers\.({upper})\..*|.*\.norm\.weight|lm_head.*"}, 0.70),
        Row("badam: one layer at a time", "badam", {"every": 1, "rest": "freeze"}, 0.75, 0.2),
        Row("random blocks: one layer at a time", "lisa", {**one, "state_policy": "reset"}, 0.75, 0.2),
        *([offloaded] if torch.cuda.is_available() else []),
        Row("rigl, between changes of its mask", "rigl", {}, 1.15),
        Row("gmp, between changes of its mask", "gmp", {"density": 0.3}, 1.15),
        Row("sam", "sam", {}, 2.1),
        Row("extragradient", "extragradient", {}, 2.1),
        Row("drop_connect", "drop_connect", {}, 1.15),
    ]  # fmt: skip


@dataclass
class MethodsArguments:
    """Options of the benchmark."""

    width: int = field(default=256, metadata={"help": "Hidden size of the Llama that is trained; a multiple of 64."})
    layers: int = field(default=8, metadata={"help": "Its layers."})
    vocabulary: int = field(default=1024, metadata={"help": "Its vocabulary."})
    tokens: int = field(default=256, metadata={"help": "Tokens of one batch; the fewer, the more a method's share."})
    precision: Precision = field(default="fp32", metadata={"help": PRECISION_HELP})
    repeats: int = field(default=5, metadata={"help": "Rounds; each trains by every method once, in turn."})
    steps: int = field(default=2, metadata={"help": "Timed update steps of a method in one round, after one untimed."})
    clock: str = field(
        default=CLOCK,
        metadata={"help": "'wall': seconds; 'processor': processor seconds, for a machine that does other work too."},
    )
    parts: list[str] = field(
        default_factory=lambda: list(PARTS),
        metadata={
            "help": "What to measure: 'times' of update steps; 'memory': at the peak, and of optimizer state; 'single': "
            "one layer's backward of meprop, and the step of single entries."
        },
    )
    output: str | None = field(
        default=None,
        metadata={"help": "JSON file to write; the table goes beside it as Markdown. Default: print only."},
    )

    def __post_init__(self) -> None:
        for name in ("width", "layers", "vocabulary", "tokens", "repeats", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"got {name}={getattr(self, name)}; needs an integer >= 1; set --{name}")
        if self.clock not in ("wall", "processor"):
            raise ValueError(f"got clock={self.clock!r}; needs 'wall' or 'processor'; set --clock")
        if unknown := set(self.parts) - set(PARTS):
            raise ValueError(f"got parts {sorted(unknown)}; needs some of {', '.join(PARTS)}; set --parts")

    def setting(self) -> Setting:
        """What is trained."""
        sequence = min(128, self.tokens)
        return Setting(self.width, self.layers, self.vocabulary, self.tokens, sequence, 0.125, self.precision)


def measure_times(setting: Setting, entered: list[Row], args: MethodsArguments) -> Measurements:
    """Let every method train in turn."""
    last = WARM_UP + args.steps
    contestants = [Contestant(setting.new_model(), None, {PLAIN: (WARM_UP, last)}, last)]
    for row in entered:
        contestants.append(Contestant(setting.new_model(), row.options, {row.title: (WARM_UP, last)}, last))
    measured = Measurements(args.clock)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.repeats):
            this_round: Round = {}
            for contestant in contestants if number % 2 == 0 else reversed(contestants):
                this_round |= train(contestant, setting, folder)
            measured.rounds.append(this_round)
            print(f"round {number + 1}/{args.repeats}", flush=True)
    return measured


def state_bytes(options: dict[str, Any] | None, layers: int) -> float:
    """Mean over update steps of the optimizer state's bytes where the model lies, for a narrow one of as many layers."""
    setting = Setting(64, layers, 64, 16, 16, 0.125)
    seen: list[int] = []

    class Note(TrainerCallback):
        def on_optimizer_step(self, *unused: Any, optimizer: Any = None, **others: Any) -> None:
            inner = getattr(optimizer, "optimizer", optimizer)
            tensors = [v for state in inner.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
            here = [tensor for tensor in tensors if tensor.numel() == 1 or tensor.device == trainer.args.device]
            seen.append(sum(tensor.numel() * tensor.element_size() for tensor in here))

    with tempfile.TemporaryDirectory() as folder:
        arguments: dict[str, Any] = dict(output_dir=folder, max_steps=layers, report_to="none", disable_tqdm=True,
                                         save_strategy="no", logging_strategy="no", remove_unused_columns=False,
                                         per_device_train_batch_size=1)  # fmt: skip
        given: dict[str, Any] = dict(model=setting.new_model(), train_dataset=setting.dataset(layers),
                                     data_collator=default_data_collator, callbacks=[Note()])  # fmt: skip
        trainer = (
            Trainer(args=TrainingArguments(**arguments), **given)
            if options is None
            else MaskedTrainer(args=MaskedTrainingArguments(**arguments, **options), **given)
        )
        trainer.train()
    return statistics.mean(seen)


def peak_bytes(options: dict[str, Any] | None, setting: Setting) -> int | None:
    """Bytes held at most in as many update steps as layers, of a few tokens, model included, beyond what was held before."""
    short = dataclasses.replace(setting, tokens=MEMORY_TOKENS, sequence=MEMORY_TOKENS)
    peak = PeakMemory()
    with tempfile.TemporaryDirectory() as folder:
        train(Contestant(short.new_model(), options, {}, setting.layers), short, folder)
    return peak.read()


def meprop_ratio(clock: str, tokens: int, rounds: int = 9) -> float:
    """Seconds of the backward of a linear layer of 1,024 outputs that follows 5 % of them, over the dense one's."""
    layer = torch.nn.Linear(1024, 1024, device=DEVICE)
    x, grad = (torch.randn(tokens, 1024, device=DEVICE) for _ in range(2))
    x.requires_grad_()

    def backward() -> float:
        y = layer(x)
        layer.zero_grad()
        started = Taken.stamp()
        y.backward(grad)
        return (Taken.stamp() - started).seconds(clock)

    ratios = []
    for _ in range(rounds):
        dense = backward()
        with MeProp(0.05)(StepInfo(0, 1), layer):
            ratios.append(backward() / dense)
    return statistics.median(ratios)


def masked_step_ratios(setting: Setting, kind: str, clock: str, rounds: int = 5) -> dict[float, float]:
    """Seconds of a step of that kind of AdamW that holds random entries still, over a foreach one that moves all, by the
    share kept."""
    twins = [setting.new_model() for _ in range(2)]
    for parameter in (p for model in twins for p in model.parameters()):
        parameter.grad = torch.randn_like(parameter)
    plain, masked = (
        torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=k == "foreach", fused=k == "fused")
        for model, k in zip(twins, ("foreach", kind), strict=True)
    )
    steps, parameters = MaskedSteps(masked), dict(twins[1].named_parameters())

    def seconds(optimizer: torch.optim.Optimizer) -> float:
        started = Taken.stamp()
        optimizer.step()
        return (Taken.stamp() - started).seconds(clock)

    found = {}
    for share in MASKED_SHARES:
        kept = {n: torch.rand(p.shape, device=DEVICE) < share for n, p in parameters.items()}
        steps.obey(StepMask(parameters, kept))
        ratios = [seconds(masked) / seconds(plain) for _ in range(rounds + 1)]
        found[share] = statistics.median(ratios[1:])
    return found


def time_cells(row: Row, measured: Measurements | None) -> list[str]:
    """Step time over plain training's, quartiles, the fastest steps', goal, whether it is reached."""
    if measured is None:
        return ["-"] * 5
    low, ratio, high = measured.ratio(row.title, PLAIN)
    goal, reached = "-", "-"
    if row.time_goal is not None:
        goal, reached = f"<= {row.time_goal:.2f}", "yes" if ratio <= row.time_goal else "no"
    fastest = f"{measured.fastest_ratio(row.title, PLAIN):.2f}"
    return [f"{ratio:.2f}", f"{low:.2f} - {high:.2f}", fastest, goal, reached]


def memory_cells(row: Row, states: dict[str, float], peaks: dict[str, int | None]) -> list[str]:
    """Optimizer state and peak over plain training's."""
    if not states:
        return ["-"] * 2
    state = f"{states[row.title]:.2f}" + ("" if row.state_goal is None else f" (goal <= {row.state_goal})")
    plain, peak = peaks[PLAIN], peaks[row.title]
    return [state, f"{peak / plain:.2f}" if plain and peak else "-"]


HEADINGS = ["method", "step time", "quartiles", "fastest steps", "goal", "reached", "optimizer state", "peak memory"]


def main() -> None:
    """Parse, measure, print, write."""
    parser = HfArgumentParser(MethodsArguments, description=__doc__)  # type: ignore[arg-type]
    (args,) = parser.parse_args_into_dataclasses()
    entered, setting = rows(args.layers), args.setting()
    before = os.getloadavg()[0]
    states: dict[str, float] = {}
    peaks: dict[str, int | None] = {}
    if "memory" in args.parts:
        plain_state = state_bytes(None, args.layers)
        states = {row.title: state_bytes(row.options, args.layers) / plain_state for row in entered}
        peak_bytes(None, setting)  # what libraries set up once is nobody's
        peaks = {PLAIN: peak_bytes(None, setting)}
        peaks |= {row.title: peak_bytes(row.options, setting) for row in entered}
    single = "single" in args.parts
    meprop = meprop_ratio(args.clock, max(1024, args.tokens)) if single else None
    masked = {kind: masked_step_ratios(setting, kind, args.clock) for kind in MASKED_KINDS} if single else {}
    measured = measure_times(setting, entered, args) if "times" in args.parts else None
    load = f"{before:.1f} and {os.getloadavg()[0]:.1f}"
    command = shlex.join(["python", "recipes/benchmarks/methods.py", *sys.argv[1:]])
    threads = os.environ.get("OMP_NUM_THREADS")
    command = f"OMP_NUM_THREADS={threads} {command}" if threads else command
    where = hardware()
    cells = [[row.title, *time_cells(row, measured), *memory_cells(row, states, peaks)] for row in entered]
    seconds = "" if measured is None else f" Plain: {1000 * measured.seconds(PLAIN):.1f} ms a step."
    paragraphs = [
        f"`{command}`",
        f"Ratios to plain `Trainer` with AdamW: Llama of width {args.width}, {args.layers} layers, {args.tokens:,} tokens per "
        f"batch, {args.precision}; medians over {args.repeats} rounds in one process, of {args.clock} seconds.{seconds} Optimizer "
        f"state: mean over update steps; peak memory: with {MEMORY_TOKENS} tokens per batch, model included. "
        f"{where['accelerator'] or where['processor']}; load average before and after: {load}.",
    ]
    if measured is not None or states:
        paragraphs.append(render(HEADINGS, cells))
    if single:
        paragraphs.append(
            f"meprop, 5 % of 1,024 outputs, {max(1024, args.tokens):,} tokens: {meprop:.2f} of the dense backward of a linear layer (goal <= 0.50)."
        )
        for kind, ratios in masked.items():
            by_share = ", ".join(f"{ratio:.2f} at {share:.0%}" for share, ratio in ratios.items())
            paragraphs.append(
                f"The step alone of a {kind} AdamW, of single entries, over a plain foreach AdamW step (goal <= 1.50), by the "
                f"share that is trained: {by_share}."
            )
    text = "\n\n".join(paragraphs) + "\n"
    print("\n" + text)
    if args.output is not None:
        rounds = [] if measured is None else measured.rounds
        results = {
            "command": command, "versions": versions(), "hardware": where, "settings": dataclasses.asdict(args),
            "optimizer_state": states, "peak_bytes": peaks, "meprop_backward": meprop, "masked_step": masked, "load_average": load,
            "seconds": [{n: [dataclasses.asdict(t) for t in taken] for n, taken in one.items()} for one in rounds],
        }  # fmt: skip
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        Path(args.output).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        Path(args.output).with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
