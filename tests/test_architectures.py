"""The same claims about every architecture of the table: logits kept, core step as defined, right parameters moved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architecture_row import Architecture
from architectures import ARCHITECTURES, architecture
from cases import EVERY_CASE, RANK, Case, cast, distance, logits, with_core
from transformers import PreTrainedModel, TrainerCallback

from hf_masked import LowRankCoreConfig, MaskedTrainer, MaskedTrainingArguments, add_core, get_core
from hf_masked.reference import partial_sgd_step

Values = dict[str, torch.Tensor]


@pytest.fixture(scope="module", **EVERY_CASE)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(*request.param)


# --- what add_core leaves alone --------------------------------------------------------------------------------------


def test_full_network_keeps_its_logits(case: Case) -> None:
    expected, found = logits(case.row, case.original), logits(case.row, case.model)
    if case.coupling == "free":
        assert torch.equal(found, expected)
    else:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert distance(logits(case.row, case.core), expected) > 1e-2, "the core is no smaller network"


def test_heads_and_ties_are_left_alone(case: Case) -> None:
    sites = get_core(case.model).sites
    assert sites and not set(case.row.heads) & set(sites)
    for network in (case.model, case.core):
        for head in case.row.heads:
            assert type(network.get_submodule(head)) is type(case.original.get_submodule(head))
        places = [(name, id(p)) for name, p in network.named_parameters(remove_duplicate=False)]
        original = dict(case.original.named_parameters(remove_duplicate=False))
        for name, parameter in places:
            twins = {n for n, p in places if p == parameter and n in original}
            if name in original:
                assert twins == {n for n in original if original[n] is original[name]}


def test_core_starts_as_the_best_part_of_the_full_network(case: Case) -> None:
    """Eckart-Young, with NumPy's SVD: no product of rank r is nearer to W than B A is."""
    core = get_core(case.model)
    for path, site in core.sites.items():
        weight = case.original.get_submodule(path).weight.detach().double().numpy()
        weight = weight.T if site.transposed else weight
        factors = core.model.get_submodule(path)
        product = (factors.B.weight @ factors.A.weight).detach().double().numpy()
        singular = np.linalg.svd(weight, compute_uv=False)
        least = np.sqrt((singular[RANK:] ** 2).sum())
        np.testing.assert_allclose(np.linalg.norm(weight - product), least, rtol=1e-5, err_msg=path)
        assert np.linalg.norm(weight - 1.1 * product) > least * (1 + 1e-4)


# --- the core step ---------------------------------------------------------------------------------------------------


class LiteralCore:
    """The core as the template has it: the original class, all of it dense, evaluated at x + dx.

    The parameters x are the core's own, and for each target `path` its `path.A`, `path.B` and R = W - B A.
    """

    def __init__(self, row: Architecture, model: PreTrainedModel) -> None:
        self.row, self.sites = row, get_core(model).sites
        self.dense = row.build(seed=1).double()  # another seed: no value may come from anywhere but x
        core = get_core(model).model
        self.x: Values = {name: p.detach().clone() for name, p in core.named_parameters()}
        for path, site in self.sites.items():
            factors = self.x[f"{path}.B.weight"] @ self.x[f"{path}.A.weight"]
            full = self.row.build().double().get_submodule(path).weight.detach()
            self.x[f"{path}.R"] = (full.T if site.transposed else full) - factors
        self.losses: list[float] = []

    def gradient(self, y: Mapping[str, torch.Tensor]) -> Values:
        """g(y): W = B A + R into the dense model, backward, and dW taken back to A, B and R by hand."""
        self.dense.zero_grad()
        with torch.no_grad():
            for name, parameter in self.dense.named_parameters():
                path, _, kind = name.rpartition(".")
                if path not in self.sites:
                    parameter.copy_(y[name])
                elif kind == "bias":
                    parameter.copy_(y[f"{path}.B.bias"])
                else:
                    weight = y[f"{path}.B.weight"] @ y[f"{path}.A.weight"] + y[f"{path}.R"]
                    parameter.copy_(weight.T if self.sites[path].transposed else weight)
        loss = self.dense(**cast(self.row.inputs(), torch.float64)).loss
        loss.backward()
        self.losses.append(float(loss.detach()))
        g: Values = {}
        for name, parameter in self.dense.named_parameters():
            path, _, kind = name.rpartition(".")
            dw = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            if path not in self.sites:
                g[name] = dw
            elif kind == "bias":
                g[f"{path}.B.bias"] = dw
            else:
                dw = dw.T if self.sites[path].transposed else dw
                a, b = y[f"{path}.A.weight"], y[f"{path}.B.weight"]
                g |= {f"{path}.A.weight": b.T @ dw, f"{path}.B.weight": dw @ a.T, f"{path}.R": dw}
        return g


