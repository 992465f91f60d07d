"""What gets its name is on the disk before: the order of flushes and renames, which a power cut would show."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from common import fit, tiny

from hf_masked import export


class Disk:
    """What is flushed, as far as this process has asked for it, and what was not when it got its name."""

    def __init__(self) -> None:
        self.flushed: dict[str, tuple[int, int]] = {}
        self.early: list[str] = []
        self.renamed: list[str] = []
        self._fsync, self._replace = os.fsync, os.replace

    def fsync(self, handle: int) -> None:
        self._fsync(handle)
        self.flushed[os.readlink(f"/proc/self/fd/{handle}")] = self._state(f"/proc/self/fd/{handle}")

    def replace(self, source: Any, target: Any) -> None:
        inside = [Path(source), *Path(source).rglob("*")]
        self.early += [str(p) for p in inside if self.flushed.get(str(p)) != self._state(p)]
        if Path(target).name == "config.json":
            # an export is one from here on: the names of its weights must be there for good
            folder = str(Path(target).parent)
            self.early += [folder] * (self.flushed.get(folder) != self._state(folder))
        self._replace(source, target)
        self.renamed.append(str(target))

    @staticmethod
    def _state(place: Any) -> tuple[int, int]:
        """Changes with every write to a file, and with every name that comes to or goes from a folder."""
        now = os.stat(place)
        return now.st_mtime_ns, now.st_size


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    disk = Disk()
    monkeypatch.setattr(os, "fsync", disk.fsync)
    monkeypatch.setattr(os, "replace", disk.replace)
    yield disk


def run(folder: Path) -> None:
    saved = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "max_steps": 2}
    fit(folder, tiny("gpt2", core="free"), schedule="alternate", **saved)


def checkpoints(disk: Disk) -> list[str]:
    return [name for name in disk.renamed if Path(name).name.startswith("checkpoint-")]


def test_checkpoints(disk: Disk, tmp_path: Path) -> None:
    run(tmp_path)
    assert len(checkpoints(disk)) == 2 and disk.early == []
    assert disk.flushed[str(tmp_path)], "the names of the checkpoints are not"


def test_exports(disk: Disk, tmp_path: Path) -> None:
    for seed in (0, 1):
        export(tiny("gpt2", seed=seed, core="shared"), tmp_path / "out")
    assert sum(name.endswith("config.json") for name in disk.renamed) >= 4 and disk.early == []


@pytest.mark.parametrize("flushed", [(), ("file",), ("file", "folder")], ids=str)
def test_what_is_not_flushed_is_seen(flushed: tuple[str, ...], disk: Disk, tmp_path: Path) -> None:
    """Negative control: a file in a folder that gets its name."""
    places = {"file": tmp_path / "aside" / "weights", "folder": tmp_path / "aside"}
    places["folder"].mkdir()
    places["file"].write_text("1")
    for name in flushed:
        handle = os.open(places[name], os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    os.replace(places["folder"], tmp_path / "checkpoint-1")
    assert disk.early == [str(places[name]) for name in ("folder", "file") if name not in flushed]
