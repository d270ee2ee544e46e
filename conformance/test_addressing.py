"""Tensors of more than 2**31 elements: offsets of 32 bits would wrap, and the last rows would be others.

And what must not be of such a size: the memory that a search of a large table takes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from arbitor.optimized.kernels import mxint8
from arbitor.reference import ops as reference_ops
from arbitor.reference.graph.mxint8 import BLOCK, decoded, encoded
from conformance.compare import exact
from conformance.report import skip
from conformance.subject import Subject, needs_cuda, needs_ours, weight_of

BIG = 2**31
"""Elements from which 32-bit offsets overflow."""

SEARCH_BYTES = 64 * 2**20
"""What a search may take for itself: a few numbers for each vector and each part of the codes."""


def test_pack_trits_beyond_32_bits(subject: Subject) -> None:
    needs_cuda(subject, "addressing beyond 2**31 trits")
    trits = torch.zeros(BIG + 25, dtype=torch.int8, device=subject.device)
    trits[-25:] = torch.arange(25, device=subject.device) % 3 - 1
    packed = subject.raw("pack_trits")(trits)
    tail = BIG + 25 - (BIG + 25) % 5 - 20
    exact(packed[tail // 5 :].cpu(), reference_ops.pack_trits(trits[tail:].cpu()))
    exact(subject.raw("unpack_trits")(packed, (BIG + 25,))[-25:].cpu(), trits[-25:].cpu())


def test_votes_beyond_32_bits(subject: Subject) -> None:
    """The last rows of a gradient of more than 2**31 elements vote as they do alone."""
    needs_cuda(subject, "addressing beyond 2**31 gradients")
    num_columns = 4096
    num_rows = BIG // num_columns + 3
    grad = torch.zeros(num_rows, num_columns, device=subject.device, dtype=torch.bfloat16)
    grad[-3:] = torch.randn(3, num_columns, device=subject.device)
    clock = {"seed": 1, "step": 2, "tensor_id": 3}
    votes = subject.raw("stochastic_votes")(grad, 1.0, **clock)
    rows = torch.arange(num_rows - 3, num_rows)
    exact(votes[-3:].cpu(), reference_ops.stochastic_votes(grad[-3:].cpu(), 1.0, rows=rows, **clock))
    assert not votes[:-3].any()
    exact(subject.raw("sign_votes")(grad, 3)[-3:].cpu(), reference_ops.sign_votes(grad[-3:].cpu(), 3))


def test_gradients_of_ranks_beyond_32_bits(subject: Subject) -> None:
    """The last rows of a gradient of more than 2**31 elements are encoded, and added to those of a second rank, as alone."""
    needs_cuda(subject, "addressing beyond 2**31 gradients of ranks")
    needs_ours(subject, "gradients in eight bits")
    num_columns = 4096
    num_rows = BIG // num_columns + 3
    grad = torch.zeros(num_rows, num_columns, device=subject.device, dtype=torch.bfloat16)
    grad[-3:] = torch.randn(3, num_columns, device=subject.device)
    content, want = mxint8.encode(grad), encoded(grad[-3:].cpu())
    elements = num_rows * num_columns
    exact(content[elements - 3 * num_columns : elements].cpu(), want[: 3 * num_columns])
    exact(content[-3 * num_columns // BLOCK :].cpu(), want[3 * num_columns :])
    assert not content[: elements - 3 * num_columns].any()
    total = mxint8.add_encoded(torch.stack([content, content]), torch.empty_like(grad))
    exact(total[-3:].cpu(), (2 * decoded(want, 3, num_columns)).to(torch.bfloat16))
    assert not total[:-3].any()


def test_linear_beyond_32_bits(subject: Subject) -> None:
    """The last rows of activations of more than 2**31 elements give what they give alone."""
    needs_cuda(subject, "addressing beyond 2**31 activations")
    num_columns = 1024
    count = BIG // num_columns + 5
    weight = weight_of(subject, 24, num_columns)
    x = torch.zeros(count, num_columns, device=subject.device, dtype=torch.bfloat16)
    x[-5:] = torch.randint(-8, 9, (5, num_columns), device=subject.device)
    op = subject.raw("linear")
    exact(op(x, weight)[-5:], op(x[-5:].clone(), weight))
    grad = torch.zeros(count, 24, device=subject.device, dtype=torch.bfloat16)
    grad[-5:] = torch.randint(-8, 9, (5, 24), device=subject.device)
    added = subject.raw("linear_input_grad")(grad, weight, out=x.clone())
    exact(added[-5:], subject.raw("linear_input_grad")(grad[-5:].clone(), weight, out=x[-5:].clone()))
    del added
    norm = weight_of(subject, 1, num_columns)
    exact(subject.raw("rms_norm")(x, norm)[-5:], subject.raw("rms_norm")(x[-5:].clone(), norm))


def test_experts_beyond_32_bits(subject: Subject) -> None:
    """The last slots and the last row of an expert, where weight, outputs and their gradient have more than 2**31 elements."""
    needs_cuda(subject, "addressing beyond 2**31 trits of experts")
    num_columns, num_groups = 4096, 2
    num_rows = BIG // num_columns // num_groups + 3
    count, clock = BIG // num_rows + 5, {"seed": 1, "step": 2, "tensor_id": 3}
    ones = subject.raw("constant_weight")(
        (num_groups * num_rows, num_columns), trit=1, exponent=0, device=subject.device
    )
    weight = subject.raw("from_spec")(ones)
    del ones
    last = torch.tensor([num_groups * num_rows - 1], device=subject.device)
    votes = torch.full((1, num_columns), 20, dtype=torch.int8, device=subject.device)
    subject.raw("accumulate")(weight, votes, rows=last, out=weight, **clock)
    # The last row's trits are zero now.
    subject.raw("apply_step")(weight, theta=20, rows=last, out=weight)
    experts = torch.zeros(count, dtype=torch.int64, device=subject.device)
    experts[-5:] = 1
    x = torch.zeros(count, num_columns, device=subject.device, dtype=torch.bfloat16)
    x[-5:, -5:] = torch.eye(5, device=subject.device)
    y = subject.raw("grouped_linear")(x, weight, experts, num_groups=num_groups)
    assert not y[:-5].any() and not y[-5:, -1].any() and (y[-5:, :-1] == 1).all()
    y.zero_()[-5:, -3:] = torch.tensor([1.0, 2.0, 4.0], device=subject.device)
    dx = subject.raw("grouped_linear_input_grad")(y, weight, experts, num_groups=num_groups)
    assert not dx[:-5].any() and (dx[-5:] == 3).all()


def test_update_beyond_32_bits(subject: Subject) -> None:
    """The last rows of a weight of more than 2**31 elements count and step."""
    needs_cuda(subject, "addressing beyond 2**31 weights")
    num_columns = 4096
    num_rows = BIG // num_columns + 3
    weight = subject.raw("constant_weight")(
        (num_rows, num_columns), trit=1, exponent=0, device=subject.device
    )
    rows = torch.tensor([0, num_rows - 1], device=subject.device)
    votes = torch.full((2, num_columns), 20, dtype=torch.int8, device=subject.device)
    clock = {"seed": 1, "step": 2, "tensor_id": 3}
    subject.raw("accumulate")(weight, votes, rows=rows, out=weight, **clock)
    canonical = subject.raw("to_spec")(weight)
    exact(canonical.trit_accum[rows].cpu(), votes.cpu())
    assert not canonical.trit_accum[1:-1].any()
    subject.raw("apply_step")(weight, theta=20, out=weight)
    dense = subject.raw("dequantize")(
        weight, rows=torch.tensor([0, 1, num_rows - 2, num_rows - 1], device=rows.device)
    )
    exact(dense[:, 0].cpu(), torch.tensor([0.0, 1.0, 1.0, 0.0]))
    exact(dense[:, -1].cpu(), torch.tensor([0.0, 1.0, 1.0, 0.0]))


def test_codes_beyond_32_bits(subject: Subject) -> None:
    """The last code of a table of more than 2**31 trits is revived, found by both searches, looked up and counted.

    Beyond 2**31 bytes is `trit_accum` alone, a byte a trit: votes and steps write there. What the searches read is not: the words,
    four trits to a byte, are 0.5 GiB, the exponents 0.2. In these, only offsets that are counted in trits would wrap.
    """
    needs_cuda(subject, "addressing beyond 2**31 trits of codes")
    width, op = 64, subject.raw
    num_codes = BIG // width + 3
    last, clock = num_codes - 1, {"seed": 1, "step": 2, "tensor_id": 3}
    ids = torch.tensor([last, last - 1], device=subject.device)
    empty = op("constant_weight")((num_codes, width), trit=0, exponent=0, device=subject.device)
    weight = op("from_spec")(empty)
    usage = torch.zeros(num_codes, dtype=torch.int16, device=subject.device)
    z = torch.ones(1, width, device=subject.device)
    vectors = op("revival_vectors")(z, weight, ids[:1], usage, first=last, window=1)
    exact(vectors.cpu(), torch.tensor([0]))
    op("revive_codes")(weight, z, vectors, first=last, out=weight)
    exact(op("nearest_codes")(z, weight).cpu(), torch.tensor([last]))
    buckets = {"num_codes": num_codes, "sign_bits": 20, "num_probes": 2}
    candidates = op("candidate_codes")(z, **buckets)
    exact(op("nearest_candidates")(z, weight, candidates).cpu(), torch.tensor([last]))
    exact(op("embedding")(ids, weight).cpu(), torch.cat([torch.ones(1, width), torch.zeros(1, width)]))
    op("count_codes")(usage, ids[:1], out=usage)
    usage[last] = 3
    op("age_codes")(usage, torch.cat([vectors, vectors - 1]), first=last - 1, out=usage)
    exact(usage[-3:].cpu(), torch.tensor([0, 1, 1], dtype=torch.int16))
    votes = torch.full((1, width), 20, dtype=torch.int8, device=subject.device)
    op("accumulate")(weight, votes, rows=ids[:1], out=weight, **clock)
    op("apply_step")(weight, theta=20, rows=ids[:1], out=weight)
    exact(op("embedding")(ids, weight).cpu(), torch.zeros(2, width))


def test_a_search_makes_neither_scores_nor_a_decoded_table(subject: Subject) -> None:
    """Of 2**22 codes of 64: scores of 1,024 vectors would take 8 GiB in float16, the table 256 MiB with a byte a trit.

    A vector's 2**16 candidates would take 128 MiB as scores of all vectors, and 4 GiB as codes. All codes are alike, so that the
    lowest id is what a search must find.
    """
    needs_cuda(subject, "memory of searches")
    if subject.ops is reference_ops:
        skip(
            "memory of searches",
            "the reference decodes and scores a part of the table at a time, of 2**24 elements",
        )
    num_codes, width, num_vectors, device = 2**22, 64, 1024, subject.device
    op = subject.raw
    weight = op("from_spec")(op("constant_weight")((num_codes, width), trit=1, exponent=0, device=device))
    z = torch.randn(num_vectors, width, device=device)
    candidates = torch.randint(0, num_codes, (num_vectors, 2**16), device=device)
    for name, args, want in (
        ("nearest_codes", (z, weight), torch.zeros(num_vectors, dtype=torch.int64)),
        ("nearest_candidates", (z, weight, candidates), candidates.amin(dim=1).cpu()),
    ):
        found, taken = with_peak(lambda name=name, args=args: op(name)(*args))
        exact(found.cpu(), want, name)
        assert taken < SEARCH_BYTES, f"{name} takes {taken / 2**20:.0f} MiB, allowed {SEARCH_BYTES >> 20}"


def with_peak(call: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """Return what a call returns, and by how many bytes the allocated memory of the device grew meanwhile, at most."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    return result, torch.cuda.max_memory_allocated() - before