def test_core_step_is_the_literal_template(case: Case) -> None:
    """x - lr p (.) g(x + dx), with dx = -R and p = 0 on R, run dense in float64, against one SGD step of the core."""
    model = with_core(case.row, case.coupling, torch.float64)
    core = get_core(model).model
    literal = LiteralCore(case.row, model)
    residuals = [name for name in literal.x if name.endswith(".R")]
    dx = {name: -literal.x[name] for name in residuals}
    p = {name: torch.zeros_like(literal.x[name]) for name in residuals}
    stepped = partial_sgd_step(literal.x, literal.gradient, lr=1.0, dx=dx, p=p)
    left_in = partial_sgd_step(literal.x, literal.gradient, lr=1.0, p=p)  # negative control: dx = 0

    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    loss = core(**cast(case.row.inputs(), torch.float64)).loss
    loss.backward()
    torch.optim.SGD([q for q in core.parameters() if q.grad is not None], lr=1.0).step()

    rounding = 1e-6 if case.row.float32_inside else 1e-12
    assert abs(float(loss.detach()) / literal.losses[0] - 1) < rounding
    assert abs(float(loss.detach()) / literal.losses[1] - 1) > 1e-4
    found = {name: literal.x[name] - parameter.detach() for name, parameter in core.named_parameters()}
    scale = max(float((literal.x[name] - stepped[name]).norm()) for name in found)
    differing = []
    for name, step in found.items():
        expected, control = literal.x[name] - stepped[name], literal.x[name] - left_in[name]
        assert float((step - expected).norm()) <= rounding * (float(expected.norm()) + scale), name
        differing += [name] if distance(step, control) > 1e-2 else []
    assert len(differing) > len(found) / 2, "with R left in the step has to be another one"

    outside = set(before) - {name for name, q in model.named_parameters() if any(q is r for r in core.parameters())}
    moved = {name for name, q in model.named_parameters() if not torch.equal(q, before[name])}
    assert not moved & outside, "a core step moved what is outside of the core"
    assert all(q.grad is None for name, q in model.named_parameters() if name in outside), "a gradient of R was formed"


# --- training --------------------------------------------------------------------------------------------------------


