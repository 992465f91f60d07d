"""Methods that take the gradient elsewhere than at x, and meprop, which follows a part of it."""

from typing import Any

from ..meprop import MeProp
from ..perturbations import Asam, DropConnect, Extragradient, Gaussian, LayerDrop, Prune, Quantize, Sam, Stale
from ..perturbations.subnets import Subnets
from ..values import Spec
from .base import Method, check_count

# ---- two passes ----


def sam(rho: Spec = 0.05, all_processes: bool = False) -> Method:
    """Sharpness-aware minimization: descends with the gradient of the worst point within rho.

    (dx, p) = (rho g / |g|, 1). Foret et al. 2021 (rho = 0.05 for images; Bahri et al. 2022 use 0.15 for language
    models). Two passes per microbatch; memory: one copy of the parameters. Nothing saved. Known: no gain where a run
    sees its data once and underfits; twice the time of a step. Deviation: dx is made per microbatch and process (their
    m-sharpness), so it depends on --gradient_accumulation_steps; with `all_processes` of the microbatches of all, for
    one more reduction of the gradients, so that 2 processes of 4 examples are 1 of 8. The logged loss is that at
    x + dx. In bfloat16 parameters a small dx is rounded away: keep them in float32 and train with --bf16.
    """
    return Method(Sam(rho, all_processes))


def asam(rho: Spec = 0.5, eta: Spec = 0.01, all_processes: bool = False) -> Method:
    """Adaptive SAM: the radius follows each parameter's magnitude.

    (dx, p) = (rho T^2 g / |T g| with T = |x| + eta, 1). Kwon et al. 2021 (rho = 0.5 to 1, eta = 0.01). Passes, memory,
    `all_processes` and what is known as of sam. Deviation: T is that of every parameter, biases and norms included.
    """
    return Method(Asam(rho, eta, all_processes))


def extragradient(step_size: Spec | None = None, fresh_batch: bool = False, all_processes: bool = False) -> Method:
    """Extragradient: descends with the gradient found one gradient step ahead.

    (dx, p) = (-h g(x), 1). Korpelevich 1976; `step_size` h is the learning rate by default; with `fresh_batch` the
    step ahead sees other examples, as stochastic mirror-prox does (Juditsky et al. 2011). Two passes per microbatch;
    memory: one copy of the parameters. Nothing saved. Known: made for games and saddle points; on a plain minimum it
    contracts less than gradient descent does. Deviation: the step ahead is a plain gradient step under any optimizer,
    so with AdamW's small learning rates dx is small; per microbatch and process, or `all_processes`, as sam.
    """
    return Method(Extragradient(step_size, fresh_batch, all_processes))


# ---- noise and delay ----


def gaussian(sigma: Spec = 0.01, anti_correlated: bool = False) -> Method:
    """Gaussian noise on the parameters at which the gradient is taken.

    (dx, p) = (sigma xi[t], 1), with `anti_correlated` (sigma (xi[t] - xi[t-1]), 1): Orvieto et al. 2022. `sigma` has
    no published value for Transformers; it has to stay below their initial spread (0.02). One pass; memory: one copy
    of the parameters, which is their noise at first, drawn per microbatch. Nothing saved. Known: one sigma for all
    tensors is too much for norms' gains or too little for embeddings. Deviation: the noise does not stay in the
    iterate, as it does in anti-PGD.
    """
    return Method(Gaussian(sigma, anti_correlated))


def stale(tau: int = 1) -> Method:
    """Stale gradients: those of the parameters tau updates ago, as asynchronous workers would send them.

    (dx, p) = (x[t-tau] - x[t], 1). Agarwal and Duchi 2011. One pass; memory: tau copies of the parameters, which
    are saved in checkpoints. Known: diverges unless the learning rate shrinks with tau. A study of delay, no gain.
    """
    return Method(Stale(tau))


# ---- a part of the weights ----


def drop_connect(keep: Spec = 0.9, structure: str = "entries", pattern: str | None = None) -> Method:
    """DropConnect: every update runs with a random part of the weights, scaled up, and trains that part.

    (dx, p) = (m x / keep - x, m). Wan et al. 2013 (keep = 0.5 in a last layer; Transformers bear far less). One pass;
    memory: one copy of the matrices, and p, a byte an entry; one random number an entry and update. Nothing saved.
    Known: noise in embeddings and in the head hurts first; `pattern` (a regular expression) leaves them out.
    Deviations: one draw per update, not per example; without the chain rule's 1 / keep; p is a gradient mask, so under
    AdamW moments and decay move dropped entries too.
    """
    rule = DropConnect(keep, structure, pattern)
    return Method(rule, grad_mask=rule.mask)


def dropout(keep: Spec = 0.9, pattern: str | None = None) -> Method:
    """Dropout of units as a method of partial SGD: whole inputs of every matrix are left out of an update.

    (dx, p) = (m x / keep - x, m) with m of whole columns. Srivastava et al. 2014 (keep = 0.5 hidden, 0.8 input;
    Transformers 0.9). Cost and deviations as of drop_connect; one draw for all tokens of an update is much rougher
    than dropout's own per token, which the model's configuration has.
    """
    return drop_connect(keep, "inputs", pattern)


