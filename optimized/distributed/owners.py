"""Owners: which rank owns which rows of each matrix, so that ranks share the work of a step as equally as matrices allow.

The owner of a matrix makes its gradient orthogonal, counts its votes and steps it.
"""

from __future__ import annotations

from itertools import accumulate, pairwise

from arbitor.reference.audit import AREA_OF, area_of
from arbitor.reference.constants import TRITS_PER_BYTE
from arbitor.reference.graph import ArbModel
from arbitor.reference.graph.grouped import TernaryGroupedLinear
from arbitor.reference.graph.layers import TernaryEmbedding
from arbitor.reference.graph.module import TernaryModule
from arbitor.reference.op_table import OP_TABLE
from arbitor.reference.types import TernaryWeight

VOTE_WORK = 5000
"""Operations of `orthogonalize` that take as long as all else that an owner does for a weight.

The trunk of r12 on two H200s took 11.9 ps for each weight to add its gradients, scale them, vote, step, and find what has changed.
It made gradients orthogonal at 420 TFLOP/s.
"""


MEDIA = {AREA_OF[name] for name in ("image_sequencer", "video_head", "router")}
"""Areas of a model whose matrices a pass over text leaves alone."""


def owned_rows(
    model: ArbModel, count: int, *, starts_rows_anew: bool | None = None
) -> dict[int, tuple[range, ...]]:
    """Return the rows of each matrix that each rank owns, by tensor id. Tables, and weights that were built frozen, have no owner.

    Matrices are dealt by the `work` that they are to their owner, the largest first, each to the rank that has least so far. Those
    that are not stacked are dealt first, and stacks that `may_be_cut` refuses as if they were one matrix. Then each other stack is
    dealt, the one of the largest matrices first. Each rank owns at least one of its matrices. What a rank owns of a stack follows
    what the ranks before it own. Of equal matrices the lowest tensor id goes first, and of equal ranks the lowest number. Matrices
    that a pass over text leaves alone are dealt for themselves, so that ranks share the work of either kind.

    Args:
        model, count: the model, which may be on the meta device, and the number of ranks.
        starts_rows_anew: whether the layout lets each row begin anew, so that a stack can be cut anywhere; None for what the layout
            of the model does. In canonical form bytes hold trits of two rows, and a stack whose matrices are no whole bytes is not
            cut.
    """
    found: dict[int, tuple[range, ...]] = {}
    of_text, of_others = [0] * count, [0] * count
    is_of_media = {each.tensor_id: area_of(name) in MEDIA for name, each in model.ternary_modules().items()}
    modules = {each.tensor_id: each for each in model.ternary_modules().values() if has_owner(each)}
    stacks = {
        tensor_id: module.num_groups
        for tensor_id, module in modules.items()
        if isinstance(module, TernaryGroupedLinear)
        and may_be_cut(module, count, starts_rows_anew=starts_rows_anew)
    }
    works = {tensor_id: work(each) // stacks.get(tensor_id, 1) for tensor_id, each in modules.items()}
    for tensor_id in sorted(works, key=lambda each: (each in stacks, -works[each], each)):
        num_dealt, num_rows = stacks.get(tensor_id, 1), modules[tensor_id].weight.shape[0]
        shares = [int(tensor_id in stacks)] * count
        loads = of_others if is_of_media[tensor_id] else of_text
        loads[:] = [load + each * works[tensor_id] for load, each in zip(loads, shares, strict=True)]
        for _ in range(num_dealt - sum(shares)):
            rank = loads.index(min(loads))
            shares[rank] += 1
            loads[rank] += works[tensor_id]
        ends = [num_rows // num_dealt * each for each in accumulate(shares, initial=0)]
        rows = [range(*pair) for pair in pairwise(ends)]
        found[tensor_id] = tuple(each or range(0) for each in rows)
    return found


def has_owner(module: TernaryModule) -> bool:
    """Return whether a weight is stepped by one rank: a matrix that can vote is, unless ranks keep some of its rows each.

    A table is stepped by all.
    """
    return not isinstance(module, TernaryEmbedding) and not module.built_frozen and module.spread is None


def may_be_cut(module: TernaryGroupedLinear, count: int, *, starts_rows_anew: bool | None = None) -> bool:
    """Return whether several ranks may own a stack of matrices. See `owned_rows`.

    A stack has one owner if it has fewer matrices than there are ranks, if these are not made orthogonal, or if running means lead
    its gradients.
    """
    if count == 1 or module.num_groups < count or not module.orthogonal or module.average is not None:
        return False
    if starts_rows_anew is None:
        starts_rows_anew = not isinstance(module.weight, TernaryWeight)
    num_rows, num_columns = module.weight.shape
    return starts_rows_anew or num_rows // module.num_groups * num_columns % TRITS_PER_BYTE == 0


def work(module: TernaryModule) -> int:
    """Return the operations that a matrix, or a stack of them, is to its owner: of making it orthogonal, and of its votes."""
    num_rows, num_columns = module.weight.shape
    num_matrices = module.num_groups if isinstance(module, TernaryGroupedLinear) else 1
    votes = VOTE_WORK * num_rows * num_columns
    if not (getattr(module, "orthogonal", False) and module.voting.makes_orthogonal(num_matrices)):
        return votes
    sizes = {"N": num_rows, "K": num_columns, "E": num_matrices, "iterations": module.voting.orthogonal_steps}
    return votes + OP_TABLE["orthogonalize"].ops_min(sizes)
