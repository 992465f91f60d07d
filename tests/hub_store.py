"""What the loopback hub keeps: repositories, their commits, and the files at each."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".onnx", ".npz", ".parquet", ".model")
LFS_SIZE = 1 << 20  # anything at least this large goes through LFS whatever it is called


def through_lfs(path: str, size: int) -> bool:
    return path.endswith(LFS_SUFFIXES) or size >= LFS_SIZE


@dataclass(frozen=True)
class Entry:
    """One file at one commit: its content, and whether it is stored through LFS."""

    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def blob_id(self) -> str:
        """The git id of what git itself would hold: the content, or the LFS pointer to it."""
        held = self.content
        if self.lfs:
            held = (
                f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
            ).encode()
        return hashlib.sha1(b"blob %d\0" % len(held) + held).hexdigest()


@dataclass
class Commit:
    oid: str
    summary: str
    tree: dict[str, Entry]


@dataclass
class Repo:
    private: bool = False
    commits: list[Commit] = field(default_factory=lambda: [Commit("0" * 40, "initial commit", {})])
    branches: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})

    def at(self, revision: str) -> Commit | None:
        oid = self.branches.get(revision, revision)
        return next((commit for commit in self.commits if commit.oid == oid), None)


class Refused(Exception):
    """An HTTP error with the header by which the client picks the exception it raises."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


def described(path: str, entry: Entry) -> dict[str, Any]:
    """A file as the Hub's API lists it."""
    info: dict[str, Any] = {"type": "file", "path": path, "oid": entry.blob_id, "size": len(entry.content)}
    if entry.lfs:
        info["lfs"] = {"oid": entry.sha256, "size": len(entry.content), "pointerSize": 134}
    return info