def layer_drop(keep: Spec = 0.9) -> Method:
    """LayerDrop: every update runs without some random blocks, and does not train them.

    (dx, p) = (-x on the dropped blocks' linear maps, 0 on the blocks). Fan et al. 2020 (keep = 0.8 to 0.9). One pass,
    of the blocks that stay. Nothing saved. With a depth core it trains any choice of blocks to work: "apply_to" "full"
    with coupling shared is the paper's, whose every-other blocks the core then is; "core" drops among the core's own.
    Known: with few layers it costs accuracy. Deviations: one draw per update. Under AdamW dropped blocks keep their
    bits.
    """
    rule = LayerDrop(keep)
    mask: Any = rule.mask
    return Method(backward=rule, grad_mask=mask, update_mask=mask)


def ist(parts: int | None = None, every: int = 10) -> Method:
    """Independent subnet training: neurons and heads are dealt out to workers, each of whom trains its own subnet.

    (dx, p) = (-(1 - m_w) x, m_w), m_w a partition over workers w. Yuan et al. 2019 (`every` is their number of local
    steps). With several processes each is a worker: no gradient travels; every `every` steps each sends its own part,
    with its moments, what belongs to all is averaged, and the units are dealt out anew. A checkpoint or an evaluation
    in between puts together too, which averages earlier. One process: worker (t // every) mod `parts` (2) has its turn
    in step t. One pass; memory: one copy of the partitioned tensors. Nothing saved. Heads are dealt out where the
    config tells their size (head_dim, d_kv), whole groups of grouped queries; elsewhere attention belongs to all.
    Known: no faster here, since what is switched off is multiplied as zeros; costs accuracy per step. Deviations: what
    belongs to all is trained by every worker; one number per step travels, whether a gradient was not finite, so that
    all skip alike.
    """
    if parts is not None:
        check_count("parts", parts, least=2)
    check_count("every", every)
    rule = Subnets(parts, every)
    mask = rule.mask
    return Method(rule, grad_mask=mask, update_mask=mask)


def dpf(
    sparsity: Spec = 0.9,
    scope: str = "global",
    structure: str = "entries",
    pattern: str | None = None,
    every: int = 16,
) -> Method:
    """Dynamic pruning with feedback: the gradient of the pruned network trains the dense one.

    (dx, p) = (-(1 - m(x)) x, 1), m(x) the largest magnitudes, chosen anew `every` steps. Lin et al. 2020 (90 %, rising
    as a cubic; 16 steps). `structure` "rows" or n:m such as "2:4" (Zhou et al. 2021); "entries" otherwise. One pass;
    memory: one copy of the matrices, and the mask, saved in checkpoints. The saved model is dense: prune it the same
    way to get what was trained. Known: sparsity from the first step on hurts; pass a schedule.
    """
    return Method(Prune(sparsity, scope, structure, pattern, every))


def quantize(to: str = "int8", per_channel: bool = True, pattern: str | None = None) -> Method:
    """Quantization-aware training by the straight-through estimator.

    (dx, p) = (Q(x) - x, 1). Courbariaux et al. 2015, Jacob et al. 2018; `to` is "int8", "int4", "ternary" (Li et al.
    2016) or "binary" (Rastegari et al. 2016). One pass; memory: one copy of the matrices. Nothing saved. The saved
    model is the one in full precision: quantize it the same way. Known: below 4 bits embeddings and head should be
    left out (`pattern`).
    Deviation: weights only.
    """
    return Method(Quantize(to, per_channel, pattern))


def binary_connect(pattern: str | None = r"\d+\.") -> Method:
    """BinaryConnect: forward and backward with signs, the update moves real weights.

    (dx, p) = (s sign(x) - x, 1). Courbariaux et al. 2015, with the scale s = mean |x| per row of Rastegari et al.
    2016. Cost as of quantize. `pattern` by default leaves embeddings and head in full precision. Known: far below full
    precision in language models. Deviation: weights are not clipped to [-1, 1].
    """
    return quantize("binary", True, pattern)


# ---- a part of the backward pass ----


def meprop(k: Spec = 0.05, unified: bool = True) -> Method:
    """meProp: the backward pass follows the k largest entries of every linear layer's output gradient.

    (dx, p) = (0, the rows of W that are selected), and what is passed on to lower layers is cut as well. Sun et al.
    2017 (k = 30 to 80 of 500 units); `k` is a count (int) or a share (float). One pass whose backward products have k
    columns: faster where `unified` (one selection per microbatch), slower than dense per token. No memory beyond
    activations. Nothing saved. Known: biased, and its errors compound over depth; their networks have 3 layers.
    Deviation: the head is dense.
    """
    return Method(backward=MeProp(k, unified))
