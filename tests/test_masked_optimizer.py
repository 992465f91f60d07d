"""Entries with update_mask 0 keep their bits under any optimizer; the others move as if there were no mask."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from held_bytes import Held
from on_gpu import DEVICES
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_masked import StepInfo, stepped_pieces
from hf_masked.masked_optimizer import FEW, MaskedSteps, StepMask, place_state
from hf_masked.methods import make_method


class Normed(torch.optim.SGD):
    """Momentum whose step is scaled by the norms of the whole tensor, as LARS and LAMB do."""

    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.grad *= parameter.norm() / parameter.grad.norm()
        super().step(closure)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, fused=True),
    "AdamW amsgrad": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, amsgrad=True, foreach=False),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9, centered=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.1),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.1),
}
DENSITIES = {"few": FEW / 2, "most": 0.75}
SHAPE = (40, 25)


def gradient(step: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(step)).to(dtype)


def kept(density: str, device: str = "cpu") -> torch.Tensor:
    return (torch.rand(SHAPE, generator=torch.Generator().manual_seed(7)) < DENSITIES[density]).to(device)


def run(
    make: Any, mask: Any, policy: str, steps: int = 5, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Any, Any, list[Any]]:
    """The parameter, the optimizer, and copies of the parameter and its state before every step."""
    parameter = nn.Parameter(gradient(99, dtype).to(device))
    parameter.data[0, 0] = -0.0
    optimizer = make([parameter])
    masked, seen = MaskedSteps(optimizer), []
    for t in range(steps):
        # the first step lets everything move, so that there is state to hold
        masked.obey(StepMask({"w": parameter}, {"w": mask}, policy) if t and mask is not None else None)
        parameter.grad = gradient(t, dtype).to(device)
        seen.append((parameter.detach().clone(), entries(optimizer, parameter)))
        optimizer.step()
    return parameter.detach(), optimizer, [*seen, (parameter.detach().clone(), entries(optimizer, parameter))]


def entries(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
    state = optimizer.state.get(parameter, {})
    return {k: v.clone() for k, v in state.items() if isinstance(v, torch.Tensor) and v.shape == parameter.shape}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.view(words) == b.view(words)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_held_entries_keep_their_bits_and_the_others_move_as_without_a_mask(
    name: str, density: str, device: str
) -> None:
    mask = kept(density, device)
    held, _, seen = run(OPTIMIZERS[name], mask, "freeze", device=device)
    free, _, _ = run(OPTIMIZERS[name], None, "freeze", device=device)
    (start, state), (end, last) = seen[1], seen[-1]
    assert same_bits(start, end)[~mask].all()
    assert all(same_bits(state[key], last[key])[~mask].all() for key in state)
    torch.testing.assert_close(held[mask], free[mask])
    assert not torch.isclose(free[~mask], end[~mask]).all(), "negative control: without a mask these move"


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("name", ["Normed", "Muon"])
def test_what_moves_a_tensor_as_a_whole_sees_all_of_it(name: str, density: str) -> None:
    """One masked step; later ones see what was held, which the step without a mask has moved."""
    if name == "Muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("newer than this torch")
    kind = Normed if name == "Normed" else torch.optim.Muon
    mask = kept(density)
    held, free = (run(lambda p: kind(p, lr=0.1, momentum=0.9), m, "freeze", steps=2)[0] for m in (mask, None))
    assert torch.equal(held[mask], free[mask]) and not torch.isclose(held, free)[~mask].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("policy", ["freeze", "decay", "reset"])
@pytest.mark.parametrize("device", DEVICES)
def test_state_policies(device: str, policy: str, density: str, dtype: torch.dtype) -> None:
    mask = kept(density, device)
    _, _, seen = run(OPTIMIZERS["AdamW foreach"], mask, policy, dtype=dtype, device=device)
    for (x, before), (y, after) in itertools.pairwise(seen[1:]):
        assert same_bits(x, y)[~mask].all() and (x != y)[mask].float().mean() > 0.9
        for key, beta in (("exp_avg", 0.9), ("exp_avg_sq", 0.999)):
            old, new = before[key][~mask].double(), after[key][~mask].double()
            expected = {"freeze": old, "decay": beta * old, "reset": 0 * old}[policy]
            tolerance = {} if dtype != torch.bfloat16 else {"rtol": 0.02, "atol": 1e-6}
            torch.testing.assert_close(new, expected, **tolerance or {"rtol": 1e-5, "atol": 1e-8})


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("policy", ["freeze", "reset"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_that_begins_under_a_mask_is_zero_elsewhere(name: str, policy: str, density: str) -> None:
    """From the first step on: as many numbers of state are made as without a mask."""
    mask = kept(density)
    parameter, alone = nn.Parameter(gradient(99, torch.float32)), nn.Parameter(gradient(99, torch.float32)[mask])
    optimizer, reference = OPTIMIZERS[name]([parameter]), OPTIMIZERS[name]([alone])
    begun = entries(optimizer, parameter)  # Adagrad's is there before
    steps = MaskedSteps(optimizer)
    before = parameter.detach().clone()
    for t in range(3):
        steps.obey(StepMask({"w": parameter}, {"w": mask}, policy))
        parameter.grad = gradient(t, torch.float32)
        alone.grad = parameter.grad[mask]
        optimizer.step()
        reference.step()
    # a fused kernel rounds an entry by its place
    torch.testing.assert_close(parameter[mask], alone)
    assert same_bits(parameter, before)[~mask].all()
    expected, found = entries(reference, alone), entries(optimizer, parameter)
    assert found.keys() == expected.keys()
    for key, state in found.items():
        torch.testing.assert_close(state[mask], expected[key])
        rest = torch.zeros(()) if policy == "reset" or key not in begun else begun[key][~mask]
        assert (state[~mask] == rest).all()


@pytest.mark.parametrize("policy", ["freeze", "decay", "reset"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pieces_are_steps_of_the_whole(name: str, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tensors, two groups, a factor of the rate, a gradient in another order, pieces of 64 entries, put back 16 at a
    time: what all at once gives, and counters advance once a step."""
    found = []
    for at_a_time, near in ((64, 16), (10**6, 10**6)):
        monkeypatch.setattr(stepped_pieces, "_PER_THREAD", at_a_time)
        monkeypatch.setattr(stepped_pieces, "_NEAR", near)
        made = [
            nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(i)))
            for i, shape in enumerate([(40, 25), (7,), (300,)])
        ]
        first, *others = made
        optimizer = OPTIMIZERS[name]([{"params": [first]}, {"params": others, "lr": 0.01}])
        steps, parameters = MaskedSteps(optimizer), {str(i): p for i, p in enumerate(made)}
        for t in range(4):
            masks = {
                n: torch.rand(p.shape, generator=torch.Generator().manual_seed(t)) < 0.6 for n, p in parameters.items()
            }
            steps.obey(StepMask(parameters, masks, policy, rates={"2": 0.5}) if t != 2 else None)  # type: ignore[arg-type]
            for i, p in enumerate(made):
                drawn = torch.randn(p.shape[::-1], generator=torch.Generator().manual_seed(100 * t + i))
                p.grad = drawn.mT if p.ndim == 2 else drawn
            optimizer.step()
        assert set(optimizer.state) <= set(made), "no piece is left"
        assert [group["params"] for group in optimizer.param_groups] == [[first], others]
        assert all(float(s["step"]) == 4 for s in optimizer.state.values() if "step" in s)
        assert all(p.grad is not None for p in made)
        found.append(
            {
                f"{n}.{key}": v
                for n, p in parameters.items()
                for key, v in ({"": p.detach()} | entries(optimizer, p)).items()
            }
        )
    small, large = found
    assert small.keys() == large.keys()
    for key, value in small.items():
        torch.testing.assert_close(value, large[key])


