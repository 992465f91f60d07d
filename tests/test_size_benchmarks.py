"""The benchmarks over sizes of a core: what a ladder's rungs reach, and what extracted cores take."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")
sys.path.append(str(Path(__file__).parents[1] / "recipes"))
from benchmarks import inference, ladder


def write_run(folder: Path, sizes: dict[str, int], losses: dict[str, float], seed: int = 0) -> str:
    """What a recipe leaves of a run."""
    networks = [
        {"name": name, "parameters": size, "flops_per_token": 2 * size, "scores": {"loss": 1.0}}
        for name, size in sizes.items()
    ]
    run = {
        "arm": "joint",
        "seed": seed,
        "core_updates": 5,
        "flops": 100,
        "core": losses,
        "history": [],
        "chosen": True,
    }
    another = {**run, "core": dict.fromkeys(losses, 9.0), "chosen": False}  # at a learning rate that lost
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps({"networks": networks, "runs": [run, another]}))
    return str(folder)


def test_rungs_meet_the_runs_of_their_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"full": 100, "core": 60, "core-r2": 20}
    whole = write_run(tmp_path / "ladder", sizes, {"loss": 3.0, "r2_loss": 4.0})
    small = write_run(tmp_path / "small", {"full": 100, "core": 20}, {"loss": 4.5})
    large = write_run(tmp_path / "large", {"full": 100, "core": 60}, {"loss": 2.5})
    out = ["--output_dir", str(tmp_path / "out")]
    rows = ladder.main([whole, large, small, *out])
    assert [(row["rung"], row["in_ladder"], row["alone"]) for row in rows] == [
        ("core-r2", [4.0], [4.5]),
        ("core", [3.0], [2.5]),
    ]
    printed = capsys.readouterr().out
    assert "-0.5000" in printed and "5 updates of the ladder, 100 FLOPs; the runs alone together 200" in printed
    assert (tmp_path / "out" / "ladder.png").stat().st_size > 0
    with pytest.raises(ValueError, match=r"seeds \[6\]"):
        ladder.main([whole, write_run(tmp_path / "other seed", {"full": 100, "core": 20}, {"loss": 4.5}, 6), *out])
    with pytest.raises(ValueError, match="30 parameters"):
        ladder.main([whole, write_run(tmp_path / "other", {"full": 100, "core": 30}, {"loss": 4.5}), *out])


def test_extracted_cores_are_timed_beside_their_flops(tmp_path: Path) -> None:
    cores: dict[str, Any] = {"rank": {"kind": "low_rank", "rank": 0.25}, "half": {"kind": "depth", "keep": 0.5}}
    options = ["--widths", "32", "--layers", "2", "--rounds", "2", "--prompt_tokens", "4"]
    rows = inference.main([*options, "--cores", json.dumps(cores), "--output_dir", str(tmp_path)])
    full, rank, half = rows
    assert [row["core"] for row in rows] == ["full", "rank", "half"]
    assert full["flops"] == full["token"] == full["prompt"] == 1.0
    block, head = 4 * 32 * 32 + 3 * 32 * 80, 4096 * 32
    assert half["flops"] == pytest.approx((block + head) / (2 * block + head))
    factors = 4 * 8 * (32 + 32) + 3 * 8 * (32 + 80)
    assert rank["flops"] == pytest.approx((2 * factors + head) / (2 * block + head))
    assert all(row["token"] > 0 and row["prompt"] > 0 for row in rows)
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == rows
