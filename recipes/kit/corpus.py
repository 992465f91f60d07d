"""English prose that every machine already has: the docstrings and help topics of its installed Python packages.

Source files are read as text and parsed with `ast`; nothing is ever imported or run. The order of the files, and
which of them are held out, depend only on a hash of their names, so the same packages give the same corpus on every
machine.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset, DatasetDict

PACKAGES = ("torch", "transformers")
TOPICS = "pydoc_data/topics.py"
SKIPPED_FOLDERS = {"test", "tests", "testing", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
SHORTEST_PARAGRAPH = 40  # characters; below it a paragraph is a heading or an argument's type, not prose
HELD_OUT_PERCENT = 5


class SourceFile(NamedTuple):
    """A Python file and the name by which it is ordered and split, which is the same on every machine."""

    name: str
    path: Path

    @property
    def digest(self) -> int:
        return int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:8], "big")


def corpus_key() -> str:
    """Name what the corpus depends on: the Python version and the versions of the packages that are read."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES if importlib.util.find_spec(name)}
    return f"python=={sysconfig.get_python_version()} {versions}"


def docstring_corpus(max_characters: int) -> DatasetDict:
    """Read docstrings and help topics until `max_characters` are found, some of them in a held-out file.

    Returns:
        A train and a validation split with the columns `text` (the new paragraphs of one docstring) and `file`. All
        docstrings of a file are in the same split, and no paragraph occurs twice in the corpus.
    """
    rows: dict[str, list[dict[str, str]]] = {"train": [], "validation": []}
    seen: set[str] = set()
    characters = 0
    for file in source_files():
        split = "validation" if file.digest % 100 < HELD_OUT_PERCENT else "train"
        for document in documents(file):
            text = "\n\n".join(new_paragraphs(document, seen))
            if text:
                rows[split].append({"text": text, "file": file.name})
                characters += len(text)
        if characters >= max_characters and all(rows.values()):
            break
    if not all(rows.values()):
        raise ValueError(
            f"got {characters} characters of docstrings; needs both a train and a validation file, because the scores "
            "are taken on held-out files; set --dataset_name to a data set"
        )
    return DatasetDict({split: Dataset.from_list(found) for split, found in rows.items()})


def source_files() -> Iterator[SourceFile]:
    """Yield the help topics, then the files of the standard library and of `PACKAGES`, mixed in hash order."""
    roots = {"python": Path(sysconfig.get_path("stdlib"))}
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.submodule_search_locations:
            roots[package] = Path(next(iter(spec.submodule_search_locations)))
    files = []
    for package, root in roots.items():
        for path in root.rglob("*.py"):
            relative = path.relative_to(root)
            if not SKIPPED_FOLDERS.intersection(relative.parts):
                files.append(SourceFile(f"{package}/{relative.as_posix()}", path))
    yield from sorted(files, key=lambda file: (not file.name.endswith(TOPICS), file.digest))


def documents(file: SourceFile) -> Iterator[str]:
    """Yield the docstrings of a file in source order; for the help topics, the topics."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # other people's escape sequences
            tree = ast.parse(file.path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return  # unreadable, of another Python version, or not UTF-8
    if file.name.endswith(TOPICS):
        yield from (text for text in strings(tree) if "\n" in text)
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring


def strings(tree: ast.AST) -> Iterator[str]:
    """Yield every string constant of a syntax tree."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def new_paragraphs(document: str, seen: set[str]) -> Iterator[str]:
    """Yield the paragraphs of a document that are long enough and have not been `seen`, and remember them."""
    for paragraph in document.split("\n\n"):
        paragraph = paragraph.strip("\n").rstrip()
        fingerprint = " ".join(paragraph.split())
        if len(fingerprint) >= SHORTEST_PARAGRAPH and fingerprint not in seen:
            seen.add(fingerprint)
            yield paragraph
