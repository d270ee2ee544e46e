"""One row an op: the table of contents of the repo. Conformance, bench and docs are driven by it.

Legend of sizes: N rows, K columns, G columns a group, M activation rows, B batch, C channels, L length,
J taps, E experts, `groups` groups of dither, `float_bytes` bytes of one activation (2: bfloat16, 4: float32).

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


def _orthogonal_ops(s: Shape) -> int:
    """Return the operations of one step: S, S S and the product with X, each in full."""
    rows, columns = s["N"] // s["E"], s["K"]
    side = min(rows, columns)
    return s["E"] * (4 * rows * columns * side + 2 * side**3)


def _touched(s: Shape) -> int:
    """Return the experts that the slots of a timed call use: the inputs deal them out in turn."""
    return min(s["E"], s["M"])


def _grouped_bytes(s: Shape) -> int:
    """Return the bytes of a grouped linear's slots, and of the matrices of the experts that are used."""
    return 8 * s["M"] + _linear_activations(s) + _touched(s) * _values(s)


def _denoise_weights(s: Shape) -> tuple[tuple[int, int], ...]:
    """Return the shapes of latent_in, query, latent_out and step_rows."""
    return (s["D"], s["L"]), (s["D"], s["D"]), (s["L"], s["D"]), (s["T"], s["D"])


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
_GRADIENTS = _sizes(  # gradients of a stack of E matrices of N / E rows
    tiny={"N": 256, "K": 256, "E": 1, "iterations": 3, "float_bytes": 2},
    small={"N": 1024, "K": 384, "E": 1, "iterations": 3, "float_bytes": 2},
    _3072={"N": 3072, "K": 3072, "E": 1, "iterations": 3, "float_bytes": 2},
    _1408_e64={"N": 64 * 1408, "K": 2048, "E": 64, "iterations": 3, "float_bytes": 2},
    _7168={"N": 7168, "K": 7168, "E": 1, "iterations": 3, "float_bytes": 2},
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
# B samples of L numbers, P tokens of width D, T steps; the others generate on the heads of the presets of those names: all
# steps, or with `halting` as many as a sample asks for, which is what a head does unless it is told otherwise.
_LOOP = {"T": 3, "G": 12, "float_bytes": 4}
_DENOISE_LOOP = _sizes(
    tiny={"B": 2, "L": 64, "P": 16, "D": 32, **_LOOP, "halting": 0},
    r9={"B": 1, "L": 16384, "P": 298, "D": 512, **_LOOP, "halting": 0},
    r9_halting={"B": 1, "L": 16384, "P": 298, "D": 512, **_LOOP, "halting": 1},
    r14={"B": 1, "L": 4096, "P": 1024, "D": 7168, **_LOOP, "halting": 0},
    r14_halting={"B": 1, "L": 4096, "P": 1024, "D": 7168, **_LOOP, "halting": 1},
)
# Slots of experts: N rows for each of E experts. `small` is a batch of the preset of that name; the others decode and train
# on the upper expert matrices of the largest presets, at rank 1,024 where they have 1,192.
_EXPERTS = _sizes(
    tiny={"M": 64, "E": 4, "N": 64, "K": 48, "G": 12, "float_bytes": 2},
    small={"M": 32768, "E": 32, "N": 1024, "K": 24, "G": 12, "float_bytes": 2},
    _21216_m4={"M": 4, "E": 32, "N": 21216, "K": 1024, "G": 12, "float_bytes": 2},
    _21216_m256={"M": 256, "E": 32, "N": 21216, "K": 1024, "G": 12, "float_bytes": 2},
    _21216_m2048={"M": 2048, "E": 32, "N": 21216, "K": 1024, "G": 12, "float_bytes": 2},
)
_LOADS = _sizes(tiny={"M": 64, "E": 4}, small={"M": 32768, "E": 32})

_SLOTS = _sizes(  # B sequences, H heads, S slots of L latent and R rotary columns: 727 is what a window of 512 sees
    tiny={"B": 2, "H": 4, "S": 64, "L": 32, "R": 16, "float_bytes": 2},
    _3072={"B": 16, "H": 24, "S": 727, "L": 512, "R": 64, "float_bytes": 2},
    _7168_decode={"B": 1, "H": 56, "S": 727, "L": 512, "R": 64, "float_bytes": 2},
    _7168={"B": 16, "H": 56, "S": 4096, "L": 512, "R": 64, "float_bytes": 2},
    r14_decode={"B": 1, "H": 128, "S": 727, "L": 512, "R": 64, "float_bytes": 2},
)
_CODES = _sizes(  # M vectors, candidates of 2**sign_bits buckets, `window` codes that may be revived
    tiny={"M": 16, "N": 512, "K": 64, "G": 12, "float_bytes": 2, "sign_bits": 4, "probes": 2, "window": 16},
    _4096_m16384={
        "M": 16384, "N": 4096, "K": 64, "G": 12, "float_bytes": 2, "sign_bits": 6, "probes": 4, "window": 256,
    },
    _34108_m256={
        "M": 256, "N": 34108, "K": 64, "G": 12, "float_bytes": 2, "sign_bits": 8, "probes": 8, "window": 16,
    },
    _10M_m16={
        "M": 16, "N": 10_000_000, "K": 64, "G": 12, "float_bytes": 2, "sign_bits": 14, "probes": 16, "window": 16,
    },
    _10M_m1024={
        "M": 1024, "N": 10_000_000, "K": 64, "G": 12, "float_bytes": 2, "sign_bits": 14, "probes": 16, "window": 16,
    },
)  # fmt: skip
_NEW_CODES = _sizes(tiny=_CODES["tiny"], _34108=_CODES["34108_m256"], _10M=_CODES["10M_m16"])


def _vectors(s: Shape) -> int:
    """Return the bytes of M vectors and of the id of each."""
    return s["M"] * (s["float_bytes"] * s["K"] + 8)


def _candidates(s: Shape) -> int:
    """Return the number of all candidates of M vectors."""
    return s["M"] * s["probes"] * -(-s["N"] // 2 ** s["sign_bits"])


_EDGES = _sizes(  # M rows gather from N nodes of K columns by J slots each
    tiny={"M": 64, "N": 48, "K": 48, "J": 10, "float_bytes": 2},
    _512={"M": 16384, "N": 4096, "K": 512, "J": 10, "float_bytes": 2},
    _512_n58684={"M": 16384, "N": 58684, "K": 512, "J": 10, "float_bytes": 2},
    _7168={"M": 1024, "N": 4096, "K": 7168, "J": 10, "float_bytes": 2},
    _7168_n58684={"M": 1024, "N": 58684, "K": 7168, "J": 10, "float_bytes": 2},
)
_NEIGHBOURS = _sizes(  # M pairs into a table of N rows of J slots
    tiny={"M": 64, "N": 48, "J": 10, "G": 12},
    _4096={"M": 16384, "N": 4096, "J": 10, "G": 12},
    _10M={"M": 16384, "N": 10_000_000, "J": 10, "G": 12},
)
_NGRAMS = _sizes(  # M positions of B sequences, n-grams of `order` codes, N rows
    tiny={"M": 252, "B": 2, "order": 3, "N": 512},
    small={"M": 16256, "B": 64, "order": 8, "N": 16384},
    _10M={"M": 16384, "B": 16, "order": 8, "N": 10_000_000},
)
_STRENGTHS = _sizes(  # M rows named of N, `window` rows that decay
    tiny={"M": 64, "N": 512, "window": 32},
    small={"M": 32512, "N": 16384, "window": 16256},
    _10M={"M": 32768, "N": 10_000_000, "window": 16384},
)


def _edges(s: Shape) -> int:
    """Return the bytes of neighbours, signs and gathered sums, with the nodes that slots can name at most."""
    nodes = min(s["N"], s["M"] * s["J"])
    return s["M"] * s["J"] * (4 + s["float_bytes"]) + s["float_bytes"] * s["K"] * (s["M"] + nodes)


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
    # orthogonal: two products with the smaller side, and one of it with itself, an iteration
    OpRow(
        "orthogonalize", "orthogonal", _TWICE, _GRADIENTS,
        bytes_min=lambda s: 2 * s["float_bytes"] * _elements(s),
        ops_min=lambda s: s["iterations"] * _orthogonal_ops(s),
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
    OpRow(  # latents and tokens in and latents out, and every weight once, however many steps
        "denoise_loop", "denoise", _TWICE, _DENOISE_LOOP,
        bytes_min=lambda s: s["float_bytes"] * s["B"] * (2 * s["L"] + s["P"] * s["D"])
        + sum(_values({**s, "N": n, "K": k}) for n, k in _denoise_weights(s)),
        ops_min=lambda s: s["T"] * s["B"] * (sum(2 * n * k for n, k in _denoise_weights(s)[:3]) + 4 * s["P"] * s["D"]),
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
    # codebook: a search reads the packed table once; candidates and upkeep read the rows they name
    OpRow(
        "initial_codebook", "codebook", EXACT, _NEW_CODES,
        bytes_min=_state,
        ops_min=lambda s: _dither_ops(_groups(s), s["G"]) + 4 * _elements(s),
        capturable=False,
    ),
    OpRow(
        "nearest_codes", "codebook", EXACT, _CODES,
        bytes_min=lambda s: _values(s) + _vectors(s),
        ops_min=lambda s: 2 * s["M"] * s["N"] * s["K"],
    ),
    OpRow(
        "candidate_codes", "codebook", EXACT, _CODES,
        bytes_min=lambda s: s["M"] * s["float_bytes"] * s["sign_bits"] + 8 * _candidates(s),
        ops_min=_candidates,
    ),
    OpRow(
        "nearest_candidates", "codebook", EXACT, _CODES,
        bytes_min=lambda s: _vectors(s) + _candidates(s) * (8 + _values({**s, "N": 1})),
        ops_min=lambda s: 2 * _candidates(s) * s["K"],
    ),
    OpRow(
        "count_codes", "codebook", EXACT, _CODES,
        bytes_min=lambda s: s["M"] * (8 + 4),
        ops_min=lambda s: s["M"],
    ),
    OpRow(
        "revive_codes", "codebook", EXACT, _CODES,
        bytes_min=lambda s: s["window"] * (2 + s["float_bytes"] * s["K"] + _state({**s, "N": 1})),
        ops_min=lambda s: s["window"] * (PHILOX_OPS + 4 * s["K"]),
    ),
    OpRow(
        "age_codes", "codebook", EXACT, _CODES,
        bytes_min=lambda s: 4 * s["window"],
        ops_min=lambda s: 2 * s["window"],
    ),
    # experts: of the weight, what the slots touch
    OpRow(
        "grouped_linear", "experts", _TWICE, _EXPERTS,
        bytes_min=_grouped_bytes,
        ops_min=_linear_ops,
    ),
    OpRow(
        "grouped_linear_input_grad", "experts", _TWICE, _EXPERTS,
        bytes_min=_grouped_bytes,
        ops_min=_linear_ops,
    ),
    OpRow(
        "grouped_linear_weight_grad", "experts", _TWICE, _EXPERTS,
        bytes_min=lambda s: 8 * s["M"] + _linear_activations(s) + 4 * s["E"] * _elements(s),
        ops_min=_linear_ops,
    ),
    OpRow(
        "expert_load", "experts", EXACT, _LOADS,
        bytes_min=lambda s: 8 * (s["M"] + s["E"]),
        ops_min=lambda s: s["M"],
    ),
    # attention
    OpRow(
        "decode_attention", "attention", _TWICE, _SLOTS,
        bytes_min=lambda s: s["B"] * (
            s["float_bytes"] * (s["H"] * (2 * s["L"] + s["R"]) + s["S"] * (s["L"] + s["R"])) + 4 * s["S"]
        ),
        ops_min=lambda s: s["B"] * s["H"] * s["S"] * (2 * (2 * s["L"] + s["R"]) + 5),
    ),
    # edges
    OpRow(
        "edge_sum", "edges", _TWICE, _EDGES,
        bytes_min=_edges,
        ops_min=lambda s: 2 * s["M"] * s["J"] * s["K"],
    ),
    OpRow(
        "edge_sum_input_grad", "edges", _TWICE, _EDGES,
        bytes_min=lambda s: s["M"] * s["J"] * (4 + s["float_bytes"]) + s["float_bytes"] * s["K"] * (s["M"] + s["N"]),
        ops_min=lambda s: 2 * s["M"] * s["J"] * s["K"],
    ),
    OpRow(
        "edge_sum_sign_grad", "edges", _TWICE, _EDGES,
        bytes_min=lambda s: _edges(s) + s["M"] * s["J"] * (4 - s["float_bytes"]),
        ops_min=lambda s: 2 * s["M"] * s["J"] * s["K"],
    ),
    OpRow(
        "update_neighbours", "edges", EXACT, _NEIGHBOURS,
        bytes_min=lambda s: 16 * s["M"] + min(s["M"], s["N"]) * 2 * s["J"] * (4 + 1 + 1),
        ops_min=lambda s: 4 * s["M"] * s["J"],
    ),
    # memory: mixing a word is three shifts, three exclusive ors and two products
    OpRow(
        "ngram_rows", "memory", EXACT, _NGRAMS,
        bytes_min=lambda s: 16 * s["M"],
        ops_min=lambda s: s["M"] * (10 * s["order"] + 1),
    ),
    OpRow(
        "touch_strengths", "memory", EXACT, _STRENGTHS,
        bytes_min=lambda s: 8 * s["M"] + 2 * min(s["M"], s["N"]) + 2 * s["window"],
        ops_min=lambda s: 3 * s["M"] + 3 * s["window"],
    ),
)
# fmt: on

OP_TABLE: Mapping[str, OpRow] = MappingProxyType({row.name: row for row in _LIST})
"""The rows by name, in the order of the spec."""