def copies_for_a_step(share: float) -> float:
    """Of the parameters' size, where such a share of them is kept."""
    made = [nn.Parameter(torch.randn(512, 512)) for _ in range(4)]
    optimizer = torch.optim.AdamW(made, lr=0.1, fused=True)
    steps = MaskedSteps(optimizer)
    masks = {
        str(i): torch.rand(p.shape, generator=torch.Generator().manual_seed(i)) < share for i, p in enumerate(made)
    }
    for wanted in (None, StepMask({str(i): p for i, p in enumerate(made)}, masks)):  # type: ignore[arg-type]
        for p in made:
            p.grad = torch.randn_like(p)
        optimizer.step()
        steps.obey(wanted)
    with Held() as held:
        held.ignore([*made, *(p.grad for p in made), *masks.values()])
        held.ignore(v for state in optimizer.state.values() for v in state.values())
        optimizer.step()
    return held.most / (4 * sum(p.numel() for p in made))


@pytest.mark.parametrize("share", [0.05, FEW, 0.3, 0.5, 0.9])
def test_copies_for_a_step_take_less_than_the_parameters(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    # as of a model too large for this test
    monkeypatch.setattr(stepped_pieces, "_PER_THREAD", 2**16)
    assert 0.05 < copies_for_a_step(share) < 1.0
    monkeypatch.setattr(stepped_pieces, "_PER_THREAD", 2**30)
    assert (copies_for_a_step(share) > 1.5) is (share >= FEW), "negative control: all at a time"


ZEROS = ["AdamW foreach", "AdamW fused", "AdamW amsgrad", "SGD", "SGD momentum", "Adagrad"]


def sparse(
    make: Any, masked_gradients: bool = True, renewed: bool = False, **options: Any
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Six steps of a sparse tensor whose mask changes after three, as `apply.py` makes them; `renewed` before every step, as on
    resuming."""
    parameter = nn.Parameter(gradient(99, torch.float32))
    optimizer = make([parameter])
    steps = MaskedSteps(optimizer)
    masks = [torch.rand(SHAPE, generator=torch.Generator().manual_seed(i)) < 0.3 for i in (7, 8)]
    for t in range(6):
        mask = masks[t // 3]
        parameter.data.masked_fill_(~mask, 0.0)
        parameter.grad = gradient(t, torch.float32) * (mask if masked_gradients else 1.0)
        steps.obey(StepMask({"w": parameter}, {"w": mask}, "reset", **options))
        if renewed:
            steps.renew()
        optimizer.step()
    return parameter.detach(), entries(optimizer, parameter)


@pytest.mark.parametrize("name", ZEROS)
def test_zeros_that_are_held_anew_change_no_bit(name: str) -> None:
    """So a run that is resumed between two changes of its mask ends as one that is not."""
    (left, after), (renewed, again) = (sparse(OPTIMIZERS[name], zero=True, renewed=r) for r in (False, True))
    assert same_bits(left, renewed).all()
    assert all(same_bits(after[key], again[key]).all() for key in after)


@pytest.mark.parametrize("name", ZEROS)
def test_zeros_stay_zero_without_being_held(name: str) -> None:
    """A sparse network's mask is held to when it changes, and left to the optimizer until the next change; where gradients
    are not masked the difference shows, but for an optimizer that is not trusted with it."""
    (held, before), (left, after) = (sparse(OPTIMIZERS[name], zero=zero) for zero in (False, True))
    outside = torch.rand(SHAPE, generator=torch.Generator().manual_seed(8)) >= 0.3
    assert same_bits(held, left)[outside].all() and not left[outside].any()
    # stepped apart and stepped with the rest, entries are rounded differently by fused kernels
    torch.testing.assert_close(left, held)
    torch.testing.assert_close(after, before)
    careless = sparse(OPTIMIZERS[name], masked_gradients=False, zero=True)[0]
    assert bool(careless[outside].any()) is (name != "Adagrad")


def two() -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer, MaskedSteps]:
    parameters = {"a": nn.Parameter(torch.ones(4)), "b": nn.Parameter(torch.ones(4))}
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1)
    return parameters, optimizer, MaskedSteps(optimizer)


@pytest.mark.parametrize("policy", ["freeze", "decay", "reset"])
def test_a_tensor_held_as_a_whole_costs_nothing(policy: str) -> None:
    """No state is made for it; what it had is left, decays, or is dropped."""
    parameters, optimizer, steps = two()
    for t in range(3):
        for p in parameters.values():
            p.grad = torch.full((4,), 1.0 + t)
        steps.obey(StepMask(parameters, {"a": t == 1}, policy))
        before = parameters["a"].detach().clone()
        average = optimizer.state[parameters["a"]]["exp_avg"].clone() if t == 2 else None
        optimizer.step()
        assert torch.equal(before, parameters["a"]) is (t != 1)
        if t == 0:
            assert list(optimizer.state) == [parameters["b"]]
    if policy == "reset":
        assert parameters["a"] not in optimizer.state
    else:
        factor = 0.9 if policy == "decay" else 1.0
        torch.testing.assert_close(optimizer.state[parameters["a"]]["exp_avg"], factor * average)
    assert int(optimizer.state[parameters["b"]]["step"]) == 3


@pytest.mark.parametrize("density", DENSITIES)
def test_a_step_that_raises_leaves_nothing_open(density: str) -> None:
    """Gradients are taken as before, and what was put in a tensor's place is put back: at once where that is asked for, and
    before the next step in any case."""

    class Failing(torch.optim.AdamW):
        fails = True

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            if self.fails:
                raise MemoryError
            super().step(closure)

    mask, parameter = kept(density), nn.Parameter(gradient(99, torch.float32))
    before, optimizer = parameter.detach().clone(), Failing([parameter], lr=0.1)
    steps, parameter.grad = MaskedSteps(optimizer), gradient(0, torch.float32)
    steps.obey(StepMask({"p": parameter}, {"p": mask}, rates={"p": 0.5}))
    for put_back in (steps.put_back, lambda: None):
        with pytest.raises(MemoryError):
            optimizer.step()
        assert torch.is_grad_enabled()
        put_back()
        assert same_bits(parameter, before).all() or put_back != steps.put_back
    optimizer.fails = False
    optimizer.step()
    assert torch.is_grad_enabled()
    assert torch.equal(~same_bits(parameter, before), mask)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1]
    steps.remove()
    optimizer.step()
    assert not same_bits(parameter, before)[~mask].any(), "obeys no more"


def test_state_of_resting_tensors_lies_elsewhere() -> None:
    parameters, optimizer, _ = two()
    for p in parameters.values():
        p.grad = torch.ones(4)
    optimizer.step()
    place_state(optimizer, parameters.values(), resting={parameters["a"]}, where="meta")
    devices = {n: optimizer.state[p]["exp_avg"].device.type for n, p in parameters.items()}
    assert devices == {"a": "meta", "b": "cpu"}


def test_an_accelerator_holds_the_state_of_what_is_trained_alone() -> None:
    """Of an accelerator that is not there torch's fake tensors know where each tensor lies, and its size: one of 8 blocks is
    trained, and what was once trained is in main memory. Whether the numbers are right takes a real one (below)."""
    names = [f"h.{i}.weight" for i in range(8)]
    rule = make_method("lisa", blocks=1, every=1).update_mask
    masks = [rule(StepInfo(t, 40), dict.fromkeys(names)) for t in range(40)]  # type: ignore[misc, arg-type]
    of_one_block = 2 * 4 * 64**2
    for offload in (True, False):
        with FakeTensorMode():
            parameters = {n: nn.Parameter(torch.empty(64, 64, device="cuda")) for n in names}
            optimizer = torch.optim.AdamW(parameters.values(), lr=0.1)
            steps, most = MaskedSteps(optimizer), 0
            for mask in masks:
                for p in parameters.values():
                    p.grad = torch.empty_like(p)
                steps.obey(StepMask(parameters, mask, "freeze", offload))
                optimizer.step()
                held = Counter[str]()
                for state in optimizer.state.values():
                    for tensor in state.values():
                        held[tensor.device.type] += tensor.nbytes if tensor.numel() > 1 else 0
                most = max(most, held["cuda"])
        assert most == (of_one_block if offload else 8 * of_one_block)
        assert held["cpu"] == (7 * of_one_block if offload else 0)


@pytest.mark.gpu
def test_offloaded_state_trains_on_as_if_it_had_stayed() -> None:
    finals = []
    for offload in (False, True):
        parameters = {n: nn.Parameter(torch.ones(4, device="cuda")) for n in ("a", "b")}
        optimizer = torch.optim.AdamW(parameters.values(), lr=0.1)
        steps = MaskedSteps(optimizer)
        for t in range(6):
            for p in parameters.values():
                p.grad = torch.full((4,), 1.0 + t, device="cuda")
            mask = {"a": t % 2 == 0, "b": t % 2 == 1}
            steps.obey(StepMask(parameters, mask, "freeze", offload))
            optimizer.step()
            resting = parameters["b" if t % 2 == 0 else "a"]
            if t and offload:
                assert optimizer.state[resting]["exp_avg"].device.type == "cpu"
        finals.append([p.detach().cpu() for p in parameters.values()])
    assert all(torch.equal(a, b) for a, b in zip(*finals, strict=True))


FACTORED: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "torch": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "transformers": lambda p: transformers.Adafactor(p, lr=0.1, relative_step=False, scale_parameter=False),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("name", FACTORED)
def test_state_that_is_not_per_entry(name: str, density: str, device: str) -> None:
    """Adafactor's rows and columns can go on without a gradient, but cannot be held entry by entry."""
    mask = kept(density, device)
    _, _, seen = run(FACTORED[name], mask, "decay", device=device)
    assert same_bits(seen[1][0], seen[-1][0])[~mask].all()
    assert (seen[1][0] != seen[-1][0])[mask].all()
    for policy in ("freeze", "reset"):
        with pytest.raises(ValueError, match=r'(?s)got Adafactor, whose state.*"decay".*--optim'):
            run(FACTORED[name], mask, policy, device=device)


@pytest.mark.parametrize("density", DENSITIES)
def test_bitsandbytes(density: str) -> None:
    """32-bit state is held entry by entry; of 8-bit state blocks have a scale in common, so that is refused where it would
    have to be, and goes on without a gradient, or rests as a whole, with every bit of the parameter."""
    optim = pytest.importorskip("bitsandbytes").optim
    mask = kept(density)

    def make(parameters: Any, eight_bit: bool = True) -> Any:
        kind = optim.AdamW8bit if eight_bit else optim.AdamW32bit
        return kind(parameters, lr=0.1, weight_decay=0.1, min_8bit_size=500)

    for eight_bit, policy in ((False, "freeze"), (True, "decay")):
        _, optimizer, seen = run(lambda p, e=eight_bit: make(p, e), mask, policy)
        assert same_bits(seen[1][0], seen[-1][0])[~mask].all()
        assert (seen[1][0] != seen[-1][0])[mask].all()
        assert (
            any(
                s.dtype == torch.uint8
                for s in next(iter(optimizer.state.values())).values()
                if isinstance(s, torch.Tensor)
            )
            is eight_bit
        )
        if not eight_bit:
            assert all(same_bits(seen[1][1][key], seen[-1][1][key])[~mask].all() for key in ("state1", "state2"))
    for policy in ("freeze", "reset"):
        with pytest.raises(ValueError, match=r'(?s)got AdamW8bit, whose state.*"decay".*--optim'):
            run(make, mask, policy)
    _, _, seen = run(make, False, "freeze")
    assert same_bits(seen[1][0], seen[-1][0]).all()
    assert all(torch.equal(seen[1][1][key], seen[-1][1][key]) for key in ("state1", "state2"))


def test_learning_rates_of_single_tensors() -> None:
    """A factor on the rate scales the whole of AdamW's step, decay included; the groups are as they were afterwards."""
    moved = {}
    for factor in (1.0, 0.25):
        parameters, optimizer, steps = two()
        groups = optimizer.param_groups[:]
        for p in parameters.values():
            p.grad = torch.ones(4)
        steps.obey(StepMask(parameters, {}, rates={"a": factor}))
        optimizer.step()
        assert optimizer.param_groups == groups and optimizer.param_groups[0]["lr"] == 0.1
        moved[factor] = {n: 1 - p.detach() for n, p in parameters.items()}
    torch.testing.assert_close(moved[0.25]["a"], 0.25 * moved[1.0]["a"])
    torch.testing.assert_close(moved[0.25]["b"], moved[1.0]["b"])
