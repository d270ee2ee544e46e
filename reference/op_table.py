"""One row an op: the table of contents of the repo. Conformance, bench and docs are driven by it.

Legend of sizes: N rows, K columns, G columns a group, M activation rows, B batch, C channels, L length,
J taps, `groups` groups of dither, `float_bytes` bytes of one activation (2: bfloat16, 4: float32).

The work models are floors, for rooflines: `bytes_min` reads each input once and writes each output once,
weights in their canonical bytes; `ops_min` counts the arithmetic of the formula, a multiply-add as two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from arbitor.reference.types import groups_per_row, packed_bytes

Shape = Mapping[str, int]
"""Sizes of one case, by the names in the legend."""

PHILOX_OPS = 100
"""Integer operations of one Philox4x32-10 call: ten rounds of 4 half products, 4 exclusive ors, 2 sums."""

PHILOX_BYTES = 16
"""Dither bytes from one Philox call."""


@dataclass(frozen=True)
class Exact:
    """Outputs equal the reference in bits, dtype and shape."""

    def __str__(self) -> str:
        """Return the class as tables print it."""
        return "EXACT"


@dataclass(frozen=True)
class NoWorse:
    """Floats err at most k times as much as the reference op, plus one rounding; integers equal."""

    k: float

    def __str__(self) -> str:
        """Return the class as tables print it."""
        return f"NO_WORSE({self.k:g})"


EXACT = Exact()
"""The class of every op whose outputs are integers, and of floats that the formula gives exactly."""


@dataclass(frozen=True)
class OpRow:
    """What the suites, the benchmarks and the docs know about an op.

    name:       attribute of `arbitor.reference.ops` and `arbitor.optimized.ops`
    family:     file that holds it, in both folders
    output:     EXACT or NoWorse(k): how its outputs are compared
    shapes:     sizes to time it at, by name
    bytes_min:  least memory traffic of a shape, in bytes
    ops_min:    least arithmetic of a shape, in operations
    capturable: may be recorded in a CUDA graph; while it is, the op asks the host about no value
    """

    name: str
    family: str
    output: Exact | NoWorse
    shapes: Mapping[str, Shape]
    bytes_min: Callable[[Shape], int]
    ops_min: Callable[[Shape], int]
    capturable: bool = True

    @property
    def doc(self) -> str:
        """Return where the prose of the op is."""
        return f"docs/spec/{self.family}.md#{self.name}"


def _sizes(**by_name: Shape) -> Mapping[str, Shape]:
    """Return a read-only mapping of named shapes; a leading underscore lets a name start with a digit."""
    return MappingProxyType(
        {name.removeprefix("_"): MappingProxyType(dict(sizes)) for name, sizes in by_name.items()}
    )


def _elements(s: Shape) -> int:
    return s["N"] * s["K"]


def _groups(s: Shape) -> int:
    return s["N"] * groups_per_row(s["K"], s["G"])


def _packed(s: Shape) -> int:
    return packed_bytes(_elements(s))


def _values(s: Shape) -> int:
    """Return the bytes of what a forward pass reads of a weight: packed trits and exponents."""
    return _packed(s) + _groups(s)


def _state(s: Shape) -> int:
    """Return the canonical bytes of a weight: trits, exponents and both accumulators."""
    return _values(s) + _elements(s) + _groups(s)


def _dither_ops(groups: int, group_size: int) -> int:
    """Return the operations that dither `groups` groups: whole Philox calls for G places and the exponent."""
    return groups * (group_size // PHILOX_BYTES + 1) * PHILOX_OPS


def _positions(s: Shape) -> int:
    """Return the number of positions of a convolution."""
    return (s["L"] + 2 * s["padding"] - s["J"]) // s["stride"] + 1


def _conv_weight(s: Shape) -> Shape:
    return {"N": s["N"], "K": s["C"] * s["J"], "G": s["G"]}


def _conv_activations(s: Shape) -> int:
    """Return the bytes of a convolution's input and output (or of their gradients)."""
    return s["float_bytes"] * s["B"] * (s["C"] * s["L"] + s["N"] * _positions(s))


def _conv_ops(s: Shape) -> int:
    return 2 * s["B"] * _positions(s) * s["N"] * s["C"] * s["J"]


def _linear_activations(s: Shape) -> int:
    """Return the bytes of a linear's input and output (or of their gradients)."""
    return s["float_bytes"] * s["M"] * (s["N"] + s["K"])


def _linear_ops(s: Shape) -> int:
    return 2 * s["M"] * s["N"] * s["K"]


def _vote_ops(s: Shape) -> int:
    """Return the operations of stochastic votes: square, sum, scale, clamp, round, dither, shift, clamp."""
    return 8 * _elements(s) + _dither_ops(_groups(s), s["G"])


def _accumulate_ops(s: Shape) -> int:
    """Return the operations of counting votes: add, saturate, multiply, sum the score; then the exponents."""
    return 4 * _elements(s) + _dither_ops(_groups(s), s["G"]) + 5 * _groups(s)


