"""Data sets by name: the Hub, a local file, or a local folder of split files; checked before anything is trained."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset

LOADERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
HELD_OUT_PERCENT = 5


def load_splits(name: str, config: str | None, columns: Sequence[str]) -> DatasetDict:
    """Load a data set and make sure that it has the `columns`, a train and a validation split.

    Args:
        name: a Hub data set, or a path: a file (text, jsonl, json, csv, parquet), or a folder with one file per split,
            named after it (`train.parquet`, `validation.parquet`, `test.parquet`).
        config: the Hub data set's configuration, where it has several.
        columns: the text columns the recipe reads.
    """
    splits = _load(name, config)
    if "train" not in splits:
        raise ValueError(
            f"got splits {sorted(splits)} in {name!r}; needs a 'train' split, because the recipe trains on it; "
            "set --dataset_name to a data set, file or folder that has one"
        )
    splits = DatasetDict({split: splits[split] for split in ("train", "validation", "test") if split in splits})
    for split, rows in splits.items():
        _check_columns(f"the {split} split of {name!r}", rows, columns)
    if "validation" not in splits:
        splits = _hold_out(splits, columns)
    return splits


def _load(name: str, config: str | None) -> DatasetDict:
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix not in LOADERS:
            raise ValueError(
                f"got file {name!r}; needs a name ending in one of {sorted(LOADERS)}, because the ending says how to "
                "read it; set --dataset_name to such a file"
            )
        return load_dataset(LOADERS[path.suffix], data_files={"train": str(path)})
    if path.is_dir():
        return _load_folder(path)
    if path.suffix in LOADERS or name.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"got path {name!r}; needs an existing file or folder, because the name reads as a local path; "
            "set --dataset_name to an existing path or a Hub data set"
        )
    return load_dataset(name, config)


def _load_folder(folder: Path) -> DatasetDict:
    splits = ("train", "validation", "test")
    files = {path.stem: path for path in sorted(folder.iterdir()) if path.suffix in LOADERS and path.stem in splits}
    loaders = {LOADERS[path.suffix] for path in files.values()}
    if "train" not in files or len(loaders) != 1:
        raise ValueError(
            f"got folder {str(folder)!r} with data files {sorted(path.name for path in files.values())}; needs one "
            "file per split, 'train' among them, all of one kind, because splits are found by file name; set "
            "--dataset_name to such a folder or to a single file"
        )
    wanted = {split: str(files[split]) for split in splits if split in files}
    return load_dataset(loaders.pop(), data_files=wanted)


def _check_columns(where: str, rows: Dataset, columns: Sequence[str]) -> None:
    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        raise ValueError(
            f"got columns {rows.column_names} in {where}; needs {missing}, because the recipe reads its text there; "
            "set the --*_column flags to columns that exist"
        )
    for column in columns:
        if not any(isinstance(text, str) and text.strip() for text in rows[:1000][column]):
            raise ValueError(
                f"got no text in column {column!r} of {where}; needs non-empty strings, because a tokenizer and a "
                "model are trained on them; set the --*_column flags to a text column"
            )
        if rows.data.column(column).null_count:
            row = next(index for index, text in enumerate(rows[column]) if text is None)
            raise ValueError(
                f"got nothing in column {column!r} of row {row} in {where}; needs a text in every row, because it is cut into "
                "tokens; leave such rows out of the data"
            )


def _hold_out(splits: DatasetDict, columns: Sequence[str]) -> DatasetDict:
    """Take validation rows out of the train split by a hash of their text, so that equal rows stay together."""

    def held_out(row: dict[str, str]) -> bool:
        text = "\0".join(str(row[column]) for column in columns)
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 100 < HELD_OUT_PERCENT

    flags = [held_out(row) for row in splits["train"]]
    rows = splits["train"]
    validation = [index for index, held in enumerate(flags) if held]
    if not validation or len(validation) == len(flags):
        raise ValueError(
            f"got {len(flags)} rows and no 'validation' split; needs enough rows to hold {HELD_OUT_PERCENT} % of them "
            "out, because scores are taken on held-out text; set --dataset_name to a larger set or to a folder with "
            "a validation file"
        )
    train = [index for index, held in enumerate(flags) if not held]
    held = {"train": rows.select(train), "validation": rows.select(validation)}
    return DatasetDict(held | {split: rows for split, rows in splits.items() if split not in held})
