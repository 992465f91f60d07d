"""Self-speculative decoding: tokens per second of the full model alone, and with its core as the draft.

    python recipes/benchmarks/drafting.py out [--separate FOLDER] [--prompts 20] [--new_tokens 64] [--output_dir FOLDER]

`out` holds a full model with its core in `core/`; FOLDER another small model to compare with as the draft, such as a core
that was trained alone (`--schedule core_only`, then its `core/`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from kit.machine import hardware, versions

from benchmarks.clock import Taken
from hf_masked import measure_acceptance
from hf_masked.export import check_writable


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Print, and return, one row per way of decoding; times are medians over prompts, ratios within a prompt."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", help="folder of a run: the full model, and core/ beside it")
    parser.add_argument("--separate", help="folder of another draft with the same vocabulary")
    parser.add_argument("--prompts", type=int, default=20, help="how many random prompts")
    parser.add_argument("--prompt_tokens", type=int, default=16, help="tokens of each prompt")
    parser.add_argument("--new_tokens", type=int, default=64, help="tokens to generate for each")
    parser.add_argument("--output_dir", help="where results.json goes")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    full = AutoModelForCausalLM.from_pretrained(args.out).eval()
    drafts: dict[str, Any] = {"core": AutoModelForCausalLM.from_pretrained(args.out, subfolder="core").eval()}
    if args.separate:
        drafts["separate"] = AutoModelForCausalLM.from_pretrained(args.separate).eval()
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in drafts}
    for prompt in range(args.prompts):
        generator = torch.Generator().manual_seed(prompt)
        ids = torch.randint(5, full.config.vocab_size, (1, args.prompt_tokens), generator=generator)
        options = {"max_new_tokens": args.new_tokens, "do_sample": False}
        # what the model itself goes on from a few random tokens, so that the prompt is text of its kind
        ids = full.generate(ids, **options)
        start = Taken.stamp()
        expected = full.generate(ids, **options)
        alone = (Taken.stamp() - start).processor
        for name, draft in drafts.items():
            start = Taken.stamp()
            found, acceptance = measure_acceptance(full, draft, input_ids=ids, **options)
            taken = (Taken.stamp() - start).processor
            rows[name].append(
                {"speedup": alone / taken, "rate": acceptance.rate, "tokens_per_check": acceptance.tokens_per_check}
                | {"same": float(torch.equal(found, expected)), "alone": acceptance.new_tokens / alone}
            )
    means = [{"draft": name} | {k: statistics.median(r[k] for r in of) for k in of[0]} for name, of in rows.items()]
    for row in means:
        row["same"] = statistics.mean(r["same"] for r in rows[row["draft"]])
        print(
            f"{row['draft']:10} acceptance {row['rate']:.2f}  tokens per check {row['tokens_per_check']:.2f}  tokens per processor "
            f"second over full alone ({row['alone']:.0f}): {row['speedup']:.2f}  same output {row['same']:.0%}"
        )
    if args.output_dir:
        results = {"rows": means, "options": vars(args), "versions": versions(), "hardware": hardware()}
        path = check_writable(args.output_dir) / "results.json"
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return means


if __name__ == "__main__":
    main()
