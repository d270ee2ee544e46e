"""The whole denoise loop: by hand on numbers of which every value is known, and halting of each sample on its own.

Legend: B samples, L numbers of a latent, P tokens, D width, T steps; S numbers of a latent and width at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from arbitor.reference.constants import DEFAULT_EPS, groups_per_row
from arbitor.reference.ops.packing import weight_of_trits
from arbitor.reference.ops.scale import dequantize
from arbitor.reference.types import TernaryWeight

from .. import strategies as ss
from ..case import Case, calls, magnitude
from ..compare import exact, same_sums
from ..law import law
from ..mutant import mutants_of
from ..refusal import F16, Refusal, meta, ones, refusals, refused, weight
from ..subject import Subject

mutant = mutants_of("denoise")

pytestmark = pytest.mark.usefixtures("wide_programs")


# --- how calls are drawn ---------------------------------------------------------------------------------------------


LEVELS = (-4, 1)
"""Exponents of the weights: a chain of products must not leave float32."""


MARGIN = 1e-3
"""How far from the threshold the halting of a drawn call stays: at the threshold itself a rounding decides."""


@magnitude("denoise_loop")
def magnitude_of_loop(op: Callable[..., Any], case: Case) -> Tensor:
    """Return the sum of absolute terms of the last sum that makes each number, and what earlier roundings may have left in it.

    Each value is carried with what the sums before it may have cost it, in ulps of the accumulator: terms of one sum
    count by their absolute values, errors of several summands, which are independent, by the root of their squares.
    """
    return walk(case)[1]


def walk(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Return latents, what roundings may have cost them, and the least distance of any halting from the threshold."""
    latent, tokens, *weights = case.args
    w_in, w_query, w_steps, w_out = (dequantize(weight, dtype=torch.float64) for weight in weights)
    latent, tokens = latent.to(torch.float64), tokens.to(torch.float64)
    threshold, alphas = case.kwargs.get("halt_threshold"), case.kwargs["alphas"]
    cost = torch.zeros_like(latent)
    total, total_cost, total_p = (
        torch.zeros_like(latent),
        torch.zeros_like(latent),
        torch.zeros(len(latent), 1),
    )
    halted, distance = torch.zeros(len(latent), 1, dtype=torch.bool), torch.tensor(torch.inf)
    root = w_in.shape[0] ** 0.5
    for step, alpha in enumerate(alphas):
        x, x_cost = latent @ w_in.T, latent.abs() @ w_in.abs().T + carried(cost, w_in)
        rms = (x.square().mean(dim=1, keepdim=True) + DEFAULT_EPS).sqrt()
        n = x / rms
        n_cost = (
            n.abs() + x_cost / rms + n.abs() * (n * x_cost).square().mean(dim=1, keepdim=True).sqrt() / rms
        )
        q = n @ w_query.T + w_steps[step]
        q_cost = n.abs() @ w_query.abs().T + w_steps[step].abs() + carried(n_cost, w_query)
        scores = torch.einsum("bd,bpd->bp", q, tokens) / root
        score_cost = (
            torch.einsum("bd,bpd->bp", q.abs(), tokens.abs())
            + torch.einsum("bd,bpd->bp", q_cost.square(), tokens.square()).sqrt()
        ) / root
        share = scores.softmax(dim=1)
        share_cost = share * (1 + score_cost + (share * score_cost).sum(dim=1, keepdim=True))
        c = torch.einsum("bp,bpd->bd", share, tokens)
        c_cost = torch.einsum("bp,bpd->bd", share, tokens.abs())
        c_cost = c_cost + torch.einsum("bp,bpd->bd", share_cost.square(), tokens.square()).sqrt()
        u, u_cost = n + c, n.abs() + c.abs() + n_cost + c_cost
        m = u * u.sigmoid()
        # The slope of silu is at most 1.1.
        m_cost = m.abs() + 1.1 * u_cost
        pred, pred_cost = m @ w_out.T, m.abs() @ w_out.abs().T + carried(m_cost, w_out)
        kept = (latent.abs() + (1 - alpha) * pred.abs() + cost + (1 - alpha) * pred_cost) / alpha**0.5
        latent, cost = (latent - (1 - alpha) * pred) / alpha**0.5, kept
        if threshold is not None:
            signal, noise = (v.square().mean(dim=1, keepdim=True) for v in (latent, pred))
            p = (signal + DEFAULT_EPS) / (signal + noise + DEFAULT_EPS)
            near = (total_p + p - threshold).abs()
            if step + 1 < len(alphas):
                distance = torch.cat([distance.reshape(-1), near[~halted]]).amin()
            last = (total_p + p >= threshold) | (step + 1 == len(alphas))
            mine = torch.where(halted, 0.0, torch.where(last, 1 - total_p, p))
            total, total_cost = total + mine * latent, total_cost + mine * (latent.abs() + cost)
            # p's own error moves share from one latent to the next
            loose = (latent * cost).square().mean(dim=1, keepdim=True).sqrt() / (signal + noise + DEFAULT_EPS)
            total_cost = total_cost + torch.where(halted, 0.0, 1 + loose) * latent.abs()
            halted, total_p = halted | last, torch.where(halted, total_p, total_p + p)
    return (latent, cost, distance) if threshold is None else (total, total_cost, distance)


