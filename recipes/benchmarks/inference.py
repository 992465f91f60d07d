"""Time of each extracted core over its full model on this machine, beside the ratio of FLOPs: one token, and a prompt.

    python recipes/benchmarks/inference.py [--widths 128 512] [--cores JSON] [--rounds 20] [--output_dir OUT]

Llamas from a config (time does not depend on what the weights are), cores as `extract_core` makes them. Full model and cores
take turns; figures are medians over rounds of the ratio within a round, in processor time of one thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from kit.machine import hardware, versions
from kit.table import render

from benchmarks.clock import Taken
from hf_masked import add_core, extract_core
from hf_masked.cores import CORE_KINDS
from hf_masked.export import check_writable
from hf_masked.summary import network_size

CORES: dict[str, dict[str, Any]] = {
    "low_rank 1/16": {"kind": "low_rank", "rank": 1 / 16},
    "low_rank 1/8": {"kind": "low_rank", "rank": 1 / 8},
    "low_rank 1/4": {"kind": "low_rank", "rank": 1 / 4},
    "low_rank 1/2": {"kind": "low_rank", "rank": 1 / 2},
    "width 1/2": {"kind": "width", "neurons": 0.5, "heads": 0.5},
    "depth 1/2": {"kind": "depth", "keep": 0.5},
    "sparse 1/2": {"kind": "sparse", "sparsity": 0.5},
}


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Print, and return, one row per width and core."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 512], help="hidden sizes of the full models")
    parser.add_argument("--layers", type=int, default=4, help="blocks of the full models")
    parser.add_argument("--prompt_tokens", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--rounds", type=int, default=20, help="how often each is timed")
    parser.add_argument("--cores", type=json.loads, default=CORES, help="JSON: name -> kind and options of a core")
    parser.add_argument("--output_dir", help="where table.md and results.json go")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = [row for width in args.widths for row in measure(width, args)]
    text = table(rows)
    print(text)
    if args.output_dir:
        out = check_writable(args.output_dir)
        (out / "table.md").write_text(text + "\n", encoding="utf-8")
        results = {"rows": rows, "options": vars(args), "versions": versions(), "hardware": hardware()}
        (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return rows


def full_model(width: int, layers: int) -> PreTrainedModel:
    """A Llama with heads of 32 and a vocabulary of 4,096."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=4096,
        hidden_size=width,
        intermediate_size=8 * width // 3 // 16 * 16,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    made: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    return made


@torch.no_grad()
def measure(width: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one width."""
    networks = {"full": full_model(width, args.layers)}
    for name, options in args.cores.items():
        rest = {k: v for k, v in options.items() if k != "kind"}
        model = add_core(full_model(width, args.layers), CORE_KINDS[options["kind"]].from_dict(rest))
        networks[name] = extract_core(model).eval()
    ids = torch.randint(5, 4096, (1, args.prompt_tokens))
    seconds: dict[str, dict[str, list[float]]] = {"prompt": {}, "token": {}}
    for _ in range(1 + args.rounds):
        for name, network in networks.items():
            taken, cache = timed(lambda network=network: network(ids, use_cache=True))
            seconds["prompt"].setdefault(name, []).append(taken)
            held = cache.past_key_values
            steps = [
                timed(lambda network=network, held=held: network(ids[:, :1], past_key_values=held, use_cache=True))[0]
                for _ in range(8)
            ]
            seconds["token"].setdefault(name, []).append(statistics.median(steps))
    sizes = {name: network_size(network) for name, network in networks.items()}
    return [
        {
            "width": width,
            "core": name,
            "parameters": sizes[name].parameters / sizes["full"].parameters,
            "flops": sizes[name].flops_per_token / sizes["full"].flops_per_token,
            **{what: ratio(of[name], of["full"]) for what, of in seconds.items()},
            **{f"{what}_ms": 1e3 * statistics.median(of[name][1:]) for what, of in seconds.items()},
        }
        for name in networks
    ]


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Processor seconds of a call, and what it returned."""
    start = Taken.stamp()
    result = function()
    return (Taken.stamp() - start).processor, result


def ratio(mine: list[float], full: list[float]) -> float:
    """Median over rounds, the first left out, of one's time over the full model's of the same round."""
    return statistics.median(m / f for m, f in zip(mine[1:], full[1:], strict=True))


def table(rows: list[dict[str, Any]]) -> str:
    """One row per width and core, over the full model."""
    headings = ["width, core", "parameters", "FLOPs", "one token", "prompt", "ms/token", "ms/prompt"]
    cells = [
        [
            f"{row['width']} {row['core']}",
            *(f"{row[key]:.2f}" for key in ("parameters", "flops", "token", "prompt")),
            *(f"{row[key]:.2f}" for key in ("token_ms", "prompt_ms")),
        ]
        for row in rows
    ]
    return render(headings, cells)


if __name__ == "__main__":
    main()
