"""Time of each extracted core over its full model on this machine, beside the ratio of FLOPs: one token, and a prompt.

    python recipes/benchmarks/inference.py [--widths 128 512] [--batch_sizes 1] [--cores JSON] [--rounds 20] [--output_dir OUT]

Llamas from a config (time does not depend on what the weights are), cores as `extract_core` makes them. Full model and cores
take turns; figures are medians over rounds of the ratio within a round, in processor time of one thread; on a GPU in seconds, by
default in bfloat16, and with `--cuda_graphs` also without the time that Python takes to tell it what to do for one token.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from kit.machine import hardware, versions
from kit.table import render

from benchmarks.clock import Taken
from hf_masked import add_core, extract_core, to_semi_structured
from hf_masked.cores import CORE_KINDS
from hf_masked.export_folder import check_writable
from hf_masked.summary import network_size

CORES: dict[str, dict[str, Any]] = {
    "low_rank 1/16": {"kind": "low_rank", "rank": 1 / 16, "init": "random"},
    "low_rank 1/8": {"kind": "low_rank", "rank": 1 / 8, "init": "random"},
    "low_rank 1/4": {"kind": "low_rank", "rank": 1 / 4, "init": "random"},
    "low_rank 1/2": {"kind": "low_rank", "rank": 1 / 2, "init": "random"},
    "width 1/2": {"kind": "width", "neurons": 0.5, "heads": 0.5},
    "depth 1/2": {"kind": "depth", "keep": 0.5},
    "sparse 1/2": {"kind": "sparse", "sparsity": 0.5},
}
ON_GPU: dict[str, dict[str, Any]] = {
    "sparse 2:4, as zeros": {"kind": "sparse", "sparsity": "2:4"},
    "sparse 2:4, semi-structured": {"kind": "sparse", "sparsity": "2:4", "semi_structured": True},
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Print, and return, one row per width and core."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 512], help="hidden sizes of the full models")
    parser.add_argument("--layers", type=int, default=4, help="blocks of the full models")
    parser.add_argument("--prompt_tokens", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--rounds", type=int, default=20, help="how often each is timed")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1], help="sequences at once")
    parser.add_argument(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        default="float32" if DEVICE == "cpu" else "bfloat16",
        help="of weights and products",
    )
    parser.add_argument("--cuda_graphs", action="store_true", help="time one token as a CUDA graph as well")
    parser.add_argument("--cores", type=cores, help="JSON: name -> kind and options of a core")
    parser.add_argument("--output_dir", help="where table.md and results.json go")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    args.cores = args.cores or (CORES if DEVICE == "cpu" else CORES | ON_GPU)
    rows = [row for width in args.widths for row in measure(width, args)]
    where = hardware()
    text = f"{where['accelerator'] or where['processor']}, {args.dtype}\n\n{table(rows)}\n\n{verdict(rows)}"
    print(text)
    if args.output_dir:
        out = check_writable(args.output_dir)
        (out / "table.md").write_text(text + "\n", encoding="utf-8")
        results = {"rows": rows, "options": vars(args), "versions": versions(), "hardware": where}
        (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return rows


def cores(text: str) -> dict[str, dict[str, Any]]:
    """Read JSON of name -> kind and options.

    Raises: argparse.ArgumentTypeError.
    """
    try:
        found = json.loads(text)
        kinds = {options["kind"] for options in found.values()}
    except (json.JSONDecodeError, AttributeError, TypeError, KeyError):
        kinds = {None}
    if not kinds <= CORE_KINDS.keys():
        raise argparse.ArgumentTypeError(
            f'got {text!r}; needs JSON such as {{"half": {{"kind": "depth", "keep": 0.5}}}}, with a kind of '
            f"{sorted(CORE_KINDS)} in each, because a core is made of it"
        )
    return dict(found)


def full_model(width: int, args: argparse.Namespace) -> PreTrainedModel:
    """A Llama with heads of 32 and a vocabulary of 4,096."""
    multiple = 128 if width >= 1024 else 16
    config = AutoConfig.for_model(
        "llama",
        vocab_size=4096,
        hidden_size=width,
        intermediate_size=8 * width // 3 // multiple * multiple,
        num_hidden_layers=args.layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with torch.device(DEVICE):
        made: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype)).eval()
    return made


@torch.no_grad()
def measure(width: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one width."""
    networks = {"full": full_model(width, args)}
    sizes = {"full": network_size(networks["full"])}
    for name, options in args.cores.items():
        rest = {k: v for k, v in options.items() if k not in ("kind", "semi_structured")}
        model = add_core(full_model(width, args), CORE_KINDS[options["kind"]].from_dict(rest))
        networks[name] = extract_core(model).eval()
        sizes[name] = network_size(networks[name])
        if options.get("semi_structured"):
            to_semi_structured(networks[name])
    return [
        {
            "width": width,
            "batch": batch,
            "core": name,
            "parameters": sizes[name].parameters / sizes["full"].parameters,
            "flops": sizes[name].flops_per_token / sizes["full"].flops_per_token,
            **{what: ratio(of[name], of["full"]) for what, of in seconds.items()},
            **{f"{what}_ms": 1e3 * statistics.median(of[name][1:]) for what, of in seconds.items()},
        }
        for batch in args.batch_sizes
        for seconds in [measure_batch(networks, batch, args)]
        for name in networks
    ]


