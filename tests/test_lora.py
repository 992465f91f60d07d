"""The LoRA core: what it holds, where both networks start, what a split and a step do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import NAMES, answer, config, shake, with_adapter
from architectures import architecture
from common import Watch, arguments, difference, rows, values
from torch.func import functional_call

from hf_masked import LoraCoreConfig, MaskedTrainer, add_core, core_mode, core_summary, get_core, split
from hf_masked.reference import autograd_gradient, partial_sgd_step


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["free", "shared"])
def coupling(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# --- what it is --------------------------------------------------------------------------------------------------------


def test_both_networks_start_as_the_base(name: str, coupling: str) -> None:
    base, random_state = architecture(name).build(), torch.get_rng_state()
    model = add_core(architecture(name).build(), config(name, coupling=coupling))
    assert torch.equal(torch.get_rng_state(), random_state), "making the adapter drew from the global stream"
    with core_mode(model):
        assert torch.equal(answer(model, name), answer(base, name))
    assert torch.equal(answer(model, name), answer(base, name))
    shake(model)
    core = get_core(model)
    assert all(p.requires_grad == (n in core.tensors(model) or f"core.{n}" in core.tensors(model))
               for n, p in core.model.named_parameters())  # fmt: skip
    with core_mode(model):
        moved = not torch.equal(answer(model, name), answer(base, name))
    assert moved is (coupling == "shared"), "full steps move A and B when, and only when, they are shared"


def test_full_network_is_w0_plus_sba_plus_r() -> None:
    """The gradients of the shared coupling: dR = dW, dB = s dW A^T, dA = s B^T dW, against plain autograd on W."""
    model = with_adapter("gpt2", coupling="shared").double()
    core = get_core(model)
    core.sync(model)
    shake(model)
    dense = core.merge(model)
    for network in (model, dense):
        network(**architecture("gpt2").inputs()).loss.backward()
    for path, layer in core.layers.items():
        dW, merged, scale = dense.get_submodule(path).weight.grad, model.get_submodule(path), layer.scaling["default"]
        assert scale == 1.5
        torch.testing.assert_close(merged.R.grad, dW)
        torch.testing.assert_close(merged.B.grad, scale * dW.T @ merged.A.T)
        torch.testing.assert_close(merged.A.grad, scale * merged.B.T @ dW.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_base_is_held_once_in_its_own_dtype(dtype: torch.dtype, coupling: str) -> None:
    """Extra memory over a full fine-tune: W0's bytes, A and B in float32, and their optimizer state."""
    base = architecture("llama").build().to(dtype)
    plain = _bytes(base.parameters(), base.buffers())
    model = add_core(base, config(coupling=coupling))
    core = get_core(model)
    adapter = [p for p in core.model.parameters() if p.requires_grad]
    assert {p.dtype for p in adapter} == {torch.float32}
    answer(model, "llama")
    with core_mode(model):
        answer(model, "llama")
    both = _bytes(model.parameters(), core.model.parameters(), model.buffers())
    assert both == plain + (plain - _bytes(base.buffers())) + 4 * sum(p.numel() for p in adapter)
    assert core_summary(model).core.bytes == both - plain
    optimizer = torch.optim.AdamW([p for p in core.model.parameters() if p.requires_grad])
    core.model(**architecture("llama").inputs()).loss.backward()
    optimizer.step()
    state = [t for entry in optimizer.state.values() for t in entry.values() if t.ndim]
    assert _bytes(state) == 2 * 4 * sum(p.numel() for p in adapter)
    assert all(p.grad is None for p in core.model.parameters() if not p.requires_grad)


def _bytes(*tensors: Any) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for group in tensors for t in group}
    return sum(storages.values())


def test_adapters_of_one_model_stand_on_one_base() -> None:
    """But where the model has moved in between."""
    model = with_adapter("llama")
    first = get_core(model).model
    alone = _bytes(first.parameters())
    add_core(model, LoraCoreConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]), name="other")
    other = get_core(model, "other").model
    own = [p for p in other.parameters() if p.requires_grad]
    assert _bytes(first.parameters(), other.parameters()) == alone + _bytes(own)
    assert not {id(p) for p in own} & {id(p) for p in first.parameters()}
    shake(model)
    later = add_core(model, config("llama"), name="later")
    both = {id(p) for network in (first, other) for p in network.parameters()}
    assert not both & {id(p) for p in get_core(later, "later").model.parameters()}


# --- split -------------------------------------------------------------------------------------------------------------


