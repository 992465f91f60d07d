"""Keep a prepared data set and its tokenizer, so that a second run starts training at once."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
from accelerate import PartialState
from datasets import DatasetDict, load_from_disk
from filelock import FileLock
from transformers import AutoTokenizer, PreTrainedTokenizerBase

Prepared = tuple[DatasetDict, PreTrainedTokenizerBase]


def prepared(build: Callable[[], Prepared], key: dict[str, Any], cache_dir: str | None) -> Prepared:
    """Return `build()`, or what an earlier run with the same `key` built.

    The folder appears under its final name only when it is complete, so an interrupted run leaves nothing half-made. Of several
    processes, and of several runs side by side, one builds.
    """
    with PartialState().main_process_first():
        return _prepared(build, key, cache_dir)


def _prepared(build: Callable[[], Prepared], key: dict[str, Any], cache_dir: str | None) -> Prepared:
    root = Path(cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "hf_masked_recipes")
    name = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:16]
    folder = root / name
    # what is there is read without a lock, which a folder that may only be read has no room for
    if not folder.is_dir():
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{name}.lock"):
            if not folder.is_dir():  # nor has another run made it meanwhile
                print("Preparing the data (a later run finds it in the cache) ...", flush=True)
                splits, tokenizer = build()
                partial = Path(tempfile.mkdtemp(prefix=f"{name}-partial-", dir=root))
                splits.save_to_disk(partial / "splits")
                tokenizer.save_pretrained(partial / "tokenizer")
                partial.rename(folder)
    return load_from_disk(folder / "splits"), AutoTokenizer.from_pretrained(folder / "tokenizer")
