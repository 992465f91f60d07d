"""What each rule keeps, against its formula; draws that are pure; schedules of scalars."""

from __future__ import annotations

import itertools
import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from architectures import architecture
from common import tiny, values

from hf_masked import Phase, StepInfo
from hf_masked.apply import hold_still, mask_update, release
from hf_masked.draws import largest_drawn, random_entries
from hf_masked.masks import Chain, Complement, ErrorFeedback, Fixed, RandK, TopK, block_of
from hf_masked.masks.entries import _each, _joint_indices, counts, places
from hf_masked.masks.selection import kept_count, largest, largest_of_all, where_true
from hf_masked.masks.sparse_training import erdos_renyi
from hf_masked.methods import make_method
from hf_masked.values import Constant, make_value

SHAPES = {"layers.0.weight": (20, 30), "layers.1.weight": (10, 8), "layers.1.bias": (8,)}


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


# --- entries -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [1e-9, 0.03, 0.1, 0.5, 0.97, 1.0])
def test_exactly_k_of_the_largest(density: float) -> None:
    generator = torch.Generator().manual_seed(0)
    # of many entries every 48th is looked at first; the last two mislead it: all of the large ones, and none of them
    many, at = torch.randn(200_000, generator=generator), torch.arange(200_000) % 48 == 0
    embedding = many * (torch.arange(200_000) < 10_000)
    for g in [
        *tensors().values(),
        torch.zeros(7),
        torch.ones(3, 3),
        torch.ones(200_000),
        many,
        many * at,
        many * ~at,
        embedding,
    ]:
        count = kept_count(density, g.numel())
        for scores, sizes, magnitude in ((g, g, False), (g, g.abs(), True)):
            kept = largest(scores, count, magnitude)
            assert kept.sum() == count == max(1, round(density * g.numel()))
            if count < g.numel():
                assert sizes[kept].min() >= sizes[~kept].max()


def test_a_number_that_is_none_is_among_the_largest() -> None:
    """So that it is seen, wherever a bound on the largest comes from."""
    for rest in (torch.zeros(200_000), torch.rand(200_000)):
        rest[5::20_000] = torch.nan
        for count, magnitude in itertools.product((5, 20_000), (False, True)):
            kept = largest(rest, count, magnitude)
            assert kept.sum() == count
            assert rest[kept].isnan().sum() == min(10, count)


@pytest.mark.parametrize("count", [1, 5_000, 20_000, 120_000, 199_999])
def test_parts_are_selected_from_as_one(count: int) -> None:
    """The same entries, of equal ones the first, as where the parts are joined."""
    drawn = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    few = drawn * (torch.arange(200_000) % 20 == 0)
    # the second has many equal ones on both sides of a cut, the third mostly zeros, the fourth values that are none
    for scores in (drawn, (4 * drawn).round(), few, few.where(drawn < 3, torch.nan)):
        for magnitude in (False, True):
            kept = largest_of_all(
                [part.view(-1, 100) for part in scores.split([50_000, 100, 149_900])], count, magnitude
            )
            assert torch.equal(torch.cat([k.flatten() for k in kept]), largest(scores, count, magnitude))
    # in place of all that a processor would have to look for, a few values tell where the first equal ones end
    zeros = largest_of_all([torch.ones(3), torch.ones(4)], 5)
    assert [k.tolist() for k in zeros] == [[True] * 3, [True, True, False, False]]


@pytest.mark.parametrize(("count", "most"), [(20_000, 0.9), (120_000, 1.3)])
def test_what_a_selection_takes(count: int, most: float) -> None:
    """Over the parts' own size, masks among it; a joined copy, and one of the absolute values, would be more."""
    parts = list(torch.randn(200_000).split(50_000))
    largest_of_all(parts, count, magnitude=True)
    tracemalloc.start()
    largest_of_all(parts, count, magnitude=True)
    peak = tracemalloc.get_traced_memory()[1] / 800_000
    tracemalloc.stop()
    assert 0.25 < peak < most


def test_global_scope_selects_over_all_tensors() -> None:
    g = tensors()
    one, each = (make_method("top_k", density=0.1, scope=s).grad_mask(StepInfo(0, 1), g) for s in ("global", "tensor"))
    joined = torch.cat([v.abs().flatten() for v in g.values()])
    threshold = joined.sort(descending=True).values[kept_count(0.1, joined.numel()) - 1]
    assert all(torch.equal(one[n], v.abs() >= threshold) for n, v in g.items())
    assert any(not torch.equal(one[n], each[n]) for n in g)


