"""The two deliverables as a user gets them: reloaded from disk, then sized, timed and scored."""

from __future__ import annotations

import copy
import re
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel

from hf_masked.cores import LoraCore
from hf_masked.export_folder import exported_cores

from .flops import count_flops
from .task import Scores, Task

TIMED_FORWARDS = 5


@dataclass
class NetworkReport:
    """What one network costs and what it can do.

    Args:
        bytes_on_disk: of its weight files; those of an adapter are without its base.
        flops_per_token: of a forward pass over one batch, attention included, per token position of the batch.
        tokens_per_second: of the same forward pass, median of interleaved runs.
    """

    name: str
    parameters: int
    bytes_on_disk: int
    flops_per_token: int
    tokens_per_second: float
    scores: Scores
    sample: str


def network_folders(folder: str | Path) -> dict[str, Path]:
    """Name -> where it lies, of the full network and of every core of an export."""
    cores = {
        re.sub(rf"^{LoraCore.folder}(?=-|$)", "core", name): Path(folder, name) for name in exported_cores(folder)
    }
    return {"full": Path(folder), **cores}


def reload_networks(task: Task, folder: str | Path) -> dict[str, PreTrainedModel]:
    """Load the full network and the cores from an export, each with the smaller ones of its ladder by size, and an adapter onto
    the base model that it names."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    networks: dict[str, Any] = {}
    for name, place in network_folders(folder).items():
        if (place / "adapter_config.json").is_file():
            base = PeftConfig.from_pretrained(place).base_model_name_or_path
            # with the full network's config, since the base's own may be of another number of labels
            model = task.auto_class.from_pretrained(base, config=copy.deepcopy(networks["full"].config))
            networks[name] = PeftModel.from_pretrained(model, place)
        else:
            networks[name] = task.auto_class.from_pretrained(place)

    def place_of(name: str) -> tuple[bool, str, bool, int]:
        core, rung, _ = name.partition("-")
        return name != "full", core, bool(rung), networks[name].num_parameters()

    networks = {name: networks[name] for name in sorted(networks, key=place_of)}
    return {name: model.to(device).eval() for name, model in networks.items()}


def describe_networks(task: Task, folder: str | Path, batch_size: int) -> list[NetworkReport]:
    """Reload the networks of an export and report on each."""
    networks, folders = reload_networks(task, folder), network_folders(folder)
    batches = task.batches(batch_size, networks["full"].device)
    batch = batches[len(batches) // 2]
    tokens = positions(batch, networks["full"].config.is_encoder_decoder)
    seconds = forward_seconds(networks, batch)
    reports = []
    for name, model in networks.items():
        with torch.no_grad():
            flops = count_flops(lambda model=model: model(**batch))  # type: ignore[misc]
        reports.append(
            NetworkReport(
                name=name,
                parameters=model.num_parameters(),
                bytes_on_disk=sum(file.stat().st_size for file in folders[name].glob("*.safetensors")),
                flops_per_token=round(flops / tokens),
                tokens_per_second=tokens / seconds[name],
                scores=task.score(model),
                sample=task.sample(model),
            )
        )
    return reports


def positions(batch: dict[str, Any], encoder_decoder: bool) -> int:
    """Token positions of a batch; those of the target count as well where it is another text than the input."""
    return sum(batch[name].numel() for name in ("input_ids", "labels")[: 1 + encoder_decoder])


@torch.no_grad()
def forward_seconds(networks: dict[str, PreTrainedModel], batch: dict[str, Any]) -> dict[str, float]:
    """Median seconds of a forward pass of each network, timed in turns so that all meet the same machine."""
    times: dict[str, list[float]] = {name: [] for name in networks}
    for _ in range(1 + TIMED_FORWARDS):
        for name, model in networks.items():
            started = time.perf_counter()
            model(**batch)
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}
