"""Laws of the buckets of a codebook: candidates by hand, and the codes that training starts from.

Legend: N codes, C code width, s sign bits.
"""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from arbitor.reference.constants import RESERVED_STEP
from arbitor.reference.ops.packing import trits_of
from arbitor.reference.ops.scale import dequantize

from .. import oracle
from .. import strategies as ss
from ..compare import exact
from ..law import law
from ..mutant import mutants_of
from ..subject import Subject
from .test_codebook import sign_bit_counts, sixteenths, vectors

mutant = mutants_of("codebook")


EQUAL_BUCKETS_ALONE = mutant(
    "equal_buckets_alone",
    "    return -(-num_codes // 2**sign_bits)",
    "    return num_codes // 2**sign_bits",
    compared="candidate_codes",
)


@law(
    num_codes=st.integers(1, 200),
    width=st.integers(1, 20),
    data=st.data(),
    rejects=[
        mutant(
            "zero_has_a_positive_sign", "own = ((z_q > 0)", "own = ((z_q >= 0)", compared="candidate_codes"
        ),
        mutant(
            "the_largest_flip_first",
            "columns_by_rank = z_q.abs().sort(",
            "columns_by_rank = z_q.abs().neg().sort(",
            compared="candidate_codes",
        ),
        mutant(
            "probes_by_number",
            "sets = _sets_of_ranks(sign_bits)",
            "sets = iter(range(2**sign_bits))",
            compared="candidate_codes",
        ),
        mutant(
            "buckets_drop_the_rest",
            "num_codes + 2**sign_bits - 1) >> sign_bits",
            "num_codes) >> sign_bits",
            compared="candidate_codes",
        ),
        EQUAL_BUCKETS_ALONE,
    ],
)
def test_candidate_codes_by_hand(ops: Subject, num_codes: int, width: int, data: st.DataObject) -> None:
    """The bucket of the signs comes first, then the buckets with those columns flipped that are nearest to 0."""
    sign_bits = data.draw(sign_bit_counts(num_codes, width))
    probes = data.draw(st.integers(1, min(2**sign_bits, 12)), label="probes")
    z = data.draw(vectors(width, shape=(2,)))
    found = ops.candidate_codes(z, num_codes=num_codes, sign_bits=sign_bits, num_probes=probes)
    weigh = lambda ranks: sum(rank + 1 for rank in range(sign_bits) if ranks >> rank & 1)  # noqa: E731
    sets = sorted(range(2**sign_bits), key=lambda ranks: (weigh(ranks), ranks))[:probes]
    size, want = -(-num_codes // 2**sign_bits), []
    for row in z.to(torch.float64).tolist():
        z_q, slots = sixteenths(row), []
        order = sorted(range(sign_bits), key=lambda column: (abs(z_q[column]), column))
        for ranks in sets:
            flipped = {order[rank] for rank in range(sign_bits) if ranks >> rank & 1}
            number = sum(1 << c for c in range(sign_bits) if (z_q[c] > 0) != (c in flipped))
            codes = [code for code in range(num_codes) if code * 2**sign_bits // num_codes == number]
            slots += codes + [-1] * (size - len(codes))
        want.append(slots)
    exact(found, torch.tensor(want))


@law(
    num_codes=st.integers(1, 150),
    width=st.integers(1, 20),
    data=st.data(),
    rejects=[EQUAL_BUCKETS_ALONE],
)
def test_candidate_codes_of_every_bucket(
    ops: Subject, num_codes: int, width: int, data: st.DataObject
) -> None:
    sign_bits = min(data.draw(sign_bit_counts(num_codes, width)), 4)
    z = data.draw(vectors(width, shape=(2,)))
    found = ops.candidate_codes(z, num_codes=num_codes, sign_bits=sign_bits, num_probes=2**sign_bits)
    for row in found.tolist():
        assert sorted(code for code in row if code >= 0) == list(range(num_codes))


BUCKET_SIGNS_REVERSED = mutant(
    "bucket_signs_reversed",
    "return (2 * bits - 1).to(torch.int8)",
    "return (1 - 2 * bits).to(torch.int8)",
    compared=("initial_codebook", "revive_codes"),
)
BUCKETS_TAKE_TURNS = mutant(
    "buckets_take_turns",
    "numbers = (ids << sign_bits) // num_codes",
    "numbers = ids % 2**sign_bits",
    compared="initial_codebook",
)


@law(
    num_codes=st.integers(1, 20),
    width=st.integers(1, 30),
    size=ss.GROUPS,
    seed=ss.SEEDS,
    data=st.data(),
    rejects=[
        BUCKET_SIGNS_REVERSED,
        BUCKETS_TAKE_TURNS,
        mutant(
            "codes_start_at_their_scale",
            "std=math.sqrt(INIT_NONZERO)",
            "std=0.1",
            compared="initial_codebook",
        ),
    ],
)
def test_initial_codebook_by_scalar_philox(
    ops: Subject, num_codes: int, width: int, size: int, seed: int, data: st.DataObject
) -> None:
    """Signs of the bucket in the first columns, the trits of an initial weight in the others, exponents and counts 0."""
    sign_bits = data.draw(sign_bit_counts(num_codes, width))
    weight = ops.initial_codebook(
        (num_codes, width), sign_bits=sign_bits, seed=seed, tensor_id=3, group_size=size
    )
    groups, want = -(-width // size), []
    for code in range(num_codes):
        bucket, row = code * 2**sign_bits // num_codes, []
        for column in range(width):
            group = code * groups + column // size
            byte = oracle.dither(group, size, seed, RESERVED_STEP, 3)[column % size]
            random = -1 if byte < 79 else 1 if byte >= 177 else 0
            row.append((1 if bucket >> column & 1 else -1) if column < sign_bits else random)
        want.append(row)
    exact(trits_of(weight), torch.tensor(want, dtype=torch.int8))
    assert not any(tensor.any() for name, tensor in weight.tensors().items() if name != "packed")


@law(
    share=0.5,
    num_codes=st.integers(1, 20),
    width=st.sampled_from((7, 16, 33)),
    seed=ss.SEEDS,
    data=st.data(),
    rejects=[BUCKET_SIGNS_REVERSED, BUCKETS_TAKE_TURNS],
)
def test_initial_codebook_is_found(
    ops: Subject, num_codes: int, width: int, seed: int, data: st.DataObject
) -> None:
    """A code is among the candidates that its own vector names with one probe, and an equal one is the nearest."""
    sign_bits = data.draw(sign_bit_counts(num_codes, width))
    weight = ops.initial_codebook((num_codes, width), sign_bits=sign_bits, seed=seed, tensor_id=0)
    code = data.draw(st.integers(0, num_codes - 1))
    z = dequantize(weight)[code : code + 1]
    candidates = ops.candidate_codes(z, num_codes=num_codes, sign_bits=sign_bits, num_probes=1)
    assert code in candidates.tolist()[0]
    found = int(ops.nearest_candidates(z, weight, candidates))
    assert found <= code and torch.equal(trits_of(weight)[found], trits_of(weight)[code])