def test_split_is_the_best_rank_r_part_of_the_change(name: str, coupling: str) -> None:
    model = with_adapter(name, coupling=coupling)
    core, base = get_core(model), architecture(name).build()
    shake(model)
    before = answer(model, name)
    renewed = split(model)
    torch.testing.assert_close(answer(model, name), before, rtol=0, atol=0 if coupling == "free" else 1e-5)
    full = core.merge(model)
    for path, layer in core.layers.items():
        change = (full.get_submodule(path).weight - base.get_submodule(path).weight).double()
        left = change - layer.get_delta_weight("default").double()
        tail = torch.linalg.svdvals(change)[layer.r["default"] :].square().sum().sqrt()
        torch.testing.assert_close(left.norm(), tail, rtol=1e-4, atol=1e-6)
        assert (change - layer.get_delta_weight("default") / layer.scaling["default"]).norm() > tail * 1.01, "s is 1"
    expected = {
        p for layer in core.layers.values() for p in (layer.lora_A.default.weight, layer.lora_B.default.weight)
    }
    for path, wrapper in core.saved.items():
        for key, mine in wrapper.modules_to_save.default.named_parameters():
            assert torch.equal(mine, model.get_submodule(path).get_parameter(key))
            expected |= {mine} if coupling == "free" else set()
    assert set(renewed) == expected


def test_split_before_anything_moved_leaves_an_adapter_that_trains(coupling: str) -> None:
    """W - W0 = 0 has no directions; with A = B = 0 neither would ever get a gradient."""
    model = with_adapter(coupling=coupling)
    start = values(get_core(model).model)
    split(model)
    assert difference(values(get_core(model).model), start) is None
    get_core(model).model(**architecture("llama").inputs()).loss.backward()
    assert all(layer.lora_B.default.weight.grad.norm() > 0 for layer in get_core(model).layers.values())


# --- steps ------------------------------------------------------------------------------------------------------------

LR = 0.1


def literal(model: Any, batch: dict[str, torch.Tensor], x: dict[str, torch.Tensor], core_step: bool) -> dict[str, Any]:
    """One update of the template on x = {W0, A, B, R, others}: dx = -R and p = 0 but on A, B in core steps."""
    core, plain = get_core(model), architecture("opt").build(seed=1).double()

    def loss(y: Any) -> torch.Tensor:
        dense = {}
        for name, _ in plain.named_parameters():
            path = name.rpartition(".")[0]
            targeted = path in core.layers and name.endswith("weight")
            dense[name] = (
                y[f"{path}.W0"] + 1.5 * y[f"{path}.B"] @ y[f"{path}.A"] + y[f"{path}.R"] if targeted else y[name]
            )
        return functional_call(plain, dense, (), batch).loss

    dx = {n: -v for n, v in x.items() if n.endswith(".R")} if core_step else None
    if core_step:  # the base under the adapter is W0 in all that is not a target, too
        dx |= {n: v0 - x[n] for n, v0 in values(architecture("opt").build().double()).items() if n in x}
    trained = {n: n.endswith((".A", ".B")) if core_step else not n.endswith(".W0") for n in x}
    p = {n: torch.full_like(v, float(trained[n])) for n, v in x.items()}
    return partial_sgd_step(x, autograd_gradient(loss), LR, dx, p)


def test_alternation_with_shared_weights_is_the_literal_template(tmp_path: Path) -> None:
    model: Any = add_core(architecture("opt").build().double(), LoraCoreConfig(r=4, lora_alpha=6, coupling="shared"))
    core, base = get_core(model), values(architecture("opt").build().double())
    data = [r | {"labels": torch.cat([torch.tensor([-100]), r["input_ids"][1:]])} for r in rows(24)]
    seen: list[Any] = []

    def collate(batch: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        seen.append({k: torch.stack([e[k] for e in batch]) for k in batch[0]})
        return seen[-1]

    plain_sgd = {"optim": "sgd", "learning_rate": LR, "lr_scheduler_type": "constant", "weight_decay": 0.0}
    options = plain_sgd | {"max_grad_norm": 0.0, "distill_weight": 0.0, "core_learning_rate_scale": 1.0}
    args = arguments(tmp_path, schedule="alternate", **options)
    trainer = MaskedTrainer(model, args, train_dataset=data, data_collator=collate)
    watch = Watch(model)
    trainer.add_callback(watch)
    trainer.train()
    for t in range(6):
        x, after = (_template_vector(watch.after[at]["full"], base, core) for at in (t, t + 1))
        expected = literal(model, seen[t], x, core_step=t % 2 == 1)
        assert max(float((after[n] - v).abs().max()) for n, v in expected.items()) < 1e-12, t
        wrong = literal(model, seen[t], x, core_step=t % 2 == 0)
        assert max(float((after[n] - v).abs().max()) for n, v in wrong.items()) > 1e-5, t


def _template_vector(
    full: dict[str, torch.Tensor], base: dict[str, torch.Tensor], core: Any
) -> dict[str, torch.Tensor]:
    """The remainder is kept as W0 + R: apart here."""
    x = dict(full)
    for path in core.layers:
        x[f"{path}.W0"] = base[f"{path}.weight"]
        x[f"{path}.R"] = full[f"{path}.R"] - base[f"{path}.weight"]
    return x
