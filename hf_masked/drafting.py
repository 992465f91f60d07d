"""Self-speculative decoding: the core writes tokens ahead, the full network checks them all in one pass.

full.generate(..., assistant_model=draft_view(full))
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .cores import get_core
from .cores.base import Rung
from .cores.modules import unwrap


def draft_view(model: PreTrainedModel, name: str | None = None, rung: Rung | None = None) -> PreTrainedModel:
    """The core as an assistant of its full network, for the `assistant_model` of `generate`.

    Greedy decoding with it gives the full network's own tokens: transformers keeps a drafted one only where the full
    network says the same (but for ties that rounding decides, since several tokens are checked in one pass).

    Args:
        model: a model with a core; both are then in its training mode, so call `model.eval()` first.
        name: which of several cores.
        rung: draft with a smaller core of a ladder of widths or depths, one of its `nested`.

    Returns: the core network on the same tensors, with a generation config of its own, for transformers adapts that of
        an assistant (how many tokens to draft, how sure it has to be) as it goes; set it there.

    Raises: ValueError without a core or such a rung, and for a model that does not generate.

    Cost: no memory for weights; a cache of keys and values for the core while it generates.

    Source: Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", ICML 2023.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> from hf_masked import DepthCoreConfig, add_core
    >>> model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=32)).eval()
    >>> draft = draft_view(add_core(model, DepthCoreConfig()))
    >>> len(draft.transformer.h), draft.transformer is get_core(model).model.transformer
    (1, True)
    """
    full: Any = unwrap(model)
    core = get_core(full, name)
    if not full.can_generate():
        raise ValueError(
            f"got a {type(full).__name__}; needs a model that generates, because its core drafts tokens; load it with "
            "the class of its task, such as AutoModelForCausalLM"
        )
    core.sync(full)
    core.model.train(full.training)
    if rung is not None and len(core.networks) == 1:
        raise ValueError(
            f"got rung={rung!r} of a core of the kind {core.config.kind!r}; needs none, because its smaller cores run "
            "in the modules of the whole one, which cannot be two drafts at once; use extract_core(model, rung=...)"
        )
    with core.at_rung(rung):
        view: PreTrainedModel = copy.copy(core.model)
    view.generation_config = copy.deepcopy(full.generation_config)
    return view


@dataclass(frozen=True)
class Acceptance:
    """What became of a draft.

    Args:
        new_tokens: tokens that were generated.
        drafted: tokens that the assistant wrote, one per pass of it.
        checks: passes of the full network; each adds one token of its own.
    """

    new_tokens: int
    drafted: int
    checks: int

    @property
    def rate(self) -> float:
        """Accepted tokens over drafted ones, in [0, 1]."""
        return max(0, self.new_tokens - self.checks) / max(1, self.drafted)

    @property
    def tokens_per_check(self) -> float:
        """Tokens per pass of the full network; 1 without a draft."""
        return self.new_tokens / max(1, self.checks)


def measure_acceptance(
    model: PreTrainedModel, assistant: PreTrainedModel | None = None, **generate: Any
) -> tuple[torch.Tensor, Acceptance]:
    """Generate greedily with a draft, and count.

    Args:
        model: the full network.
        assistant: the draft, default `draft_view(model)`; another model with the same vocabulary to compare with.
        generate: what `model.generate` takes, one sequence: input_ids, max_new_tokens, ...

    Returns: the token ids as `generate` gives them, and the counts.

    Raises: ValueError as `draft_view`, and `generate`'s for more than one sequence.

    Cost: one `generate`.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from hf_masked import DepthCoreConfig, add_core
    >>> sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    >>> model = add_core(LlamaForCausalLM(LlamaConfig(**sizes)).eval(), DepthCoreConfig(keep=[0]))
    >>> ids = torch.tensor([[1, 2]])
    >>> ids, acceptance = measure_acceptance(model, input_ids=ids, max_new_tokens=8, min_new_tokens=8)
    >>> ids.shape[1], acceptance.new_tokens, 0 <= acceptance.rate <= 1
    (10, 8, True)
    """
    full: Any = unwrap(model)
    drafts: Any = draft_view(model) if assistant is None else assistant
    with _counted(full) as checks, _counted(drafts) as drafted:
        ids: torch.Tensor = full.generate(**generate | {"do_sample": False}, assistant_model=drafts)
    prompt = 1 if full.config.is_encoder_decoder else generate["input_ids"].shape[1]
    return ids, Acceptance(ids.shape[1] - prompt, len(drafted), len(checks))


@contextmanager
def _counted(network: nn.Module) -> Iterator[list[None]]:
    """Forward passes made inside, one entry each."""
    passes: list[None] = []
    hook = network.register_forward_pre_hook(lambda *_: passes.append(None))
    try:
        yield passes
    finally:
        hook.remove()
