"""Random inputs for every op of the table, on the device that is timed. Never zeros: they hide mistakes and run faster.

Legend: N rows, K columns, G columns a group, M activation rows, B batch, C channels, L length, J taps, P positions.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from arbitor.reference.config import HALT_THRESHOLD
from arbitor.reference.constants import (
    DEFAULT_MANTISSA_BITS,
    DEFAULT_THETA,
    MAX_PACKED_BYTE,
    groups_per_row,
    packed_bytes,
)
from arbitor.reference.types import TernaryWeight

Sizes = Mapping[str, int]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]

CLOCK = {"seed": 20261121, "step": 7, "tensor_id": 3}
"""Dither coordinates of all timed votes."""

RATE = 6.0
"""Rate of all timed votes: that of the flat part of a run."""

FLOATS = {2: torch.bfloat16, 4: torch.float32}
"""Activation dtype by `float_bytes` of a shape."""

_NO_TRITS = 121  # a byte of five zero trits: what may follow the last trit of a weight is fixed


class Maker:
    """Draws tensors on a device from a seed of its own, so that every implementation of a case gets the same ones."""

    def __init__(self, device: torch.device | str, name: str) -> None:
        self.device = torch.device(device)
        self.generator = torch.Generator(device=self.device).manual_seed(zlib.crc32(name.encode()))

    def integers(self, low: int, high: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return integers in low .. high."""
        return torch.randint(low, high + 1, shape, generator=self.generator, dtype=dtype, device=self.device)

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return normal numbers."""
        return torch.randn(shape, generator=self.generator, dtype=dtype, device=self.device)

    def trits(self, shape: tuple[int, ...]) -> Tensor:
        """Return int8 trits, each value as often as the others."""
        return self.integers(-1, 1, shape, torch.int8)

    def packed(self, num_rows: int, num_columns: int) -> Tensor:
        """Return packed trits of a weight."""
        packed = self.integers(0, MAX_PACKED_BYTE, (packed_bytes(num_rows * num_columns),), torch.uint8)
        packed[-1] = _NO_TRITS
        return packed

    def weight(self, num_rows: int, num_columns: int, group_size: int) -> TernaryWeight:
        """Return a weight in the midst of training: varied scales with the mantissa of a model's, accumulators partly filled."""
        groups = (num_rows, groups_per_row(num_columns, group_size))
        steps = 2**DEFAULT_MANTISSA_BITS
        return TernaryWeight(
            packed=self.packed(num_rows, num_columns),
            exponents=self.integers(-8 * steps, -4 * steps, groups, torch.int8),
            trit_accum=self.integers(-DEFAULT_THETA, DEFAULT_THETA, (num_rows, num_columns), torch.int8),
            exponent_accum=self.integers(-127, 127, groups, torch.int8),
            shape=(num_rows, num_columns),
            group_size=group_size,
            mantissa_bits=DEFAULT_MANTISSA_BITS,
        )


def _weight(make: Maker, s: Sizes) -> TernaryWeight:
    return make.weight(s["N"], s["K"], s["G"])


def _gradient(make: Maker, s: Sizes) -> Tensor:
    return make.normal((s["N"], s["K"]), torch.float32)


def _activations(make: Maker, s: Sizes, width: str) -> Tensor:
    return make.normal((s["M"], s[width]), FLOATS[s["float_bytes"]])


def _initial(make: Maker, s: Sizes) -> Arguments:
    at = {"seed": CLOCK["seed"], "tensor_id": CLOCK["tensor_id"]}
    return ((s["N"], s["K"]),), {"std": s["K"] ** -0.5, **at, "group_size": s["G"], "device": make.device}


def _constant(make: Maker, s: Sizes) -> Arguments:
    return ((s["N"], s["K"]),), {"trit": 1, "exponent": 0, "group_size": s["G"], "device": make.device}


def _in_place(weight: TernaryWeight, *rest: Any, **clock: Any) -> Arguments:
    return (weight, *rest), {**clock, "out": weight}