_MATRIX = _sizes(
    tiny={"N": 256, "K": 256, "G": 12},
    _3072={"N": 3072, "K": 3072, "G": 12},
    _7168={"N": 7168, "K": 7168, "G": 12},
)
_DITHER = _sizes(
    tiny={"groups": 256 * 22, "G": 12},
    _3072={"groups": 3072 * 256, "G": 12},
    _7168={"groups": 7168 * 598, "G": 12},
)
_LINEAR = _sizes(
    tiny={"M": 256, "N": 256, "K": 256, "G": 12, "float_bytes": 2},
    _3072={"M": 4096, "N": 3072, "K": 3072, "G": 12, "float_bytes": 2},
    _7168={"M": 4096, "N": 7168, "K": 7168, "G": 12, "float_bytes": 2},
    _7168_decode={"M": 1, "N": 7168, "K": 7168, "G": 12, "float_bytes": 2},
)
_TAPS = {"J": 3, "stride": 1, "padding": 1, "G": 12, "float_bytes": 2}
_CONV = _sizes(
    tiny={"B": 2, "C": 64, "L": 128, "N": 64, **_TAPS},
    _3072={"B": 4, "C": 1024, "L": 1024, "N": 3072, **_TAPS},
    _7168={"B": 1, "C": 7168, "L": 1024, "N": 7168, **_TAPS, "stride": 2},
)
_ROWS = _sizes(
    tiny={"M": 256, "N": 1, "K": 256, "G": 12, "float_bytes": 2},
    _3072={"M": 4096, "N": 1, "K": 3072, "G": 12, "float_bytes": 2},
    _7168={"M": 4096, "N": 1, "K": 7168, "G": 12, "float_bytes": 2},
)
_TABLE = _sizes(
    tiny={"M": 256, "N": 297, "K": 256, "G": 12, "float_bytes": 2},
    _3072={"M": 4096, "N": 65536, "K": 3072, "G": 12, "float_bytes": 2},
    _7168={"M": 4096, "N": 65536, "K": 7168, "G": 12, "float_bytes": 2},
)
_SCALAR = _sizes(scalar={})

# Output classes: k = 2 leaves room for another order of summation, no more; see docs/numerics.md.
_TWICE = NoWorse(2.0)

