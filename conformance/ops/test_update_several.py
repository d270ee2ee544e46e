"""Several weights that vote or step together: each holds what it holds that does so by itself."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st

from arbitor.reference.constants import EXPONENT_RULES
from arbitor.reference.types import TernaryWeight

from .. import strategies as ss
from ..case import Case, calls
from ..compare import exact
from ..law import law
from ..mutant import mutants_of
from ..refusal import CLOCK, ones, refusals, refused, weight
from ..subject import Subject
from .test_update_step import ON_FLIP, THETAS

mutant = mutants_of("update")


# --- how calls are drawn ---------------------------------------------------------------------------------------------


@st.composite
def several(draw: st.DrawFn, *, alike: bool) -> tuple[TernaryWeight, ...]:
    """Draw one to four weights, of one shape and format, or of any."""
    number = draw(st.integers(1, 4), label="W")
    first = draw(ss.weights(limit=40))
    if not alike:
        return (first, *(draw(ss.weights(limit=40)) for _ in range(number - 1)))
    made = [first]
    for _ in range(number - 1):
        other = draw(ss.weights(first.shape, mantissa=False))
        # Of the draw only what every format has: trits and counts.
        # The scales and their counts lie in memory of their own, so that weights can be written to.
        mirrored = {name: first.tensors()[name].flip(0) for name in ("exponents", "exponent_accum")}
        made.append(first.with_tensors(packed=other.packed, trit_accum=other.trit_accum, **mirrored))
    return tuple(made)


@calls("accumulate_gradients")
def accumulate_gradients_calls(draw: st.DrawFn) -> Case:
    weights = draw(several(alike=True))
    num_rows, num_columns = weights[0].shape
    clock = draw(ss.clocks())
    first = clock.pop("tensor_id") % 2**31
    kwargs = {"exponent_rule": draw(st.sampled_from(EXPONENT_RULES)), **clock}
    kwargs["tensor_ids"] = tuple(first + 7 * number for number in range(len(weights)))
    if draw(st.booleans(), label="faults"):
        kwargs["faults"] = torch.tensor(draw(st.sampled_from((0, 2**40))))
    ss.with_out_of_all(draw, weights, kwargs)
    grad = draw(ss.gradients((len(weights) * num_rows, num_columns)))
    return Case((weights, grad, draw(ss.rates())), kwargs)


@calls("apply_steps")
def apply_steps_calls(draw: st.DrawFn) -> Case:
    weights = draw(several(alike=draw(st.booleans(), label="alike")))
    kwargs = {"theta": draw(THETAS), "theta_e": draw(THETAS), "on_flip": draw(ON_FLIP)}
    ss.with_out_of_all(draw, weights, kwargs)
    return Case((weights,), kwargs)


EACH_WITH_THE_FIRST_ID = mutant(
    "each_with_the_first_id",
    "parts = zip(weights, grad_NK.chunk(len(weights)), tensor_ids, outs, strict=True)",
    "parts = zip(weights, grad_NK.chunk(len(weights)), tensor_ids[:1] * len(weights), outs, strict=True)",
    compared="accumulate_gradients",
)


@law(
    weights=several(alike=True),
    rate=ss.rates(),
    clock=ss.clocks(),
    rule=st.sampled_from(EXPONENT_RULES),
    data=st.data(),
    rejects=[
        EACH_WITH_THE_FIRST_ID,
        mutant("gradients_of_the_first", "grad_NK.chunk(len(weights))",
               "(grad_NK.chunk(len(weights))[0],) * len(weights)", compared="accumulate_gradients"),
    ],
)  # fmt: skip
def test_gradients_accumulate_as_each_alone(
    ops: Subject,
    weights: tuple[TernaryWeight, ...],
    rate: float,
    clock: dict[str, Any],
    rule: str,
    data: st.DataObject,
) -> None:
    """Weights that vote together hold what each holds that votes by itself, and the faulty rows are counted once each."""
    num_rows, num_columns = weights[0].shape
    grad = data.draw(ss.gradients((len(weights) * num_rows, num_columns)))
    options = {name: value for name, value in clock.items() if name != "tensor_id"} | {"exponent_rule": rule}
    numbers = tuple(range(clock["tensor_id"] % 2**31, clock["tensor_id"] % 2**31 + len(weights)))
    faults = torch.tensor(5)
    got = ops.accumulate_gradients(weights, grad, rate, tensor_ids=numbers, faults=faults, **options)
    for one, alone, part, number in zip(got, weights, grad.chunk(len(weights)), numbers, strict=True):
        exact(one, ops.accumulate_gradient(alone, part, rate, tensor_id=number, **options), f"id {number}")
    exact(faults, 5 + ops.count_nonfinite_rows(grad), "faults")


@law(
    weights=several(alike=False),
    theta=THETAS,
    theta_e=THETAS,
    on_flip=ON_FLIP,
    rejects=[
        mutant("steps_of_all_but_the_last", "for weight, target in zip(weights, outs, strict=True)\n    )\n    return made",
               "for weight, target in zip(weights[:-1], outs[:-1], strict=True)\n    ) + weights[-1:]\n    return made",
               compared="apply_steps"),
    ],
)  # fmt: skip
def test_steps_of_several_weights_are_those_of_each(
    ops: Subject, weights: tuple[TernaryWeight, ...], theta: int, theta_e: int, on_flip: str
) -> None:
    how = {"theta": theta, "theta_e": theta_e, "on_flip": on_flip}
    for one, alone in zip(ops.apply_steps(weights, **how), weights, strict=True):
        exact(one, ops.apply_step(alone, **how))


# --- what is refused -------------------------------------------------------------------------------------------------


IDS = {**{name: value for name, value in CLOCK.items() if name != "tensor_id"}, "tensor_ids": (1, 2)}
"""Coordinates of the dither of two weights."""

ONE, OTHER = weight(), weight()
"""Two weights of one shape. No refused call changes them."""

# fmt: off
test_refusals_of_update_several = refusals(
    "update_several",
    refused("apply_steps", "a list of weights", TypeError, "weights", lambda: [weight()]),
    refused("apply_steps", "no weight", ValueError, "weights", lambda: ()),
    refused("apply_steps", "a number among weights", TypeError, "weights", lambda: (weight(), 3)),
    refused("apply_steps", "two devices", ValueError, "weights", lambda: (weight(), weight().to("meta"))),
    refused("apply_steps", "theta 0", ValueError, "theta", lambda: (weight(),), theta=0),
    refused("apply_steps", "theta_e 128", ValueError, "theta_e", lambda: (weight(),), theta_e=128),
    refused("apply_steps", "an unknown word", ValueError, "on_flip", lambda: (weight(),), on_flip="keep"),
    refused("apply_steps", "one out for two", ValueError,
            "out", lambda: (weight(), weight(4)), out=lambda: (weight(),)),
    refused("apply_steps", "one out twice", ValueError,
            "out", lambda: (weight(), weight()), out=lambda: (weight(),) * 2),
    refused("apply_steps", "outs in another order", ValueError,
            "out", lambda: (weight(), weight(4)), out=lambda: (weight(4), weight())),
    refused("apply_steps", "outs that change places", ValueError,
            "out[0] is weights[1]", (ONE, OTHER), out=(OTHER, ONE)),
    refused("apply_steps", "an out that is read later", ValueError,
            "out[0] is weights[1]", (ONE, OTHER), out=lambda: (OTHER, weight())),
    refused("apply_steps", "nothing among outs", TypeError, "out[0] is a NoneType", lambda: (weight(),), out=(None,)),
    refused("apply_steps", "a number among outs", TypeError,
            "out[0] is a int", lambda: (weight(),), out=(3,)),
    refused("accumulate_gradients", "two shapes", ValueError,
            "weights", lambda: (weight(), weight(4)), ones(7, 14), 1.0, **IDS),
    refused("accumulate_gradients", "one id for two", ValueError,
            "tensor_ids", lambda: (weight(), weight()), ones(6, 14), 1.0, **{**IDS, "tensor_ids": (1,)}),
    refused("accumulate_gradients", "a gradient of one", ValueError,
            "grad_NK", lambda: (weight(), weight()), ones(3, 14), 1.0, **IDS),
    refused("accumulate_gradients", "float64", TypeError,
            "grad_NK", lambda: (weight(), weight()), ones(6, 14, dtype=torch.float64), 1.0, **IDS),
    refused("accumulate_gradients", "rate 200", ValueError,
            "rate", lambda: (weight(), weight()), ones(6, 14), 200.0, **IDS),
    refused("accumulate_gradients", "an unknown rule", ValueError,
            "exponent_rule", lambda: (weight(), weight()), ones(6, 14), 1.0, exponent_rule="ema", **IDS),
    refused("accumulate_gradients", "id -1", ValueError,
            "tensor_ids or tensor_id", lambda: (weight(), weight()), ones(6, 14), 1.0, **{**IDS, "tensor_ids": (1, -1)}),
    refused("accumulate_gradients", "int32 faults", TypeError,
            "faults", lambda: (weight(), weight()), ones(6, 14), 1.0, faults=ones(dtype=torch.int32), **IDS),
    rejects=[
        mutant("weights_unchecked", "checks.several_weights(weights)", "pass"),
        mutant("alike_weights_unchecked", "checks.alike_weights(weights, tensor_ids)", "pass"),
        mutant("outs_unchecked", "checks.out_weights(out, weights)", "pass", times=2),
    ],
)
# fmt: on