def positions(s: Sizes) -> int:
    """Return P of a convolution."""
    return (s["L"] + 2 * s["padding"] - s["J"]) // s["stride"] + 1


def _geometry(s: Sizes) -> dict[str, int]:
    return {"kernel_size": s["J"], "stride": s["stride"], "padding": s["padding"]}


def _conv_x(make: Maker, s: Sizes) -> Tensor:
    return make.normal((s["B"], s["C"], s["L"]), FLOATS[s["float_bytes"]])


def _conv_grad(make: Maker, s: Sizes) -> Tensor:
    return make.normal((s["B"], s["N"], positions(s)), FLOATS[s["float_bytes"]])


def _conv_weight(make: Maker, s: Sizes) -> TernaryWeight:
    return make.weight(s["N"], s["C"] * s["J"], s["G"])


def _ids(make: Maker, s: Sizes) -> Tensor:
    return make.integers(0, s["N"] - 1, (s["M"],), torch.int64)


def _codebook(make: Maker, s: Sizes) -> Arguments:
    at = {"seed": CLOCK["seed"], "tensor_id": CLOCK["tensor_id"]}
    sizes = {"sign_bits": s["sign_bits"], "group_size": s["G"]}
    return ((s["N"], s["K"]),), {**sizes, **at, "device": make.device}


def _codes(make: Maker, s: Sizes) -> TernaryWeight:
    """Return codes in the midst of training, with the exponents that they have there."""
    weight = _weight(make, s)
    exponents = make.integers(-2, 1, tuple(weight.exponents.shape), torch.int8)
    return replace(weight, exponents=exponents, mantissa_bits=0)