def test_one_search_finds_what_several_do() -> None:
    """As masks on an accelerator are searched, which has to be waited for."""
    shapes = ((7, 5), (1,), (4, 2, 3))
    drawn = [torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.3 for shape in shapes]
    masks = [torch.zeros(3, dtype=torch.bool), *drawn, ~drawn[0], torch.ones(2, 2, dtype=torch.bool)]
    for kept, at, alone in zip(masks, _joint_indices(masks), places(masks), strict=True):
        assert torch.equal(at, alone) and torch.equal(at, kept.flatten().nonzero().flatten())
    assert counts(masks) == [int(kept.sum()) for kept in masks]


@pytest.mark.parametrize("entries", [0, 1, 7, 8, 1001])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.09, 0.5, 1.0])
def test_places_are_those_that_numpy_finds(share: float, entries: int) -> None:
    mask = torch.rand(3 * entries, generator=torch.Generator().manual_seed(0)) < share
    # a view that begins anywhere, as a piece of a tensor does, and one that skips entries
    for part in (mask, mask[1:], mask[entries : 2 * entries], mask[::3]):
        assert where_true(part.numpy()).tolist() == np.flatnonzero(part.numpy()).tolist()


def test_one_selection_finds_what_several_do() -> None:
    """As tensors of one size on an accelerator are selected from, which takes longer to be told than to select."""
    given = {str(seed): tensors(seed)["layers.0.weight"] for seed in range(3)}
    together = dict(_each(given, list(given), 0.1, magnitude=True))
    assert all(torch.equal(together[name], largest(given[name], 60, magnitude=True)) for name in given)
    assert not torch.equal(together["0"], together["1"])


def test_numbers_drawn_on_a_device_choose_as_often() -> None:
    draws = [largest_drawn(10, 3, seed, torch.device("cpu")) for seed in range(2000)]
    assert all(int(draw.sum()) == 3 for draw in draws)
    # five standard deviations of a mean of 2000 draws with p = 0.3
    assert (torch.stack(draws).double().mean(0) - 0.3).abs().max() < 5 * (0.3 * 0.7 / 2000) ** 0.5


def test_every_choice_of_entries_is_equally_probable() -> None:
    for count, of in ((3, 10), (8, 10), (1, 40), (39, 40)):  # few places are drawn by themselves
        draws = sum(random_entries(torch.Size([of]), count, seed).double() for seed in range(2000))
        p = count / of
        assert draws.sum() == 2000 * count
        assert (draws - 2000 * p).abs().max() < 4.5 * math.sqrt(2000 * p * (1 - p))


def test_every_pair_of_entries_is_equally_probable() -> None:
    """Entries too many or too few are put right by choice, which must not prefer neighbours, or the first."""
    seen = torch.zeros(6, 6)
    for seed in range(3000):
        kept = random_entries(torch.Size([6]), 2, seed).float()
        seen += torch.outer(kept, kept)
    pairs, p = seen[torch.triu_indices(6, 6, 1).unbind()], 1 / 15
    assert (pairs - 3000 * p).abs().max() < 4.5 * math.sqrt(3000 * p * (1 - p))


RANDOM = {
    "rand_k": {"density": 0.3},
    "random_coordinates": {"density": 0.3},
    "badam": {"every": 1},
    "lisa": {"every": 1, "blocks": 1},
    "set": {"every": 1},
}


@pytest.mark.parametrize("name", RANDOM)
def test_draws_are_pure(name: str) -> None:
    """The same (seed, step, name) gives the same mask, whatever else was drawn; another seed gives another."""

    def drawn(seed: int) -> list[Any]:
        rule: Any = make_method(name, **RANDOM[name]).grad_mask
        many = {f"layers.{i}.weight": torch.randn(6, 6, generator=torch.Generator().manual_seed(i)) for i in range(9)}
        masks = []
        for t in range(5):
            info = StepInfo(t, 20, seed)
            if hasattr(rule, "support"):
                rule.support(info, many)
            mask = rule(info, many, many) if hasattr(rule, "needs_parameters") else rule(info, many)
            masks.append({n: torch.as_tensor(m).tolist() for n, m in mask.items()})
        return masks

    first = drawn(0)
    torch.manual_seed(1)
    torch.rand(3)
    assert drawn(0) == first
    assert drawn(1) != first
    assert name == "set" or len({str(m) for m in first}) > 1, "no new draw in a new step"