class WhatMoved(TrainerCallback):
    """Names of the parameters whose bits differ after each update step, of the full network and of the core."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.networks = {"full": model, "core": get_core(model).model}
        self.steps: list[dict[str, set[str]]] = []
        self.last = self.snapshot()

    def snapshot(self) -> dict[str, Values]:
        return {
            kind: {name: p.detach().clone() for name, p in network.named_parameters()}
            for kind, network in self.networks.items()
        }

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        now = self.snapshot()
        self.steps.append(
            {kind: {n for n, v in now[kind].items() if not torch.equal(v, self.last[kind][n])} for kind in now}
        )
        self.last = now


def train_and_watch(row: Architecture, model: PreTrainedModel, folder: Path) -> list[tuple[str, dict[str, set[str]]]]:
    """(phase, what moved) of each step of a run with AdamW and weight decay: one core step and two full ones."""
    watch = WhatMoved(model)
    args = MaskedTrainingArguments(
        output_dir=str(folder),
        schedule='{"name": "alternate", "core_steps": 1, "full_steps": 2}',
        distill_weight=0.5 if row.logits == "logits" else 0.0,
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        weight_decay=0.1,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        remove_unused_columns=False,
    )
    trainer = MaskedTrainer(
        model=model,
        args=args,
        train_dataset=[{"index": i} for i in range(8)],
        data_collator=lambda examples: row.inputs(len(examples), seed=1),
        callbacks=[watch],
    )
    trainer.train()
    phases = [entry["phase"] for entry in trainer.state.log_history if "phase" in entry]
    assert sorted(phases) == ["core", "full", "full"]
    return list(zip(phases, watch.steps, strict=True))


def test_only_the_right_parameters_move(case: Case, tmp_path: Path) -> None:
    """What has no gradient in the dense original stays; the rest moves with the network that owns it, or with both."""
    row, model = case.row, with_core(case.row, case.coupling)
    original = row.build().train()
    original(**row.inputs(seed=1)).loss.backward()
    learning = {name for name, p in original.named_parameters() if p.grad is not None and p.grad.any()}
    core = get_core(model).model
    full_learns = {n for n, p in model.named_parameters() if p.requires_grad and in_original(n) in learning}
    core_learns = {n for n, p in core.named_parameters() if p.requires_grad and in_original(n) in learning}
    shared = {id(p) for p in core.parameters()} & {id(p) for p in model.parameters()}
    of_both = {
        kind: {n for n, p in network.named_parameters() if id(p) in shared}
        for kind, network in (("full", model), ("core", core))
    }
    assert bool(shared) is (case.coupling == "shared")
    assert any(name.endswith(".R") for name in full_learns) is (case.coupling == "shared")
    assert any(name.endswith(".A.weight") for name in core_learns)

    for phase, moved in train_and_watch(row, model, tmp_path):
        if phase == "core":
            assert moved == {"core": core_learns, "full": full_learns & of_both["full"]}
        else:
            assert moved == {"full": full_learns, "core": core_learns & of_both["core"]}


@pytest.mark.parametrize("private", ["none", "norms"])
@pytest.mark.parametrize("name", ["gpt2", "bart"])
def test_what_a_free_core_only_reads_moves_in_full_steps_alone(name: str, private: str, tmp_path: Path) -> None:
    row = architecture(name)
    model = add_core(row.build(), LowRankCoreConfig(rank=RANK, coupling="free", private=private))
    core = get_core(model).model
    of_sites = {f"{path}.{part}.weight" for path in get_core(model).sites for part in "AB"}
    norms = {path for path, module in core.named_modules() if isinstance(module, torch.nn.LayerNorm)}
    private_norms = {n for n, _ in core.named_parameters() if n.rpartition(".")[0] in norms and private == "norms"}
    own = of_sites | private_norms
    read = {n for n, _ in core.named_parameters()} - own
    for phase, moved in train_and_watch(row, model, tmp_path):
        if phase == "core":
            assert moved == {"core": own, "full": set()}
        else:
            assert moved == {"core": read, "full": {n for n, p in model.named_parameters() if p.requires_grad}}


def in_original(name: str) -> str:
    """The parameter of the original class that a factor, a remainder or their bias stands for."""
    for suffix in (".A.weight", ".B.weight", ".R", ".A", ".B"):
        if name.endswith(suffix):
            return name.removesuffix(suffix) + ".weight"
    return name.replace(".B.bias", ".bias")


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [row for row in ARCHITECTURES if row.refused], ids=lambda row: row.name)
@pytest.mark.parametrize("coupling", ["free", "shared"])
def test_refused_with_a_reason(row: Architecture, coupling: str) -> None:
    model = row.build()
    expected = logits(row, model)
    with pytest.raises(ValueError, match=rf"(?s){row.refused}.*needs.*because.*set") as error:
        add_core(model, LowRankCoreConfig(rank=RANK, coupling=coupling))
    assert "experts" in str(error.value)
    assert torch.equal(logits(row, model), expected)
    with pytest.raises(ValueError, match="without a core"):
        get_core(model)