def measure_batch(
    networks: dict[str, PreTrainedModel], batch: int, args: argparse.Namespace
) -> dict[str, dict[str, list[float]]]:
    """Seconds of a prompt and of one token after it, by network, one of each per round."""
    ids = torch.randint(5, 4096, (batch, args.prompt_tokens), device=DEVICE)
    replays = {name: captured(network, ids) for name, network in networks.items()} if args.cuda_graphs else {}
    whats = ["prompt", "token", *(["replayed"] if replays else [])]
    seconds: dict[str, dict[str, list[float]]] = {what: {name: [] for name in networks} for what in whats}
    for _ in range(1 + args.rounds):
        for name, network in networks.items():
            taken, out = timed(partial(network, ids, use_cache=True))
            seconds["prompt"][name].append(taken)
            step = partial(network, ids[:, :1], past_key_values=out.past_key_values, use_cache=True)
            for what, one_token in [("token", step), *([("replayed", replays[name])] if replays else [])]:
                seconds[what][name].append(statistics.median(timed(one_token)[0] for _ in range(8)))
    return seconds


def captured(network: PreTrainedModel, ids: torch.Tensor) -> Callable[[], Any]:
    """What the GPU does for one more token after a prompt, to be done again and again."""
    cache = network(ids, use_cache=True).past_key_values
    one_token = partial(network, ids[:, :1], past_key_values=cache, use_cache=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            one_token()
    torch.cuda.current_stream().wait_stream(stream)
    # the graph goes on reading them, and the cache lets them go
    held = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = one_token()
    return partial(_replay, graph, (held, out))


def _replay(graph: torch.cuda.CUDAGraph, held: object) -> None:
    graph.replay()


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of a call, and what it returned."""
    start = Taken.stamp()
    result = function()
    return (Taken.stamp() - start).seconds(), result


def ratio(mine: list[float], full: list[float]) -> float:
    """Median over rounds, the first left out, of one's time over the full model's of the same round."""
    return statistics.median(m / f for m, f in zip(mine[1:], full[1:], strict=True))


TIMES = {"token": "one token", "replayed": "one token, CUDA graph", "prompt": "prompt"}


def table(rows: list[dict[str, Any]]) -> str:
    """One row per width, batch size and core: ratios to the full model, then milliseconds."""
    times = {what: title for what, title in TIMES.items() if what in rows[0]}
    cells = [
        [
            f"{row['width']}, {row['batch']}, {row['core']}",
            *(f"{row[key]:.2f}" for key in ("parameters", "flops", *times)),
            *(f"{row[f'{key}_ms']:.2f}" for key in times),
        ]
        for row in rows
    ]
    headings = ["parameters", "FLOPs", *times.values(), *(f"ms, {title}" for title in times.values())]
    return render(["width, batch, core", *headings], cells)


def verdict(rows: list[dict[str, Any]]) -> str:
    """Which cores take as long as the full model, or longer, and in what."""
    slow: dict[str, list[str]] = {}
    for row in rows:
        whats = [title for what, title in TIMES.items() if row["core"] != "full" and row.get(what, 0) >= 1]
        if whats:
            slow.setdefault(f"{row['width']}, {row['batch']} ({' / '.join(whats)})", []).append(row["core"])
    said = "; ".join(f"{where}: {', '.join(cores)}" for where, cores in slow.items())
    return f"Does not pay at {said}." if slow else "Every core is faster than its full model."


if __name__ == "__main__":
    main()
