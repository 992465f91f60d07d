"""The two-stage selection of the largest logits, and what it leaves over, against torch.topk and torch.logsumexp."""

import pytest
import torch

from hf_masked.top_k import top_k, top_k_and_rest


def rows(kind: str, classes: int) -> torch.Tensor:
    drawn = torch.randn(9, classes, generator=torch.Generator().manual_seed(0))
    return {
        "distinct": drawn,
        "ties": (2 * drawn).round(),
        "equal": torch.zeros_like(drawn),
        "rising": drawn.sort(-1).values,
        "one block": torch.where(torch.arange(classes) % 8 == 3, drawn + 100, drawn),
        "masked out": drawn.masked_fill(torch.arange(classes) % 3 > 0, -torch.inf),
        "bfloat16": drawn.bfloat16(),
    }[kind]


@pytest.mark.parametrize("kind", ["distinct", "ties", "equal", "rising", "one block", "masked out", "bfloat16"])
@pytest.mark.parametrize("classes, k", [(400, 1), (400, 5), (401, 5), (2001, 64), (4096, 64), (40, 39)])
def test_selects_what_torch_selects(kind: str, classes: int, k: int) -> None:
    given = rows(kind, classes)
    values, indices = top_k(given, k)
    assert torch.equal(values.sort(-1, descending=True).values, given.topk(k, dim=-1).values)
    assert torch.equal(given.gather(-1, indices), values)
    assert all(len(set(row)) == k for row in indices.tolist()), "an entry was taken twice"


def test_two_stages_need_as_many_blocks_as_entries() -> None:
    """Written out: the largest of the k blocks with the largest maxima are the largest of all; of fewer blocks they are not."""
    given = rows("distinct", 400)
    for blocks in (5, 2):
        by_block = given.unflatten(-1, (20, 20))
        chosen = by_block.amax(-2).topk(blocks, dim=-1).indices
        found = by_block.gather(-1, chosen[:, None, :].expand(-1, 20, -1)).flatten(1).topk(5, dim=-1).values
        assert torch.equal(found, top_k(given, 5)[0].sort(-1, descending=True).values) is (blocks == 5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("entries", [1, 2000, None])
def test_rest_is_the_sum_of_all_others(temperature: float, entries: int | None) -> None:
    logits = 5 * torch.randn(2, 7, 500, generator=torch.Generator().manual_seed(0))
    values, indices, rest = top_k_and_rest(logits, 20, temperature, entries)
    exact = logits.double() / temperature
    torch.testing.assert_close(values, exact.gather(-1, indices).float())
    others = exact.scatter(-1, indices, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(rest, others.float(), rtol=1e-5, atol=1e-5)
    assert (exact.logsumexp(-1) - others).abs().max() > 0.1, "the largest make no difference"


def test_rest_survives_a_sure_answer() -> None:
    """Where the largest take all but e^-40, the difference of two sums in float32 would be nothing."""
    logits = torch.zeros(1, 500)
    logits[0, 7] = 40.0
    _, _, rest = top_k_and_rest(logits, 1, 1.0)
    assert rest.item() == pytest.approx(torch.tensor(499.0).log().item(), rel=1e-5)
    assert logits.logsumexp(-1) == 40.0
