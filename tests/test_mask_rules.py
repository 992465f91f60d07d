"""What rules answer, against their definitions: `test_exactness.py` takes their answers as given."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch

from hf_masked import StepInfo
from hf_masked.masks import Fixed
from hf_masked.masks.selection import kept_count
from hf_masked.methods import make_method

Tensors = dict[str, torch.Tensor]
SHAPES = {"embed.weight": (30, 20), "layers.0.weight": (20, 30), "layers.1.weight": (10, 8), "layers.1.bias": (8,)}
LAYERS = [f"h.{i}.weight" for i in range(6)]
NAMES = ["embed.weight", *LAYERS, "head.weight"]


def tensors(seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def rule(name: str, **options: Any) -> Any:
    return make_method(name, **options).update_mask


def best(scores: Tensors, density: float) -> dict[str, list[bool]]:
    """The largest of all tensors together, by sorting."""
    joined = torch.cat([s.flatten() for s in scores.values()]).sort(descending=True).values
    return {name: (s >= joined[round(density * len(joined)) - 1]).tolist() for name, s in scores.items()}


def test_fisher_adds_up_squares_and_then_stays() -> None:
    fisher, seen = rule("fisher", density=0.1, batches=3), [tensors(t) for t in range(3)]
    for t, g in enumerate(seen):
        assert not any(torch.as_tensor(kept).any() for kept in fisher(StepInfo(t, 9), g).values()) or t == 2
    found = [{n: m.tolist() for n, m in fisher(StepInfo(t, 9), tensors(t)).items()} for t in (3, 4)]
    assert found[0] == found[1] == best({n: sum(g[n] ** 2 for g in seen) for n in SHAPES}, 0.1)
    assert found[0] != best({n: sum(g[n].abs() for g in seen) for n in SHAPES}, 0.1), "sizes in place of squares"


@pytest.mark.parametrize("largest", [True, False])
def test_magnitude_looks_at_the_weights(largest: bool) -> None:
    x, g = tensors(0), tensors(1)
    found = rule("magnitude", density=0.2, scope="global", largest=largest)(StepInfo(0, 1), g, x)
    sign = 1 if largest else -1
    assert {n: m.tolist() for n, m in found.items()} == best({n: sign * v.abs() for n, v in x.items()}, 0.2)


def test_rand_k_keeps_k_of_every_tensor_for_a_while() -> None:
    rand_k = rule("rand_k", density={"name": "linear", "start": 0.5, "end": 0.1}, every=2)
    masks = [rand_k(StepInfo(t, 4), tensors(t)) for t in range(4)]
    for t, mask in enumerate(masks):
        assert {n: int(m.sum()) for n, m in mask.items()} == {
            n: kept_count(0.5 - 0.1 * t, torch.Size(s).numel()) for n, s in SHAPES.items()
        }
    constant = rule("rand_k", density=0.3, every=2)
    same = [{n: m.tolist() for n, m in constant(StepInfo(t, 4), tensors(t)).items()} for t in range(4)]
    assert same[0] == same[1] != same[2] == same[3]


def test_random_coordinates_keep_their_share() -> None:
    found = rule("random_coordinates", density=0.2)(StepInfo(0, 1), {"w": torch.zeros(200, 200)})["w"]
    assert abs(int(found.sum()) - 8000) < 4.5 * math.sqrt(40_000 * 0.2 * 0.8)
    # independent of the neighbour in either direction
    for shifted in (found[1:] & found[:-1], found[:, 1:] & found[:, :-1]):
        assert abs(shifted.float().mean() - 0.04) < 4.5 * math.sqrt(0.04 / 39_800)


@pytest.mark.parametrize("rest", ["train", "freeze", "block"])
def test_lisa_trains_as_many_blocks_as_it_says(rest: str) -> None:
    lisa, turns = rule("lisa", blocks=2, every=3, rest=rest), Counter[str]()
    gradients, before = {n: torch.zeros(1) for n in NAMES}, set[str]()
    for t in range(900):
        trained = {n for n, kept in lisa(StepInfo(t, 900), gradients).items() if kept}
        blocks = trained & set(LAYERS)
        outside = trained - blocks
        assert outside in (set(), {"embed.weight", "head.weight"})
        assert len(blocks) == (2 - bool(outside) if rest == "block" else 2)
        if rest != "block":
            assert bool(outside) is (rest == "train")
        if t % 3 == 0:
            turns.update(blocks | ({"rest"} if outside else set()))
        else:
            assert trained == before
        before = trained
    drawn = turns if rest == "block" else {n: turns[n] for n in LAYERS}
    p = 2 / len(drawn)
    assert len(drawn) == (7 if rest == "block" else 6)
    assert all(abs(count - 300 * p) < 4.5 * math.sqrt(300 * p * (1 - p)) for count in drawn.values())


@pytest.mark.parametrize("kind", ["linear", "cubic"])
@pytest.mark.parametrize("scale", [True, False])
def test_freeze_out_ends_and_rates(kind: str, scale: bool) -> None:
    """Layer i ends at t0 + (1 - t0) i / (L - 1) of the run, or its cube; scaled, all have travelled equally far by then."""
    freeze_out, steps = rule("freeze_out", t0=0.5, kind=kind, scale=scale), 1000
    power = 1 if kind == "linear" else 3
    ends = {n: (0.5 + 0.5 * i / 5) ** power for i, n in enumerate(LAYERS)}
    ends |= {"embed.weight": ends[LAYERS[0]], "head.weight": ends[LAYERS[-1]]}
    travelled = dict.fromkeys(NAMES, 0.0)
    for t in range(steps):
        info = StepInfo(t, steps)
        trained = freeze_out(info, dict.fromkeys(NAMES, torch.zeros(1)))
        assert trained == {n: t < ends[n] * steps for n in NAMES}
        rates = freeze_out.rates(info, NAMES)
        travelled = {n: travelled[n] + rates[n] * trained[n] / steps for n in NAMES}
    for name, distance in travelled.items():
        assert distance == pytest.approx(0.5 if scale else 0.5 * ends[name], abs=5e-3)


def test_one_layer_alone_is_the_last_to_freeze() -> None:
    freeze_out = rule("freeze_out", t0=0.5)
    for t in range(10):
        assert all(
            freeze_out(StepInfo(t, 10), {"embed.weight": torch.zeros(1), "h.0.weight": torch.zeros(1)}).values()
        )


def test_set_drops_the_smallest_and_grows_anywhere() -> None:
    set_, x = rule("set", density=0.3, drop=0.4, every=1, distribution="uniform"), tensors(0)
    set_.support(StepInfo(0, 50), x)
    shapes = {n: torch.Size(s).numel() for n, s in SHAPES.items() if n.startswith("layers") and len(s) == 2}
    assert {n: int(m.sum()) for n, m in set_.masks.items()} == {n: round(0.3 * count) for n, count in shapes.items()}
    grown = torch.zeros(SHAPES["layers.0.weight"])
    for t in range(1, 50):
        old = {n: m.clone() for n, m in set_.masks.items()}
        new = set_(StepInfo(t, 50), tensors(99), x)
        for name, mask in new.items():
            count = int(old[name].sum())
            order = x[name].abs().masked_fill(~old[name], math.inf).flatten().argsort()
            kept = old[name].flatten().clone()
            kept[order[: round(0.4 * count)]] = False
            kept = kept.view(mask.shape)
            assert int(mask.sum()) == count and bool((mask & kept == kept).all())
        grown += new["layers.0.weight"] & ~old["layers.0.weight"]
    # where the gradient is large is grown no more often
    large = tensors(99)["layers.0.weight"].abs() > 1
    assert float(grown[large].mean() / grown[~large].mean()) == pytest.approx(1, abs=0.15)


def test_a_fixed_mask_is_the_mask() -> None:
    given: dict[str, Any] = {"layers.0.weight": torch.rand(20, 30) < 0.5, "layers.1.bias": False, "elsewhere": True}
    found = Fixed(given)(StepInfo(5, 9), tensors(0))
    assert found["layers.0.weight"].equal(given["layers.0.weight"]) and found["layers.1.bias"] is False  # type: ignore[union-attr]
    assert set(found) == {"layers.0.weight", "layers.1.bias"}, "what is not named is left to be trained"


def test_masks_from_a_file_are_moved_to_the_device_once() -> None:
    """Asked again for gradients on a device that is not there, the rules answer with the same tensors."""
    there = {name: torch.empty(shape, device="meta") for name, shape in SHAPES.items()}
    masks = {name: g > 0 for name, g in tensors(0).items()}
    resumed = rule("fisher", density=0.5)
    resumed.load_state_dict({f"mask.{name}": mask for name, mask in masks.items()})
    for made in (Fixed(masks), resumed):
        first, again = (made(StepInfo(t, 9), there) for t in range(2))
        assert all(mask.device.type == "meta" and again[name] is mask for name, mask in first.items())  # type: ignore[union-attr]