def carried(cost: Tensor, weight: Tensor) -> Tensor:
    """Return what independent errors of the inputs of a linear come to in its outputs."""
    return (cost.square() @ weight.square().T).sqrt()


@st.composite
def loop_weights(draw: st.DrawFn, size: int, width: int, rows: int) -> tuple[TernaryWeight, ...]:
    """Draw latent_in, query, step_rows and latent_out from a seed: drawing four weights element by element is dear."""
    rng = ss.generator(draw(ss.GENERATOR_SEEDS))
    group_size, weights = draw(ss.GROUPS, label="G"), []
    for shape in ((width, size), (width, width), (rows, width), (size, width)):
        groups = (shape[0], groups_per_row(shape[1], group_size))
        trits = torch.randint(-1, 2, shape, generator=rng, dtype=torch.int8)
        exponents = torch.randint(LEVELS[0], LEVELS[1] + 1, groups, generator=rng, dtype=torch.int8)
        weights.append(weight_of_trits(trits, exponents, group_size))
    return tuple(weights)


@calls("denoise_loop")
def denoise_loop_calls(draw: st.DrawFn) -> Case:
    """Draw a loop on real numbers, in either form, that does not halt within MARGIN of its threshold."""
    samples = draw(st.sampled_from((1, 2, 5, 0)), label="B")
    size, width = draw(st.sampled_from((1, 5, 12, 33, 70))), draw(st.sampled_from((1, 3, 12, 31, 66)))
    count, steps = draw(st.sampled_from((1, 2, 7, 35))), draw(st.integers(1, 3), label="T")
    dtype = draw(ss.DTYPES)
    latent = draw(ss.activations((samples, size), dtype, exact=False, kinds=("normal", "constant")))
    loud = torch.randint(-3, 4, (samples, 1), generator=ss.generator(draw(ss.GENERATOR_SEEDS)))
    # Every sample has a signal-to-noise ratio of its own, so samples halt at different steps.
    latent = latent * loud.to(dtype).exp2()
    tokens = draw(ss.activations((samples, count, width), dtype, exact=False, kinds=("normal", "constant")))
    weights = draw(loop_weights(size, width, steps + draw(st.integers(0, 1), label="unused rows")))
    alphas = tuple(draw(st.sampled_from((1.0, 0.9, 0.5, 0.1))) for _ in range(steps))
    threshold = draw(st.sampled_from((None, 0.99, 0.5)), label="threshold")
    case = Case((latent, tokens, *weights), {"alphas": alphas, "halt_threshold": threshold})
    assume(walk(case)[2] > MARGIN)
    return case


# --- laws, and the mutants that they reject --------------------------------------------------------------------------


FAR = 200.0
"""Silu of this is this, and of its negative 0: the sigmoid has left float32."""
BIG = 2.0**30
"""Added to this, a number of the size of 1 is lost."""