def test_nothing_is_lost_with_error_feedback() -> None:
    """Sum of what is sent, and the error, is the sum of all gradients; without feedback it is not."""
    for wrap, exact in ((ErrorFeedback, True), (lambda rule: rule, False)):
        rule = wrap(TopK(Constant(0.05)))
        parameters = {n: torch.nn.Parameter(torch.zeros(s, dtype=torch.float64)) for n, s in SHAPES.items()}
        total = {n: torch.zeros(s, dtype=torch.float64) for n, s in SHAPES.items()}
        sent = {n: torch.zeros(s, dtype=torch.float64) for n, s in SHAPES.items()}
        for t in range(10):
            for name, g in tensors(t).items():
                parameters[name].grad = g.double()
                total[name] += g
            mask_update(parameters, Phase("full", grad_mask=rule), StepInfo(t, 10))
            assert all(0 < p.grad.count_nonzero() <= kept_count(0.05, p.numel()) for p in parameters.values())
            for name, p in parameters.items():
                sent[name] += p.grad
        error = getattr(rule, "error", {})
        off = max(float((sent[n] + error.get(n, 0) - total[n]).abs().max()) for n in SHAPES)
        assert (off < 1e-12) is exact


# --- blocks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["ascending", "descending", "shuffled"])
def test_every_block_has_its_turn(order: str) -> None:
    names = ["embed.weight", *(f"h.{i}.weight" for i in range(4)), "head.weight"]
    rule: Any = make_method("badam", every=3, order=order).update_mask
    gradients = {n: torch.zeros(1) for n in names}
    trained = [tuple(n for n, kept in rule(StepInfo(t, 60), gradients).items() if kept) for t in range(60)]
    for cycle in range(4):
        turns = trained[15 * cycle : 15 * (cycle + 1)]
        assert len(set(turns)) == 5 and set().union(*turns) == set(names)
        assert all(turns[3 * i] == turns[3 * i + 1] == turns[3 * i + 2] for i in range(5))
    assert (trained[:15] == trained[15:30]) is (order != "shuffled")


def nothing(info: StepInfo, gradients: Any) -> dict[str, bool]:
    return dict.fromkeys(gradients, False)


nothing.whole_tensors = True  # type: ignore[attr-defined]