def _candidates(make: Maker, s: Sizes) -> Tensor:
    width = s["probes"] * -(-s["N"] // 2 ** s["sign_bits"])
    return make.integers(-1, s["N"] - 1, (s["M"], width), torch.int64)


def _usage(make: Maker, s: Sizes, most: int) -> Tensor:
    return make.integers(0, most, (s["N"],), torch.int16)


def _count(make: Maker, s: Sizes) -> Arguments:
    usage = _usage(make, s, 100)
    return (usage, _ids(make, s)), {"out": usage}


def _revive(make: Maker, s: Sizes) -> Arguments:
    codes = _codes(make, s)
    at = {"first": s["N"] // 2, "window": s["window"], **CLOCK, "sign_bits": s["sign_bits"], "out": codes}
    return (codes, _usage(make, s, 0), _activations(make, s, "K")), at


def _age(make: Maker, s: Sizes) -> Arguments:
    usage = _usage(make, s, 100)
    return (usage,), {"first": s["N"] // 2, "window": s["window"], "out": usage}


def _stacked(make: Maker, s: Sizes) -> TernaryWeight:
    return make.weight(s["E"] * s["N"], s["K"], s["G"])


def _dealt(make: Maker, s: Sizes) -> Tensor:
    """Return experts dealt out in turn, shuffled: as many as can be are used, equally often."""
    order = torch.randperm(s["M"], generator=make.generator, device=make.device)
    return torch.arange(s["M"], device=make.device)[order] % s["E"]


def _grouped(make: Maker, s: Sizes, width: str) -> Arguments:
    return (_activations(make, s, width), _stacked(make, s), _dealt(make, s)), {"num_groups": s["E"]}


def _ngrams(make: Maker, s: Sizes) -> Arguments:
    shape = (s["B"], s["M"] // s["B"])
    codes, before = (
        make.integers(0, 34_107, (s["B"], width), torch.int64) for width in (shape[1], s["order"] - 1)
    )
    return (codes,), {"order": s["order"], "num_rows": s["N"], "salt": 3, "previous": before}


def _touch(make: Maker, s: Sizes) -> Arguments:
    strengths = make.integers(0, 127, (s["N"],), torch.int8)
    at = {"gain": 8, "first": s["N"] // 2, "window": s["window"], "shift": 2, "out": strengths}
    return (strengths, make.integers(-1, s["N"] - 1, (s["M"],), torch.int64)), at


def _decode_attention(make: Maker, s: Sizes) -> Arguments:
    dtype, columns = FLOATS[s["float_bytes"]], s["L"] + s["R"]
    bias = make.integers(0, 1, (s["B"], s["S"]), torch.int64).to(torch.float32) * math.log(64)
    q, keys = (make.normal((s["B"], s[rows], columns), dtype) for rows in ("H", "S"))
    return (q, keys, bias), {"value_width": s["L"], "scale": columns**-0.5}


def _denoise_loop(make: Maker, s: Sizes) -> Arguments:
    floats = FLOATS[s["float_bytes"]]
    shapes = ((s["D"], s["L"]), (s["D"], s["D"]), (s["T"], s["D"]), (s["L"], s["D"]))
    weights = (make.weight(*shape, s["G"]) for shape in shapes)
    latent, tokens = make.normal((s["B"], s["L"]), floats), make.normal((s["B"], s["P"], s["D"]), floats)
    at = {
        "alphas": (0.153, 0.497, 0.819)[: s["T"]],
        "halt_threshold": HALT_THRESHOLD if s["halting"] else None,
    }
    return (latent, tokens, *weights), at


def _edge_slots(make: Maker, s: Sizes) -> Tensor:
    """Return the neighbours of M rows, one in ten of them an empty slot."""
    named = make.integers(0, s["N"] - 1, (s["M"], s["J"]), torch.int32)
    return torch.where(make.integers(0, 9, (s["M"], s["J"]), torch.int32) == 0, -1, named)


def _signs(make: Maker, s: Sizes) -> Tensor:
    return make.trits((s["M"], s["J"])).to(FLOATS[s["float_bytes"]])


def _nodes(make: Maker, s: Sizes) -> Tensor:
    return make.normal((s["N"], s["K"]), FLOATS[s["float_bytes"]])


def _neighbours(make: Maker, s: Sizes) -> Arguments:
    """Return tables in the midst of training and pairs of which some are frequent, to be counted in place."""
    shape = (s["N"], s["J"])
    neighbours = make.integers(0, s["N"] - 1, shape, torch.int32)
    scores = make.integers(0, 20, shape, torch.int8)
    tables = (neighbours, scores, make.weight(*shape, s["G"]))
    skewed = lambda: (  # noqa: E731
        make.normal((s["M"],), torch.float32).abs().pow(3).mul(s["N"] / 64).long().clamp(max=s["N"] - 1)
    )
    return (*tables, skewed(), skewed()), {"out": tables}


INPUTS: dict[str, Callable[[Maker, Sizes], Arguments]] = {
    "pack_trits": lambda m, s: ((m.trits((s["N"], s["K"])),), {}),
    "unpack_trits": lambda m, s: ((m.packed(s["N"], s["K"]), (s["N"], s["K"])), {}),
    "dither_bytes": lambda m, s: (
        (m.integers(0, 2**32 - 1, (s["groups"],), torch.int64),),
        {"group_size": s["G"], **CLOCK},
    ),
    "group_scales": lambda m, s: ((_weight(m, s).exponents,), {}),
    "dequantize": lambda m, s: ((_weight(m, s),), {}),
    "initial_weight": _initial,
    "constant_weight": _constant,
    "row_exponents": lambda m, s: ((_gradient(m, s),), {}),
    "stochastic_votes": lambda m, s: ((_gradient(m, s), RATE), {"group_size": s["G"], **CLOCK}),
    "sign_votes": lambda m, s: ((_gradient(m, s), 3), {}),
    "step_from_loss": lambda m, s: ((2.5, 5.693732138802635, 8), {}),
    "accumulate": lambda m, s: _in_place(
        _weight(m, s), m.integers(-4, 4, (s["N"], s["K"]), torch.int8), **CLOCK
    ),
    "apply_step": lambda m, s: _in_place(_weight(m, s)),
    "accumulate_gradient": lambda m, s: _in_place(_weight(m, s), _gradient(m, s), RATE, **CLOCK),
    "count_nonfinite_rows": lambda m, s: ((_gradient(m, s),), {}),
    "count_changed_trits": lambda m, s: ((_weight(m, s), _weight(m, s)), {}),
    "orthogonalize": lambda m, s: (
        (m.normal((s["N"], s["K"]), FLOATS[s["float_bytes"]]),),
        {"iterations": s["iterations"], "num_groups": s["E"]},
    ),
    "linear": lambda m, s: ((_activations(m, s, "K"), _weight(m, s)), {}),
    "linear_input_grad": lambda m, s: ((_activations(m, s, "N"), _weight(m, s)), {}),
    "linear_weight_grad": lambda m, s: ((_activations(m, s, "N"), _activations(m, s, "K")), {}),
    "conv1d": lambda m, s: ((_conv_x(m, s), _conv_weight(m, s)), _geometry(s)),
    "conv1d_input_grad": lambda m, s: (
        (_conv_grad(m, s), _conv_weight(m, s)),
        {"length": s["L"], **_geometry(s)},
    ),
    "conv1d_weight_grad": lambda m, s: ((_conv_grad(m, s), _conv_x(m, s)), _geometry(s)),
    "rms_norm": lambda m, s: ((_activations(m, s, "K"), _weight(m, s)), {}),
    "rms_norm_input_grad": lambda m, s: (
        (_activations(m, s, "K"), _activations(m, s, "K"), _weight(m, s)),
        {},
    ),
    "rms_norm_weight_grad": lambda m, s: ((_activations(m, s, "K"), _activations(m, s, "K")), {}),
    "embedding": lambda m, s: ((_ids(m, s), _weight(m, s)), {"dtype": FLOATS[s["float_bytes"]]}),
    "embedding_row_grads": lambda m, s: ((_ids(m, s), _activations(m, s, "K")), {}),
    "denoise_step": lambda m, s: ((_activations(m, s, "K"), _activations(m, s, "K")), {"alpha": 0.7}),
    "denoise_step_backward": lambda m, s: ((_activations(m, s, "K"),), {"alpha": 0.7}),
    "denoise_loop": _denoise_loop,
    "initial_codebook": _codebook,
    "nearest_codes": lambda m, s: ((_activations(m, s, "K"), _codes(m, s)), {}),
    "candidate_codes": lambda m, s: (
        (_activations(m, s, "K"),),
        {"num_codes": s["N"], "sign_bits": s["sign_bits"], "num_probes": s["probes"]},
    ),
    "nearest_candidates": lambda m, s: ((_activations(m, s, "K"), _codes(m, s), _candidates(m, s)), {}),
    "count_codes": _count,
    "revive_codes": _revive,
    "age_codes": _age,
    "choose_experts": lambda m, s: ((_activations(m, s, "K"), _weight(m, s)), {"top_k": s["top_k"]}),
    "grouped_linear": lambda m, s: _grouped(m, s, "K"),
    "grouped_linear_input_grad": lambda m, s: _grouped(m, s, "N"),
    "grouped_linear_weight_grad": lambda m, s: (
        (_activations(m, s, "N"), _activations(m, s, "K"), _dealt(m, s)),
        {"num_groups": s["E"]},
    ),
    "expert_load": lambda m, s: ((_dealt(m, s),), {"num_groups": s["E"]}),
    "ngram_rows": _ngrams,
    "touch_strengths": _touch,
    "decode_attention": _decode_attention,
    "edge_sum": lambda m, s: ((_nodes(m, s), _edge_slots(m, s), _signs(m, s)), {}),
    "edge_sum_input_grad": lambda m, s: (
        (_activations(m, s, "K"), _edge_slots(m, s), _signs(m, s)),
        {"num_nodes": s["N"]},
    ),
    "edge_sum_sign_grad": lambda m, s: ((_activations(m, s, "K"), _nodes(m, s), _edge_slots(m, s)), {}),
    "update_neighbours": _neighbours,
    "from_spec": lambda m, s: ((_weight(m, s),), {}),
    "to_spec": lambda m, s: ((_weight(m, s),), {}),
}
"""Arguments of an op for a shape, in canonical form, by op. An op of the table without an entry fails a test."""
