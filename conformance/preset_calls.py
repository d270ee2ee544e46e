"""Calls in the sizes of presets, for specialisations that small drawn calls miss: the largest tiles, multiples of 16.

Values do not matter, as nothing runs. Nor do sizes beyond the largest tile, except for being multiples of 16: where a preset's
would fill much memory, they are cut.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from arbitor.reference.constants import DEFAULT_MANTISSA_BITS
from arbitor.reference.ops import constant_weight
from arbitor.reference.types import TernaryWeight
from conformance.case import Case
from conformance.refusal import CLOCK, F32

WIDTH = 3072
BF16 = torch.bfloat16


def calls() -> Iterator[tuple[str, Case]]:
    """Yield op and call."""
    for family in (of_activations, of_attention, of_codebooks, of_experts, of_rows, of_loops, of_updates):
        yield from family()


def weight(num_rows: int, num_columns: int) -> TernaryWeight:
    return codes(num_rows, num_columns).with_mantissa(DEFAULT_MANTISSA_BITS)


def codes(num_rows: int, num_columns: int) -> TernaryWeight:
    return constant_weight((num_rows, num_columns), trit=1, exponent=0)


def dealt(num_slots: int, num_groups: int) -> Tensor:
    return torch.arange(num_slots) % num_groups


def of_activations() -> Iterator[tuple[str, Case]]:
    # The hidden vectors of small and of r12, with the terms of two experts, and those of a head, which have no terms.
    for width in (1024, 21_216):
        hidden = torch.zeros(4, width, dtype=BF16)
        for terms in ((torch.zeros(4, 2, width, dtype=BF16),), ()):
            yield "gated", Case((hidden, hidden, *terms))
            yield "gated_grads", Case((hidden, hidden, hidden, *terms))
    # The heads of small, r12 and r14.
    for heads, columns, rotary in ((8, 64, 32), (8, 128, 64), (128, 128, 64)):
        q, angles = torch.zeros(4, heads, columns, dtype=BF16), torch.zeros(4, 1, rotary // 2)
        yield "rotate", Case((q, angles, angles))
        yield "rotate", Case((q[:, :1, :rotary], angles, angles))
        yield "head_keys", Case((q[:, 0, :rotary], q[..., rotary:]))
        yield "head_keys_grads", Case((q,), {"num_shared": rotary})


def of_attention() -> Iterator[tuple[str, Case]]:
    # The sizes of r14, r9 and r12, one without rotary columns, and the one that holds most, which is in float32.
    sizes = (
        (128, 512, 64, BF16),
        (8, 128, 32, BF16),
        (8, 64, 64, BF16),
        (24, 512, 0, BF16),
        (128, 512, 64, F32),
    )
    for heads, latent, rotary, dtype in sizes:
        q, keys = (torch.zeros(2, rows, latent + rotary, dtype=dtype) for rows in (heads, 727))
        yield "decode_attention", Case((q, keys, torch.zeros(2, 727)), {"value_width": latent, "scale": 0.1})


def of_codebooks() -> Iterator[tuple[str, Case]]:
    for queries, code_dim in ((16, 64), (1024, 64), (1024, 128)):
        yield "nearest_codes", Case((torch.zeros(queries, code_dim, dtype=BF16), codes(4096, code_dim)))
    z, table = torch.zeros(16, 64, dtype=BF16), codes(4096, 64)
    yield "nearest_candidates", Case((z, table, dealt(16 * 4096, 4096).reshape(16, 4096)))
    yield "candidate_codes", Case((z,), {"num_codes": 10_000_000, "sign_bits": 14, "num_probes": 16})
    usage, ids = torch.zeros(4096, dtype=torch.int16), dealt(16, 4096)
    yield "revival_vectors", Case((z, table, ids, usage), {"first": 0, "window": 16})
    yield "revive_codes", Case((table, z, dealt(16, 16)), {"first": 0})


def of_experts() -> Iterator[tuple[str, Case]]:
    groups = {"num_groups": 32}
    # The rows of generation, and of a step, in r14.
    for rows in (1, 1024):
        routed = torch.zeros(rows, 7168, dtype=BF16)
        how = {"top_k": 2, "handicap_E": torch.zeros(groups["num_groups"], dtype=torch.int16)}
        yield "choose_experts", Case((routed, weight(groups["num_groups"], 7168)), how)
    # All experts of small, of whose ranks those chosen count.
    ranks, logits, chosen = torch.zeros(64, 768, dtype=BF16), torch.zeros(64, 32, dtype=BF16), dealt(128, 32)
    yield "weigh_ranks", Case((ranks, logits, chosen.reshape(64, 2)))
    yield "weigh_ranks_grads", Case((ranks, ranks, logits, chosen.reshape(64, 2)))
    # Those of r12, of the chosen alone.
    ranks, only = torch.zeros(64, 2 * 1192, dtype=BF16), {"chosen_only": True}
    yield "weigh_ranks", Case((ranks, logits, chosen.reshape(64, 2)), only)
    yield "weigh_ranks_grads", Case((ranks, ranks, logits, chosen.reshape(64, 2)), only)
    # The experts of r12, with its width cut, and of r9.
    for rows, columns in ((1192, 192), (128, 512)):
        stacked = weight(groups["num_groups"] * rows, columns)
        # Each count takes another tile.
        for slots in (4, 256, 2048, 4096, 16384):
            x, grad = (torch.zeros(slots, width, dtype=BF16) for width in (columns, rows))
            experts = dealt(slots, groups["num_groups"])
            yield "grouped_linear", Case((x, stacked, experts), groups)
            yield "grouped_linear_input_grad", Case((grad, stacked, experts), groups)
            yield "grouped_linear_weight_grad", Case((grad, x, experts), groups)
            yield "grouped_linear_weight_grad", Case((grad, x, experts), {**groups, "dtype": BF16})
        # Two slots that share a row: of x as the experts of a position do, of the gradient as the terms of a sum do.
        pairs = dealt(2 * 4096, groups["num_groups"]).reshape(4096, 2)
        x, grad = (torch.zeros(4096, 1, width, dtype=BF16).expand(-1, 2, -1) for width in (columns, rows))
        yield "grouped_linear", Case((x, stacked, pairs), groups)
        yield "grouped_linear_input_grad", Case((grad, stacked, pairs), groups)
        yield "grouped_linear_weight_grad", Case((grad.contiguous(), x, pairs), groups)
        yield "grouped_linear_weight_grad", Case((grad, x.contiguous(), pairs), groups)


def of_rows() -> Iterator[tuple[str, Case]]:
    x, ids = torch.zeros(64, WIDTH, dtype=BF16), dealt(64, 16)
    table = weight(64, WIDTH)
    # A gradient that is added to another, as those of the layers of small are. They take all tiles.
    sizes = ((16_384, 1024, 512), (16_384, 160, 512), (16_384, 32, 512), (16_384, 512, 128))
    for rows, outputs, inputs in (*sizes, (8192, 3072, 512), (256, 64, 3072), (64, 64, 64)):
        grad, other = (torch.zeros(rows, width, dtype=BF16) for width in (outputs, inputs))
        yield "linear_input_grad", Case((grad, weight(outputs, inputs)), {"out": other})
    for rows in (1, 16, 64):
        yield "linear", Case((x[:rows], table))
        yield "linear_input_grad", Case((torch.zeros(rows, 64, dtype=BF16), table))
    # The matrices of small that give the terms of its experts, side by side.
    yield "linear", Case((torch.zeros(128, 768, dtype=BF16), weight(32 * 1024, 24)), {"num_groups": 32})
    # The last width is more than a program holds of a row.
    for width in (WIDTH, 7168, 12_288):
        of_width, its_gain = torch.zeros(64, width, dtype=BF16), weight(1, width)
        yield "rms_norm", Case((of_width, its_gain))
        yield "add_rms_norm", Case((of_width, of_width, its_gain))
        yield "rms_norm_input_grad", Case((of_width, of_width, its_gain))
        yield "rms_norm_input_grad", Case((of_width, of_width, its_gain), {"added": of_width})
        yield "rms_norm_weight_grad", Case((of_width, of_width))
    yield "dequantize", Case((table,), {"dtype": BF16})
    yield "embedding", Case((ids, table), {"dtype": BF16})
    yield "embedding_row_grads", Case((ids, x))
    neighbours, signs = dealt(640, 64).reshape(64, 10).to(torch.int32), torch.ones(64, 10, dtype=BF16)
    yield "edge_sum", Case((x, neighbours, signs))
    yield "edge_sum_input_grad", Case((x, neighbours, signs), {"num_nodes": 64})
    yield "edge_sum_sign_grad", Case((x, x, neighbours))


def of_loops() -> Iterator[tuple[str, Case]]:
    latent, width, alphas = 4096, 512, (0.9, 0.5, 0.1)
    weights = (weight(width, latent), weight(width, width), weight(len(alphas), width), weight(latent, width))
    given = (torch.zeros(2, latent, dtype=BF16), torch.zeros(2, 298, width, dtype=BF16), *weights)
    yield "denoise_loop", Case(given, {"alphas": alphas, "halt_threshold": 0.5})


def of_updates() -> Iterator[tuple[str, Case]]:
    matrix, grad = weight(64, WIDTH), torch.zeros(64, WIDTH)
    votes = grad.to(torch.int8)
    yield "orthogonalize", Case((grad.to(BF16),))
    # The stacks of small, wide and tall.
    of_small = ((14, 1024, 512), (7, 512, 1024), (6, 512, 512), (6, 32, 512), (6, 512, 128), (6, 512, 256))
    for count, rows, columns in of_small:
        yield "orthogonalize", Case((torch.zeros(count * rows, columns, dtype=BF16),), {"num_groups": count})
    # Sides for which sums are long.
    for side in (3072, 4096):
        yield "orthogonalize", Case((torch.zeros(side, side, dtype=BF16),))
    # So many matrices that programs run together.
    yield "orthogonalize", Case((torch.zeros(16 * 1192, 1192, dtype=BF16),), {"num_groups": 16})
    yield "average_gradient", Case((grad.to(BF16), votes, votes[:, 0].contiguous(), 0.5), {"memory": 3})
    yield "row_exponents", Case((grad,))
    yield "sign_votes", Case((grad, 3))
    yield "stochastic_votes", Case((grad, 0.5), CLOCK)
    yield "accumulate", Case((matrix, votes), CLOCK)
    yield "accumulate", Case((matrix, votes), {"exponent_rule": "sign", **CLOCK})
    yield "accumulate_gradient", Case((matrix, grad, 0.5), CLOCK)
    # A part of a table of ten million rows, as a rank of four keeps it.
    some = torch.arange(len(grad))
    yield "accumulate_gradient", Case((matrix, grad, 0.5), {"rows": some, "first_row": 7_500_000, **CLOCK})
    yield "apply_step", Case((matrix,))
    # The experts of r12 have an odd multiple of 8 columns, of which a batch names some rows.
    matrix, grad = weight(64, 1192), torch.zeros(32, 1192, dtype=BF16)
    some = torch.arange(len(grad))
    yield "row_exponents", Case((grad,))
    yield "sign_votes", Case((grad, 3))
    yield "stochastic_votes", Case((grad, 0.5), CLOCK)
    yield "accumulate", Case((matrix, grad.to(torch.int8)), {"rows": some, **CLOCK})
    yield "accumulate_gradient", Case((matrix, grad, 0.5), {"rows": some, **CLOCK})
    several = {"seed": 1, "step": 2, "tensor_ids": (3,)}
    yield "accumulate_gradients", Case(((matrix,), torch.zeros(64, 1192, dtype=BF16), 0.5), several)
    yield "apply_step", Case((matrix,), {"rows": some})
    stacked = torch.zeros(2 * 64, 1192, dtype=BF16)
    yield "orthogonalize", Case((stacked,), {"num_groups": 2, "iterations": 1})
    yield "initial_weight", Case(((64, WIDTH),), {"std": 0.1, "seed": 1, "tensor_id": 3})