def diagonal(signs: Tensor, exponent: int) -> TernaryWeight:
    """Return a square weight of signs times 2**exponent on its diagonal."""
    trits = torch.diag(signs).to(torch.int8)
    exponents = torch.full((len(signs), -(-len(signs) // 12)), exponent, dtype=torch.int8)
    return weight_of_trits(trits, exponents)


def rows_of(signs_TS: Tensor, exponent: int) -> TernaryWeight:
    """Return a weight of signs times 2**exponent."""
    exponents = torch.full((len(signs_TS), -(-signs_TS.shape[1] // 12)), exponent, dtype=torch.int8)
    return weight_of_trits(signs_TS.to(torch.int8), exponents)


def signs(rng: torch.Generator, *shape: int) -> Tensor:
    """Return random signs."""
    return (torch.randint(0, 2, shape, generator=rng) * 2 - 1).to(torch.float32)


SIZES = st.sampled_from((4, 16, 64))
"""Sizes with an exact square root: what a score is divided by."""


LOOP_WITHOUT_SILU = mutant(
    "loop_without_silu", "F.silu(n_BD + c_BD)", "(n_BD + c_BD)", compared="denoise_loop"
)


@law(
    size=SIZES,
    dtype=ss.DTYPES,
    count=st.sampled_from((2, 5, 40)),
    by_row=st.booleans(),
    seed=ss.GENERATOR_SEEDS,
    rejects=[
        mutant(
            "loop_without_a_norm",
            "n_BD = unit_rows(linear(latent, latent_in))",
            "n_BD = linear(latent, latent_in)",
            compared="denoise_loop",
        ),
        mutant(
            "loop_asks_without_its_query",
            "attended(linear(n_BD, query) + ",
            "attended(n_BD + ",
            compared="denoise_loop",
        ),
        mutant(
            "loop_forgets_the_step",
            "linear(n_BD, query) + rows_TD[step]",
            "linear(n_BD, query)",
            compared="denoise_loop",
        ),
        mutant(
            "loop_takes_the_mean_token",
            "scores_BP.softmax(dim=-1)",
            "torch.full_like(scores_BP, 1 / scores_BP.shape[1])",
            compared="denoise_loop",
        ),
        mutant(
            "loop_predicts_from_tokens_alone", "F.silu(n_BD + c_BD)", "F.silu(c_BD)", compared="denoise_loop"
        ),
        LOOP_WITHOUT_SILU,
    ],
)
def test_denoise_loop_by_hand(
    ops: Subject, size: int, dtype: torch.dtype, count: int, by_row: bool, seed: int
) -> None:
    """One step of which every number is known: unit rows are signs, the softmax takes one token, silu cuts at 0.

    A query is 2 W_query n, of signs, plus the row of the step, which is 16 times signs or a sixteenth of them and so decides
    or does not. Of the tokens, all alike in size, one lies along what decides and the others point away from it.
    """
    rng = ss.generator(seed)
    latent, row = signs(rng, 3, size) * 2, signs(rng, size)
    w_in, w_query, w_out = (signs(rng, size) for _ in range(3))
    n = w_in * latent.sign()
    along = row.expand(3, size) if by_row else w_query * n
    order = torch.randperm(count, generator=rng)
    tokens_BPD = FAR * along[:, None] * torch.cat([-torch.ones(count - 1), torch.ones(1)])[order][:, None]
    weights = (
        diagonal(w_in, 5),
        diagonal(w_query, 1),
        rows_of(row[None], 4 if by_row else -4),
        diagonal(w_out, -3),
    )
    got = ops.denoise_loop(latent.to(dtype), tokens_BPD.to(dtype), *weights, alphas=(0.25,))
    pred = (n + FAR * along).clamp(min=0) * w_out / 8
    same_sums(got, (2 * latent - 1.5 * pred).to(dtype))


LOOP_STARTS_OVER = mutant(
    "loop_starts_over",
    "latent = denoise_step(latent, pred, alpha=alpha)",
    "latent = denoise_step(latent_BL.to(dtype), pred, alpha=alpha)",
    compared="denoise_loop",
)


@law(
    share=0.5,
    size=SIZES,
    count=st.sampled_from((1, 3)),
    steps=st.integers(1, 3),
    seed=ss.GENERATOR_SEEDS,
    rejects=[LOOP_WITHOUT_SILU, LOOP_STARTS_OVER],
)
def test_denoise_loop_takes_its_steps(ops: Subject, size: int, count: int, steps: int, seed: int) -> None:
    """Tokens so large that the latent does not show in the prediction: a step doubles the latent and takes 3 off it."""
    rng = ss.generator(seed)
    latent = signs(rng, 2, size) * 4
    tokens_BPD = torch.full((2, count, size), BIG)
    # silu of these is 0, and so is the prediction.
    tokens_BPD[1] = -BIG
    weights = (diagonal(signs(rng, size), 3), diagonal(signs(rng, size), 0), rows_of(signs(rng, 3, size), 0))
    w_out = signs(rng, size)
    got = ops.denoise_loop(latent, tokens_BPD, *weights, diagonal(w_out, -29), alphas=(0.25,) * steps)
    for _ in range(steps):
        latent = 2 * latent - torch.stack([3 * w_out, torch.zeros(size)])
    exact(got, latent)


@law(
    share=0.5,
    size=SIZES,
    exponent=st.sampled_from((10, 47, 48, 60, 100)),
    threshold=st.sampled_from((0.5, 0.75, 1.0)),
    seed=ss.GENERATOR_SEEDS,
    rejects=[
        LOOP_STARTS_OVER,
        mutant(
            "halting_of_the_batch",
            "goes_on = 1 - self.left + p < self.threshold",
            "goes_on = (1 - self.left + p < self.threshold).any()",
            compared="denoise_loop",
        ),
        mutant(
            "halting_after_the_threshold",
            "1 - self.left + p < self.threshold",
            "1 - self.left + p <= self.threshold",
        ),
        mutant(
            "halting_gives_its_p",
            "share = torch.where(goes_on, p, self.left)",
            "share = p",
            compared="denoise_loop",
        ),
        mutant(
            "halting_keeps_the_last",
            "latent if halting is None else halting.mean",
            "latent",
            compared="denoise_loop",
        ),
        mutant(
            "halting_by_noise",
            "return (signal + eps) /",
            "return (noise + eps) /",
            compared="denoise_loop",
        ),
        mutant(
            "halting_squares_what_is_huge",
            "tame, _, eps = tamed(torch.cat([latent_BL, pred_BL], dim=-1), DEFAULT_EPS)",
            "tame, eps = torch.cat([latent_BL, pred_BL], dim=-1), DEFAULT_EPS",
        ),
        mutant(
            "halting_squares_what_is_huge_in_a_latent",
            "tame, _, eps = tamed(torch.cat([latent_BL, pred_BL], dim=-1), DEFAULT_EPS)",
            "(latent_BL, _, eps), (pred_BL, _, _) = tamed(latent_BL, DEFAULT_EPS), tamed(pred_BL, DEFAULT_EPS)\n"
            "    tame = torch.cat([latent_BL, pred_BL], dim=-1)",
        ),
    ],
)
def test_denoise_loop_halts_each_sample(
    ops: Subject, size: int, exponent: int, threshold: float, seed: int
) -> None:
    """Three samples that see as much signal as noise, three times as much, and no noise, after a step at alpha = 1/4.

    Their p are 1/2, 3/4 and 1 (but for eps, which is lost): what each adds of its second step, by the threshold. Squares of the
    numbers may leave float32.
    """
    rng = ss.generator(seed)
    w_out = signs(rng, size)
    pred = torch.stack([w_out, w_out, torch.zeros(size)]) * 2.0**exponent
    # Its mean square is 3.
    loud = torch.tensor([1.0, 1.0, 1.0, 3.0]).repeat(size // 4)
    after = torch.stack([pred[0], pred[1] * loud, signs(rng, size) * 4])
    tokens_BPD = torch.tensor([1.0, 1.0, -1.0])[:, None, None].expand(3, 2, size) * 2.0 ** (exponent + 20)
    weights = (diagonal(signs(rng, size), 0), diagonal(signs(rng, size), 0), rows_of(signs(rng, 2, size), 0))
    got = ops.denoise_loop(
        (after + 1.5 * pred) / 2,
        tokens_BPD,
        *weights,
        diagonal(w_out, -20),
        alphas=(0.25, 0.25),
        halt_threshold=threshold,
    )
    p = torch.tensor([[0.5], [0.75], [1.0]])
    share = torch.where(p < threshold, p, 1.0)
    same_sums(got, share * after + (1 - share) * (2 * after - 1.5 * pred))


@law(
    share=0.5,
    size=st.sampled_from((1, 12, 33)),
    width=st.sampled_from((3, 24)),
    seed=ss.GENERATOR_SEEDS,
    data=st.data(),
    rejects=[
        mutant(
            "halting_forgets_the_last_step",
            "self.mean = self.mean + self.left * state",
            "pass",
            compared="denoise_loop",
        ),
    ],
)
def test_denoise_loop_of_one_step_has_one_form(
    ops: Subject, size: int, width: int, seed: int, data: st.DataObject
) -> None:
    """A single step has a share of all of 1, whatever its noise: both forms give the same bits."""
    latent = ss.float_values((3, size), "normal", seed)
    tokens_BPD = ss.float_values((3, 4, width), "normal", seed + 1)
    weights = data.draw(loop_weights(size, width, 2))
    fixed = ops.denoise_loop(latent, tokens_BPD, *weights, alphas=(0.5,))
    exact(ops.denoise_loop(latent, tokens_BPD, *weights, alphas=(0.5,), halt_threshold=0.99), fixed)


@law(
    share=0.5,
    size=st.sampled_from((5, 33)),
    width=st.sampled_from((3, 24)),
    steps=st.integers(1, 3),
    data=st.data(),
    rejects=[
        mutant(
            "loop_rounds_every_step",
            "latent = denoise_step(latent, pred, alpha=alpha)",
            "latent = denoise_step(latent, pred, alpha=alpha).to(latent_BL.dtype).to(dtype)",
        ),
    ],
)
def test_denoise_loop_rounds_once(
    ops: Subject, size: int, width: int, steps: int, data: st.DataObject
) -> None:
    """In bfloat16 it gives what it gives for the same numbers in float32, rounded at the end."""
    seed = data.draw(ss.GENERATOR_SEEDS)
    latent = ss.float_values((2, size), "normal", seed).to(torch.bfloat16)
    tokens_BPD = ss.float_values((2, 4, width), "normal", seed + 1).to(torch.bfloat16)
    weights, at = data.draw(loop_weights(size, width, 3)), {"alphas": (0.5,) * steps}
    wide = ops.denoise_loop(latent.float(), tokens_BPD.float(), *weights, **at)
    exact(ops.denoise_loop(latent, tokens_BPD, *weights, **at), wide.to(torch.bfloat16))


# Only the comparison with the reference rejects these.
mutant(
    "loop_scales_no_scores",
    ".squeeze(-1) / math.sqrt(q_BD.shape[-1])",
    ".squeeze(-1)",
    compared="denoise_loop",
)
mutant("loop_of_one_row", "rows_TD[step]", "rows_TD[0]", compared="denoise_loop")


# --- what is refused -------------------------------------------------------------------------------------------------


# L = 14 numbers of a latent, D = 5, two rows of steps.
_ARGUMENTS: dict[str, Any] = {
    "latent_BL": ones(2, 14),
    "tokens_BPD": ones(2, 3, 5),
    "latent_in": lambda: weight(5, 14),
    "query": lambda: weight(5, 5),
    "step_rows": lambda: weight(2, 5),
    "latent_out": lambda: weight(14, 5),
}


def loop(why: str, error: type[Exception], says: str, **changes: Any) -> Refusal:
    """Return a refusal of the loop with some of its arguments exchanged."""
    options = {name: changes.pop(name) for name in ("alphas", "halt_threshold") if name in changes}
    return refused(
        "denoise_loop", why, error, says, *{**_ARGUMENTS, **changes}.values(), **{"alphas": (0.5,), **options}
    )


# fmt: off
test_refusals_of_denoise_loop = refusals(
    "denoise_loop",
    loop("no steps", ValueError, "alphas", alphas=()),
    loop("one number", TypeError, "alphas", alphas=0.5),
    loop("alpha 0", ValueError, "alphas", alphas=(0.5, 0.0)),
    loop("alpha 1.1", ValueError, "alphas", alphas=(1.1,)),
    loop("a word", TypeError, "alphas", alphas="fast"),
    loop("threshold 0", ValueError, "halt_threshold", halt_threshold=0.0),
    loop("threshold 2", ValueError, "halt_threshold", halt_threshold=2.0),
    loop("threshold True", TypeError, "halt_threshold", halt_threshold=True),
    loop("more steps than rows", ValueError, "step_rows", alphas=(0.5, 0.5, 0.5)),
    loop("rows of another width", ValueError, "step_rows", step_rows=lambda: weight(2, 6)),
    loop("a query that is not square", ValueError, "query", query=lambda: weight(5, 6)),
    loop("an output of another size", ValueError, "latent_out", latent_out=lambda: weight(13, 5)),
    loop("an output of another width", ValueError, "latent_out", latent_out=lambda: weight(14, 6)),
    loop("a latent of 13", ValueError, "latent_BL", latent_BL=ones(2, 13)),
    loop("one latent", ValueError, "latent_BL", latent_BL=ones(14)),
    loop("float16", TypeError, "latent_BL", latent_BL=ones(2, 14, dtype=F16)),
    loop("two dtypes", TypeError, "tokens_BPD", tokens_BPD=ones(2, 3, 5, dtype=torch.bfloat16)),
    loop("tokens of another width", ValueError, "tokens_BPD", tokens_BPD=ones(2, 3, 6)),
    loop("tokens of three samples", ValueError, "tokens_BPD", tokens_BPD=ones(3, 3, 5)),
    loop("no tokens", ValueError, "tokens_BPD", tokens_BPD=ones(2, 0, 5)),
    loop("two dimensions of tokens", ValueError, "tokens_BPD", tokens_BPD=ones(2, 5)),
    loop("another device", ValueError, "tokens_BPD", tokens_BPD=meta(2, 3, 5)),
    rejects=[
        mutant(
            "loop_alphas_unchecked",
            "    checks.denoise_loop(latent_BL, tokens_BPD, weights, alphas, halt_threshold)\n",
            ""
        ),
    ],
)
# fmt: on
