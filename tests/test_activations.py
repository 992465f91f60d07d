"""The activation-aware split: nearest in the outputs on what the layers get, against closed forms and plain SVD."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import architecture
from common import arguments, difference, fit, rows, tiny, values
from test_ranks import falling
from transformers import Trainer

from hf_masked import DepthCoreConfig, LowRankCoreConfig, MaskedTrainer, add_core, export, get_core, split
from hf_masked.cores.activations import best_weighted, input_moments, run_through
from hf_masked.cores.linear import best_rank_r
from hf_masked.cores.modules import linear_at

ACTIVATION = {"rank": 4, "init": "activation"}


def anisotropic(features: int, tokens: int, rank: int | None = None) -> torch.Tensor:
    """Inputs X (features, tokens) whose directions differ in size by orders of magnitude."""
    X = torch.randn(features, tokens, dtype=torch.float64) * torch.logspace(0, -3, features).double()[:, None]
    mixed = torch.linalg.qr(torch.randn(features, features, dtype=torch.float64))[0] @ X
    if rank is None:
        return mixed
    U, S, Vh = torch.linalg.svd(mixed, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def output_error(W: torch.Tensor, factors: tuple[torch.Tensor, torch.Tensor], X: torch.Tensor) -> float:
    A, B = (f.double() for f in factors)
    return float(((W.double() - B @ A) @ X).norm() / (W.double() @ X).norm())


def least_error(W: torch.Tensor, X: torch.Tensor, rank: int) -> float:
    """Eckart and Young on the outputs themselves: no rank-r map has outputs nearer to W X than their best rank-r part."""
    S = torch.linalg.svdvals(W.double() @ X)
    return float(S[rank:].norm() / S.norm())


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)], ids=str)
@pytest.mark.parametrize("deficient", [False, True], ids=["full", "deficient"])
@pytest.mark.parametrize(
    ("dtype", "rounding"), [(torch.float64, 1e-4), (torch.float32, 1e-4), (torch.bfloat16, 2e-2)], ids=str
)
def test_error_is_the_closed_form(
    shape: tuple[int, int], deficient: bool, dtype: torch.dtype, rounding: float
) -> None:
    torch.manual_seed(0)
    W = torch.randn(shape).to(dtype)
    X = anisotropic(shape[1], 9 if deficient else 200, 6 if deficient else None)
    for rank in (1, 3, 5):
        A, B = factors = best_weighted(W, rank, X @ X.T)
        assert A.dtype == B.dtype == dtype and A.shape == (rank, shape[1]) and B.shape == (shape[0], rank)
        least, found, plain = (
            least_error(W, X, rank), output_error(W, factors, X), output_error(W, best_rank_r(W, rank), X)
        )  # fmt: skip
        assert least * (1 - 1e-9) <= found <= least + rounding * (1 if dtype is torch.bfloat16 else least + 1e-3)
        assert found < 0.95 * plain, "plain SVD does as well here, so nothing is shown"


def test_never_worse_than_plain_svd() -> None:
    for seed in range(50):
        torch.manual_seed(seed)
        m, n, tokens = (int(torch.randint(2, 12, ())) for _ in range(3))
        W, X = torch.randn(m, n, dtype=torch.float64), torch.randn(n, tokens, dtype=torch.float64)
        rank = int(torch.randint(1, min(m, n) + 1, ()))
        weighted = output_error(W, best_weighted(W, rank, X @ X.T), X)
        assert weighted <= output_error(W, best_rank_r(W, rank), X) + 1e-12


def test_truncation_of_its_factors_is_the_best_of_that_rank() -> None:
    torch.manual_seed(0)
    W, X = torch.randn(16, 16), anisotropic(16, 100)
    A, B = best_weighted(W, 8, X @ X.T)
    torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0))
    for rank in (1, 2, 5):
        assert output_error(W, (A[:rank], B[:, :rank]), X) == pytest.approx(least_error(W, X, rank), rel=1e-2)


def test_plain_svd_is_the_limit_of_inputs_alike_and_of_none() -> None:
    torch.manual_seed(0)
    W = torch.randn(10, 14)
    A, B = best_rank_r(W, 4)
    for moment in (torch.eye(14) * 7, torch.zeros(14, 14)):
        weighted_A, weighted_B = best_weighted(W, 4, moment)
        torch.testing.assert_close(weighted_B @ weighted_A, B @ A, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"not finite.*calibration"):
        best_weighted(W, 4, torch.full((14, 14), torch.inf))


def batches(name: str = "llama", count: int = 3) -> list[dict[str, Any]]:
    return [{k: v for k, v in architecture(name).inputs(4, seed=s).items() if k != "labels"} for s in range(count)]


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert-mlm", "t5"])
@pytest.mark.parametrize("coupling", ["free", "shared"])
def test_add_core_and_split_are_nearest_in_outputs(name: str, coupling: Any) -> None:
    row = architecture(name)
    calibration = [row.inputs(4, seed=s) for s in range(3)]
    inputs: dict[str, list[torch.Tensor]] = {}
    original = row.build().double()
    core = get_core(add_core(row.build().double(), LowRankCoreConfig(rank=4)))
    for path in core.sites:
        linear_at(original, path).register_forward_pre_hook(
            lambda module, args, path=path: inputs.setdefault(path, []).append(args[0].detach())
        )
    visible = []
    with torch.no_grad():
        for batch in calibration:
            original(**batch)
            visible.append(batch.get("attention_mask"))

    def errors(model: Any) -> dict[str, float]:
        found = {}
        for path, site in core.sites.items():
            W = linear_at(original, path).weight.detach()
            factors = linear_at(get_core(model).model, path)
            pairs = zip(inputs[path], visible, strict=True)
            masked = [x[m.bool()] if name == "bert-mlm" else x.flatten(0, -2) for x, m in pairs]
            X = torch.cat(masked).T
            W = W.T if site.transposed else W
            found[path] = output_error(W, (factors.A.weight.detach(), factors.B.weight.detach()), X)
            found[f"{path} least"] = least_error(W, X, 4)
        return found

    config = LowRankCoreConfig(**ACTIVATION, coupling=coupling)
    model = add_core(row.build().double(), config, calibration=calibration)
    at_start, plain = errors(model), errors(add_core(row.build().double(), LowRankCoreConfig(rank=4)))
    for path in core.sites:
        assert at_start[path] == pytest.approx(at_start[f"{path} least"], rel=1e-3)
        assert at_start[path] <= plain[path] + 1e-9
    assert sum(at_start[p] for p in core.sites) < 0.98 * sum(plain[p] for p in core.sites)
    with torch.no_grad():
        torch.testing.assert_close(model(**calibration[0]).loss, row.build().double()(**calibration[0]).loss)

    later = add_core(row.build().double(), config)  # starts as plain SVD, until it is split
    assert errors(later) == plain
    split(later, calibration=calibration)
    assert errors(later) == pytest.approx(at_start, rel=1e-6)
    assert not get_core(later).moments


def test_ranks_by_the_energy_of_outputs() -> None:
    model = add_core(tiny(), LowRankCoreConfig(rank="energy:0.9", init="activation"), calibration=batches())
    original = tiny()
    with input_moments(original, list(get_core(model).sites)) as moments:
        for batch in batches():
            original(**batch)
    for path, rank in get_core(model).ranks.items():
        W = linear_at(original, path).weight.detach().double()
        values, vectors = torch.linalg.eigh(moments[path])
        squares = torch.linalg.svdvals(W @ (vectors * values.clamp_min(0).sqrt())).square()
        kept = squares.cumsum(0) / squares.sum()
        assert kept[rank - 1] >= 0.9 - 1e-4 and (rank == 1 or kept[rank - 2] < 0.9 + 1e-4)
    assert get_core(model).ranks != get_core(add_core(tiny(), LowRankCoreConfig(rank="energy:0.9"))).ranks


def test_looking_leaves_the_model_as_it_was() -> None:
    model = tiny(dropout=0.5).train()
    model.model.layers[0].eval()
    before, modes = values(model), [m.training for m in model.modules()]
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    moments = run_through(model, input_moments(model, ["model.layers.1.mlp.up_proj"]), batches())
    assert torch.equal(torch.rand(3), expected), "it drew random numbers"
    assert difference(values(model), before) is None and [m.training for m in model.modules()] == modes
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert moments["model.layers.1.mlp.up_proj"].trace() > 0


# --- in training --------------------------------------------------------------------------------------------------------

RIDE = {"schedule": {"name": "ride_along", "core_updates": 2.0, "start": 3}, "core": "low_rank"}


def trained(folder: Path, init: str, model: Any = None, **options: Any) -> Any:
    config = {"rank": 4, "init": init} | ({"calibration_batches": 2} if init == "activation" else {})
    return fit(folder, model or falling(tiny(dropout=0.1)), **RIDE | {"core_config": config} | options)


def test_the_split_looks_at_the_newest_batches_and_the_full_model_does_not_notice(tmp_path: Path) -> None:
    seen: list[dict[str, torch.Tensor]] = []

    class Watched(MaskedTrainer):
        def _show_inputs(self, inputs: Any) -> None:
            newest = list(self._core.replay.batches)[-2:]
            seen.extend(m.inputs for b in newest for m in b.microbatches)
            full = tiny()
            full.load_state_dict(self.model.state_dict())
            super()._show_inputs(inputs)
            expected = run_through(full, input_moments(full, list(get_core(self.model).sites)), seen)
            for path, moment in get_core(self.model).moments.items():
                torch.testing.assert_close(moment, expected[path], rtol=1e-6, atol=1e-8)

    trainer = fit(tmp_path / "a", falling(tiny(dropout=0.1)), Watched,
                  **RIDE | {"core_config": ACTIVATION | {"calibration_batches": 2}})  # fmt: skip
    assert len(seen) == 2
    plain = fit(tmp_path / "plain", falling(tiny(dropout=0.1)), Trainer)
    assert difference(values(trainer.model), values(plain.model)) is None, "the full network noticed"
    by_weights = trained(tmp_path / "svd", "svd")
    assert difference(values(by_weights.core_model), values(trainer.core_model)) is not None, "no input was looked at"


@pytest.mark.parametrize("buffer", [512, pytest.param(0, marks=pytest.mark.slow)])
def test_resumed_before_the_split_is_uninterrupted(buffer: int, tmp_path: Path) -> None:
    saved = {"save_strategy": "steps", "save_steps": 2, "distill_buffer": buffer}
    whole = trained(tmp_path / "a", "activation", **saved)
    resumed = trained(tmp_path / "b", "activation", resume=tmp_path / "a" / "checkpoint-2", **saved)
    assert difference(values(resumed.core_model), values(whole.core_model)) is None


def test_in_bfloat16(tmp_path: Path) -> None:
    model = add_core(falling(tiny()).bfloat16(), LowRankCoreConfig(**ACTIVATION), calibration=batches())
    export(model, tmp_path)
    assert {p.dtype for p in get_core(model).model.parameters()} == {torch.bfloat16}
    assert (
        trained(tmp_path / "run", "activation", falling(tiny()).bfloat16())
        .core_model(**batches()[0])
        .logits.isfinite()
        .all()
    )


def test_refused_where_it_would_do_nothing(tmp_path: Path) -> None:
    for config in (DepthCoreConfig(keep=[0]), LowRankCoreConfig(rank=4)):
        model = tiny()
        with pytest.raises(ValueError, match=r"got calibration= .*init='activation'.*drop calibration"):
            add_core(model, config, calibration=batches())
        with pytest.raises(ValueError, match="drop calibration"):
            split(add_core(model, config), calibration=batches())
    with pytest.raises(ValueError, match=r"got calibration without a batch"):
        add_core(tiny(), LowRankCoreConfig(**ACTIVATION), calibration=[])
    with pytest.raises(ValueError, match=r"got init='activation' and no inputs.*calibration=batches"):
        split(add_core(tiny(), LowRankCoreConfig(**ACTIVATION)))
    never = arguments(tmp_path, core="low_rank", core_config=ACTIVATION, schedule="alternate")
    with pytest.raises(ValueError, match=r"never splits the core.*split_at in --core_config"):
        MaskedTrainer(tiny(), never, train_dataset=rows())
    MaskedTrainer(add_core(tiny(), LowRankCoreConfig(**ACTIVATION), batches()), never, train_dataset=rows())
    with pytest.raises(ValueError, match=r"init='best'.*activation.*--core_config"):
        LowRankCoreConfig(init="best")  # type: ignore[arg-type]
