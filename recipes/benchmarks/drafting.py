"""Self-speculative decoding: tokens per second of the full model alone, and with its core as the draft.

    python recipes/benchmarks/drafting.py out [--separate FOLDER] [--draft_tokens 2] [--draft_confidence 0] [--output_dir FOLDER]

`out` holds a full model with its core in `core/`; FOLDER another small model to compare with as the draft, such as a core
that was trained alone (`--schedule core_only`, then its `core/`). On a GPU by the clock, else by processor seconds of one thread.
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
from kit.table import render

from benchmarks.clock import Taken
from hf_masked import measure_acceptance
from hf_masked.export_folder import check_writable


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Print, and return, one row per way of decoding; times are medians over prompts, ratios within a prompt."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", help="folder of a run: the full model, and core/ beside it")
    parser.add_argument("--separate", help="folder of another draft with the same vocabulary")
    parser.add_argument("--prompts", type=int, default=20, help="how many random prompts")
    parser.add_argument("--prompt_tokens", type=int, default=16, help="tokens of each prompt")
    parser.add_argument("--new_tokens", type=int, default=64, help="tokens to generate for each")
    parser.add_argument(
        "--draft_tokens", type=int, help="tokens to draft before each check, at most (as the model says)"
    )
    parser.add_argument(
        "--draft_confidence",
        type=float,
        help="probability below which a drafted token ends the draft; 0: always as many as --draft_tokens (as the model says)",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        default="float32",
        help="of weights and products; rounding may part the outputs of bfloat16",
    )
    parser.add_argument("--output_dir", help="where table.md and results.json go")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def load(folder: str, **options: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=args.dtype, **options).eval().to(device)

    full = load(args.out)
    drafts = {"core": load(args.out, subfolder="core")} | ({"separate": load(args.separate)} if args.separate else {})
    for draft in drafts.values():
        if args.draft_tokens is not None:
            draft.generation_config.num_assistant_tokens = args.draft_tokens
            draft.generation_config.num_assistant_tokens_schedule = "constant"
        if args.draft_confidence is not None:
            draft.generation_config.assistant_confidence_threshold = args.draft_confidence
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in drafts}
    for prompt in range(args.prompts):
        generator = torch.Generator().manual_seed(prompt)
        ids = torch.randint(5, full.config.vocab_size, (1, args.prompt_tokens), generator=generator).to(device)
        options = {"max_new_tokens": args.new_tokens, "do_sample": False, "use_cache": True}
        # what the model itself goes on from a few random tokens, so that the prompt is text of its kind
        ids = full.generate(ids, **options)
        start = Taken.stamp()
        expected = full.generate(ids, **options)
        alone = (Taken.stamp() - start).seconds()
        for name, draft in drafts.items():
            start = Taken.stamp()
            found, acceptance = measure_acceptance(full, draft, input_ids=ids, **options)
            taken = (Taken.stamp() - start).seconds()
            rows[name].append(
                {"speedup": alone / taken, "rate": acceptance.rate, "tokens_per_check": acceptance.tokens_per_check}
                | {"same": float(torch.equal(found, expected)), "alone": acceptance.new_tokens / alone}
            )
    means = [{"draft": name} | {k: statistics.median(r[k] for r in of) for k in of[0]} for name, of in rows.items()]
    for row in means:
        row["same"] = statistics.mean(r["same"] for r in rows[row["draft"]])
    where = hardware()
    text = f"{where['accelerator'] or where['processor']}, {args.dtype}\n\n{table(means)}\n"
    print(text)
    if args.output_dir:
        folder = check_writable(args.output_dir)
        (folder / "table.md").write_text(text, encoding="utf-8")
        results = {"rows": means, "options": vars(args), "versions": versions(), "hardware": where}
        (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return means


def table(means: list[dict[str, Any]]) -> str:
    """One row per draft."""
    headings = [
        "draft",
        "acceptance",
        "tokens per check",
        "tokens/s over full alone",
        "full alone, tokens/s",
        "same output",
    ]
    cells = [
        [
            row["draft"],
            *(f"{row[key]:.2f}" for key in ("rate", "tokens_per_check", "speedup")),
            f"{row['alone']:.0f}",
            f"{row['same']:.0%}",
        ]
        for row in means
    ]
    return render(headings, cells)


if __name__ == "__main__":
    main()