# fmt: off
_LIST = (
    # packing
    OpRow(
        "pack_trits", "packing", EXACT, _MATRIX,
        bytes_min=lambda s: _elements(s) + _packed(s),
        ops_min=lambda s: 2 * _elements(s),
    ),
    OpRow(
        "unpack_trits", "packing", EXACT, _MATRIX,
        bytes_min=lambda s: _elements(s) + _packed(s),
        ops_min=lambda s: 3 * _elements(s),
    ),
    # dither
    OpRow(
        "dither_bytes", "dither", EXACT, _DITHER,
        bytes_min=lambda s: s["groups"] * (8 + s["G"] + 1),
        ops_min=lambda s: _dither_ops(s["groups"], s["G"]),
    ),
    # scale. The makers of weights run once, before any graph is recorded.
    OpRow(
        "group_scales", "scale", EXACT, _MATRIX,
        bytes_min=lambda s: 5 * _groups(s),
        ops_min=_groups,
    ),
    OpRow(
        "dequantize", "scale", EXACT, _MATRIX,
        bytes_min=lambda s: _values(s) + 4 * _elements(s),
        ops_min=lambda s: 4 * _elements(s),
    ),
    OpRow(
        "initial_weight", "scale", EXACT, _MATRIX,
        bytes_min=_state,
        ops_min=lambda s: _dither_ops(_groups(s), s["G"]) + 4 * _elements(s),
        capturable=False,
    ),
    OpRow(
        "constant_weight", "scale", EXACT, _MATRIX,
        bytes_min=_state,
        ops_min=lambda s: 0,
        capturable=False,
    ),
    # votes
    OpRow(
        "row_exponents", "votes", EXACT, _MATRIX,
        bytes_min=lambda s: 4 * _elements(s) + 4 * s["N"],
        ops_min=lambda s: 2 * _elements(s),
    ),
    OpRow(
        "stochastic_votes", "votes", EXACT, _MATRIX,
        bytes_min=lambda s: 5 * _elements(s),
        ops_min=_vote_ops,
    ),
    OpRow(
        "sign_votes", "votes", EXACT, _MATRIX,
        bytes_min=lambda s: 5 * _elements(s),
        ops_min=lambda s: 2 * _elements(s),
    ),
    OpRow(  # a number in, a number out: it never touches a device
        "step_from_loss", "votes", EXACT, _SCALAR,
        bytes_min=lambda s: 0,
        ops_min=lambda s: 5,
        capturable=False,
    ),
    # update
    OpRow(
        "accumulate", "update", EXACT, _MATRIX,
        bytes_min=lambda s: _packed(s) + 3 * _elements(s) + 2 * _groups(s),
        ops_min=_accumulate_ops,
    ),
    OpRow(
        "apply_step", "update", EXACT, _MATRIX,
        bytes_min=lambda s: 2 * _state(s),
        ops_min=lambda s: 5 * _elements(s) + 4 * _groups(s),
    ),
    OpRow(
        "accumulate_gradient", "update", EXACT, _MATRIX,
        bytes_min=lambda s: _packed(s) + 6 * _elements(s) + 2 * _groups(s),
        ops_min=lambda s: _vote_ops(s) + _accumulate_ops(s) - _dither_ops(_groups(s), s["G"]),
    ),
    OpRow(
        "count_nonfinite_rows", "update", EXACT, _MATRIX,
        bytes_min=lambda s: 4 * _elements(s) + 8,
        ops_min=_elements,
    ),
    OpRow(
        "count_changed_trits", "update", EXACT, _MATRIX,
        bytes_min=lambda s: 2 * _packed(s) + 8,
        ops_min=lambda s: 2 * _elements(s),
    ),
    # linear
    OpRow(
        "linear", "linear", _TWICE, _LINEAR,
        bytes_min=lambda s: _linear_activations(s) + _values(s),
        ops_min=_linear_ops,
    ),
    OpRow(
        "linear_input_grad", "linear", _TWICE, _LINEAR,
        bytes_min=lambda s: _linear_activations(s) + _values(s),
        ops_min=_linear_ops,
    ),
    OpRow(
        "linear_weight_grad", "linear", _TWICE, _LINEAR,
        bytes_min=lambda s: _linear_activations(s) + 4 * _elements(s),
        ops_min=_linear_ops,
    ),
    # conv
    OpRow(
        "conv1d", "conv", _TWICE, _CONV,
        bytes_min=lambda s: _conv_activations(s) + _values(_conv_weight(s)),
        ops_min=_conv_ops,
    ),
    OpRow(
        "conv1d_input_grad", "conv", _TWICE, _CONV,
        bytes_min=lambda s: _conv_activations(s) + _values(_conv_weight(s)),
        ops_min=_conv_ops,
    ),
    OpRow(
        "conv1d_weight_grad", "conv", _TWICE, _CONV,
        bytes_min=lambda s: _conv_activations(s) + 4 * _elements(_conv_weight(s)),
        ops_min=_conv_ops,
    ),
    # norm
    OpRow(
        "rms_norm", "norm", _TWICE, _ROWS,
        bytes_min=lambda s: 2 * s["float_bytes"] * s["M"] * s["K"] + _values(s),
        ops_min=lambda s: 4 * s["M"] * s["K"],
    ),
    OpRow(
        "rms_norm_input_grad", "norm", _TWICE, _ROWS,
        bytes_min=lambda s: 3 * s["float_bytes"] * s["M"] * s["K"] + _values(s),
        ops_min=lambda s: 9 * s["M"] * s["K"],
    ),
    OpRow(
        "rms_norm_weight_grad", "norm", _TWICE, _ROWS,
        bytes_min=lambda s: 2 * s["float_bytes"] * s["M"] * s["K"] + 4 * s["K"],
        ops_min=lambda s: 5 * s["M"] * s["K"],
    ),
    # embedding: what a batch touches, not the table
    OpRow(
        "embedding", "embedding", EXACT, _TABLE,
        bytes_min=lambda s: s["M"] * (8 + _values({**s, "N": 1}) + s["float_bytes"] * s["K"]),
        ops_min=lambda s: 4 * s["M"] * s["K"],
    ),
    OpRow(
        "embedding_row_grads", "embedding", _TWICE, _TABLE,
        bytes_min=lambda s: s["M"] * (8 + 8 + (s["float_bytes"] + 4) * s["K"]),
        ops_min=lambda s: s["M"] * s["K"],
    ),
    # denoise
    OpRow(
        "denoise_step", "denoise", _TWICE, _ROWS,
        bytes_min=lambda s: 3 * s["float_bytes"] * s["M"] * s["K"],
        ops_min=lambda s: 3 * s["M"] * s["K"],
    ),
    OpRow(
        "denoise_step_backward", "denoise", _TWICE, _ROWS,
        bytes_min=lambda s: 3 * s["float_bytes"] * s["M"] * s["K"],
        ops_min=lambda s: 2 * s["M"] * s["K"],
    ),
    # layout: the canonical side of a conversion; the device side is the business of the op set
    OpRow(
        "from_spec", "layout", EXACT, _MATRIX,
        bytes_min=lambda s: 2 * _state(s),
        ops_min=lambda s: 3 * _elements(s),
    ),
    OpRow(
        "to_spec", "layout", EXACT, _MATRIX,
        bytes_min=lambda s: 2 * _state(s),
        ops_min=lambda s: 3 * _elements(s),
    ),
)
# fmt: on

OP_TABLE: Mapping[str, OpRow] = MappingProxyType({row.name: row for row in _LIST})
"""The rows by name, in the order of the spec."""