def nodes(model: Any, batch: Any) -> int:
    """Autograd nodes behind the loss."""
    seen, stack = set(), [model(**batch).loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack += [following for following, _ in node.next_functions]
    return len(seen)


def test_backward_stops_below_the_lowest_layer_that_is_trained() -> None:
    model = tiny("llama")
    batch = architecture("llama").inputs()
    parameters = dict(model.named_parameters())
    whole = nodes(model, batch)
    counts = {}
    for trained in (".*layers.0.*", ".*layers.1.*", "lm_head.*"):
        phase = make_method("parameters", trained=trained).fill(Phase("full"))
        held = hold_still(parameters, phase, StepInfo(0, 1))
        counts[trained] = nodes(model, batch)
        model(**batch).loss.backward()
        release(held)
        assert {n for n, p in parameters.items() if p.grad is not None} == {
            n for n, p in parameters.items() if p not in set(held)
        }
        model.zero_grad()
    lower, upper, head = counts.values()
    assert head < upper < 0.6 * whole and upper < lower < whole
    assert nodes(model, batch) == whole, "what was held is differentiated again"
    with pytest.raises(ValueError, match=r"leaves out every tensor.*--method_config"):
        hold_still(parameters, Phase("full", update_mask=nothing), StepInfo(0, 1))


def test_blocks_are_found_in_every_architecture() -> None:
    for name in ("llama", "gpt2", "opt", "t5"):
        found = {block_of(n) for n in values(tiny(name))}
        assert len(found - {None}) >= 2 and None in found


# --- sparse training ---------------------------------------------------------------------------------------------------


def test_rigl_drops_and_grows_by_the_formula() -> None:
    rule: Any = make_method("rigl", density=0.3, every=10, until=0.75).grad_mask
    x, last = tensors(), {}
    for t in range(100):
        info, g = StepInfo(t, 100), tensors(t + 1)
        for name, mask in rule.support(info, x).items():
            x[name] = x[name] * mask
        old = {n: m.clone() for n, m in rule.masks.items()}
        new = rule(info, g, x)
        if t % 10 or t == 0 or t >= 75:
            assert all(torch.equal(new[n], old[n]) for n in new)
            continue
        for name, mask in new.items():
            count = int(old[name].sum())
            changed = round(0.3 / 2 * (1 + math.cos(math.pi * t / 75)) * count)
            assert int(mask.sum()) == count
            order = x[name].abs().masked_fill(~old[name], math.inf).flatten().argsort()
            kept = old[name].flatten().clone()
            kept[order[:changed]] = False
            candidates = g[name].abs().flatten().masked_fill(kept, -1).argsort(descending=True)
            kept[candidates[:changed]] = True
            assert torch.equal(kept.view(mask.shape), mask)
            last[name] = changed
            # trained a little, so that no two magnitudes are equal
            x[name] = (x[name] + 0.01 * tensors(t + 2)[name]) * mask
    assert set(last) == {"layers.0.weight", "layers.1.weight"}, "biases stay dense"


@pytest.mark.parametrize(("start", "end"), [(0.6, 0.1), (0.1, 0.6)])
@pytest.mark.parametrize("distribution", ["erk", "uniform"])
@pytest.mark.parametrize("name", ["rigl", "set"])
def test_a_density_that_changes_is_followed(name: str, distribution: str, start: float, end: float) -> None:
    """At every change the share of the smallest goes, more where the density falls by more, and the rest is grown."""
    density = {"name": "linear", "start": start, "end": end, "until": 0.5}
    rule: Any = make_method(name, density=density, drop=0.2, every=10, until=0.75, distribution=distribution).grad_mask
    x = tensors()
    rule.support(StepInfo(0, 100), x)
    sizes = []
    for t in range(100):
        old = {n: m.clone() for n, m in rule.masks.items()}
        new = rule(StepInfo(t, 100), tensors(t + 1), x)
        if t % 10 or t == 0 or t >= 75:
            assert all(torch.equal(new[n], old[n]) for n in new)
            continue
        now = start + (end - start) * min(1, t / 50)
        shares = erdos_renyi({n: x[n].shape for n in new}, now) if distribution == "erk" else dict.fromkeys(new, now)
        for n, mask in new.items():
            before, after = int(old[n].sum()), int(mask.sum())
            assert after == round(shares[n] * mask.numel())
            left = min(before - min(round(0.2 * before), mask.numel() - before), after)
            smallest = x[n].abs().masked_fill(~old[n], math.inf).flatten().argsort()[: before - left]
            kept = old[n].flatten().clone()
            kept[smallest] = False
            assert bool((mask.flatten() & kept).equal(kept))
        sizes.append(sum(int(m.sum()) for m in new.values()))
    assert len(set(sizes)) == 5 and sizes == sorted(sizes, reverse=start > end), "constant from half of the run on"


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_erdos_renyi_densities(density: float) -> None:
    shapes = {"a": torch.Size([100, 100]), "b": torch.Size([4, 6]), "c": torch.Size([8, 50, 3])}
    found = erdos_renyi(shapes, density)
    entries = {n: s.numel() for n, s in shapes.items()}
    assert sum(found[n] * entries[n] for n in shapes) == pytest.approx(density * sum(entries.values()))
    assert all(0 < d <= 1 for d in found.values())
    free = [found[n] * entries[n] / sum(s) for n, s in shapes.items() if found[n] < 1]
    assert max(free) == pytest.approx(min(free))


def test_gradual_pruning_follows_its_schedule() -> None:
    rule: Any = make_method(
        "gmp", density={"name": "cubic", "start": 1.0, "end": 0.1, "begin": 10, "until": 50}
    ).grad_mask
    x = tensors()
    for t in range(60):
        before = {n: m.clone() for n, m in rule.masks.items()}
        for name, mask in rule.support(StepInfo(t, 60), x).items():
            x[name] = x[name] * mask
        f = min(1.0, max(0.0, (t - 10) / 40))
        for name, mask in rule.masks.items():
            assert int(mask.sum()) == kept_count(0.1 + 0.9 * (1 - f) ** 3, mask.numel())
            assert not (mask & ~before.get(name, mask)).any(), "a pruned weight came back"
            assert (x[name] != 0).sum() == mask.sum()


# --- composition -------------------------------------------------------------------------------------------------------


def test_chain_and_complement() -> None:
    g, info = tensors(), StepInfo(3, 9)
    a, b = TopK(Constant(0.3)), RandK(Constant(0.4))
    both = Chain(a, b)(info, g)
    for name in g:
        assert torch.equal(both[name], a(info, g)[name] & b(info, g)[name])
        assert torch.equal(Complement(a)(info, g)[name], ~a(info, g)[name])
    nested = Chain(Complement(make_method("magnitude", density=0.2).grad_mask), Fixed({"layers.1.bias": False}))
    assert nested(info, g, g)["layers.1.bias"] is False
    assert Chain(make_method("badam").grad_mask, Complement(make_method("lisa").grad_mask)).whole_tensors
    assert not Chain(make_method("badam").grad_mask, a).whole_tensors
    for name in ("topk_ef", "rigl", "freeze_out"):
        with pytest.raises(ValueError, match="needs a plain mask"):
            Chain(make_method(name).grad_mask)


# --- scalars -----------------------------------------------------------------------------------------------------------

SCHEDULES: list[tuple[Any, Any]] = [
    (0.3, lambda t: 0.3),
    ({"name": "constant", "value": 0.3}, lambda t: 0.3),
    ({"name": "linear", "start": 1.0, "end": 0.2, "begin": 4, "until": 0.7}, lambda f: 1.0 - 0.8 * f),
    (
        {"name": "cosine", "start": 1.0, "end": 0.2, "begin": 4, "until": 0.7},
        lambda f: 0.6 + 0.4 * math.cos(math.pi * f),
    ),
    ({"name": "cubic", "start": 1.0, "end": 0.2, "begin": 4, "until": 0.7}, lambda f: 0.2 + 0.8 * (1 - f) ** 3),
]


@pytest.mark.parametrize(("spec", "formula"), SCHEDULES, ids=["number", "constant", "linear", "cosine", "cubic"])
def test_schedules_of_scalars(spec: Any, formula: Any) -> None:
    value = make_value(spec, "density", 0, 1)
    for t in range(20):
        assert value(StepInfo(t, 20)) == pytest.approx(formula(min(1.0, max(0.0, (t - 4) / 10))))


def test_a_warm_up_and_pieces() -> None:
    warm = make_value({"name": "warmup", "value": 0.4, "steps": 0.2}, "rho", 0)
    assert [warm(StepInfo(t, 20)) for t in range(6)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])
    pieces = make_value({"name": "piecewise", "steps": [2, 0.5], "values": [1.0, 0.5, 0.1]}, "density", 0, 1)
    assert [pieces(StepInfo(t, 8)) for t in range(6)] == [1.0, 1.0, 0.5, 0.5, 0.1, 0.1]


BAD_VALUES: list[tuple[Any, str]] = [
    (0, "density=0.*> 0"),
    (1.5, "density=1.5.*<= 1"),
    (True, "density=True"),
    ("half", "density='half'.*JSON"),
    ({"name": "square", "start": 1.0, "end": 0.1}, "square.*one of"),
    ({"name": "linear", "start": 1.0}, "needs all of its options"),
    ({"name": "linear", "start": 1.0, "end": 0.0}, "density=0.0"),
    ({"name": "linear", "from": 1.0}, "from.*some of"),
    ({"name": "cosine", "start": 1.0, "end": 0.5, "until": 1.5}, "until=1.5"),
    ({"name": "cosine", "start": 1.0, "end": 0.5, "every": 0}, "every=0"),
    ({"name": "piecewise", "steps": [3], "values": [1.0]}, "one value more"),
]


@pytest.mark.parametrize(("spec", "message"), BAD_VALUES, ids=str)
def test_bad_scalars_are_refused(spec: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s)got .*{message}.*--method_config"):
        make_value(spec, "density", 0, 1, above=True)
