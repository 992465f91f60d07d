"""How near a low-rank core is to its full model right after the split, before any training.

    python recipes/benchmarks/start.py MODEL --train_file texts.parquet --test_file more.parquet [--ranks 0.25 0.5]

MODEL is a folder or Hub name that AutoModel loads with its tokenizer. Compared, at equal numbers of parameters: the best part
of every W (init "svd") and the part nearest in outputs on calibration texts ("activation"); one rank for all layers, and
the same parameters distributed over them (`budget`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from transformers import AutoModel, AutoTokenizer

from hf_masked import LowRankCoreConfig, add_core, get_core

Batch = dict[str, torch.Tensor]


def batches(texts: list[str], tokenizer: Any, size: int) -> Iterator[Batch]:
    """Batches of texts of at most 128 tokens."""
    for start in range(0, len(texts), size):
        yield dict(
            tokenizer(texts[start : start + size], padding=True, truncation=True, max_length=128, return_tensors="pt")
        )


def distances(full: Any, core: Any, held_out: list[Batch]) -> dict[str, float]:
    """|core - full| / |full| of the last hidden states, and the mean cosine of the mean states of each text."""
    error = size = 0.0
    cosines = []
    with torch.no_grad():
        for batch in held_out:
            visible = batch["attention_mask"][..., None]
            mine, theirs = (network(**batch).last_hidden_state * visible for network in (core, full))
            error += float((mine - theirs).square().sum())
            size += float(theirs.square().sum())
            cosines += torch.cosine_similarity(mine.sum(1), theirs.sum(1)).tolist()
    return {"error": (error / size) ** 0.5, "cosine": sum(cosines) / len(cosines)}


def share_of(core: Any) -> float:
    """The parameters of the core's targets over those of the full ones."""
    sites = core.sites.values()
    thin = sum(site.rank * (site.in_features + site.out_features) for site in sites)
    return thin / sum(site.in_features * site.out_features for site in sites)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Print, and return, one row per rank, way of starting and way of distributing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub name of an encoder")
    parser.add_argument("--train_file", required=True, help="texts to calibrate on")
    parser.add_argument("--test_file", required=True, help="texts to measure on")
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--ranks", type=float, nargs="+", default=[0.25, 0.5], help="fractions of min(in, out)")
    parser.add_argument("--calibration", type=int, nargs="+", default=[256], help="numbers of texts")
    parser.add_argument("--test_texts", type=int, default=256)
    parser.add_argument("--out", help="JSON file to write the rows to")
    args = parser.parse_args(argv)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    files = {"train": args.train_file, "test": args.test_file}
    kind = Path(args.train_file).suffix.removeprefix(".").replace("jsonl", "json")
    texts = {
        name: load_dataset(kind, data_files=file, split="train")[args.text_column] for name, file in files.items()
    }
    held_out = list(batches(list(texts["test"][: args.test_texts]), tokenizer, 32))
    rows = []
    shares: dict[float, float] = {}
    for spread in ("one rank", "budget"):
        for rank in args.ranks:
            for count in (0, *args.calibration):
                full = AutoModel.from_pretrained(args.model).eval()
                init = "activation" if count else "svd"
                ranks: dict[str, Any] = {"rank": rank} if spread == "one rank" else {"budget": shares[rank]}
                calibration = list(batches(list(texts["train"][:count]), tokenizer, 32)) if count else None
                add_core(full, LowRankCoreConfig(**ranks, init=init), calibration)  # type: ignore[arg-type]
                core = get_core(full)
                shares.setdefault(rank, share_of(core))
                row = {"rank": rank, "ranks": spread, "init": init, "calibration_texts": count}
                rows.append(row | {"parameters": share_of(core)} | distances(full, core.model.eval(), held_out))
                print(json.dumps(rows[-1]))
    if args.out:
        Path(args.out).write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return rows


if __name__ == "__main__":
    main()
