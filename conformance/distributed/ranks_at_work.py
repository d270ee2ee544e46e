"""What ranks find out together, for test_distributed.py and its neighbours: torchrun starts this module once for many checks.

    torchrun --nproc-per-node 2 -m conformance.distributed.ranks_at_work FOLDER cpu

On `cuda` the kernels of Triton compute, and each rank has a GPU of its own, with NCCL between them. On a machine of fewer GPUs all
ranks share one, and gloo is between them. Every rank writes FOLDER/rank<number>.json: what each check returned, by its name. The
tests compare.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from arbitor.optimized import ops as triton_ops
from arbitor.optimized.distributed import gradients, traffic
from arbitor.optimized.distributed import ranks as ranks_module
from arbitor.optimized.distributed.changes import changes_bytes
from arbitor.optimized.distributed.run import train_together
from arbitor.optimized.distributed.sizes import read_bytes, received_bytes
from arbitor.optimized.distributed.world import World, as_bytes, joined
from arbitor.optimized.float32_sums import rounded_product, wide_product
from arbitor.optimized.training.census import Census
from arbitor.optimized.training.checkpoint import state_sha256
from arbitor.reference import ops as reference_ops
from arbitor.reference.config import SIGN_VOTES, ArbConfig, with_fields
from arbitor.reference.constants import VOTED_IN
from arbitor.reference.graph import ArbModel
from arbitor.reference.graph.mxint8 import encoded_bytes
from arbitor.reference.types import has_memory
from conformance import interpreter
from conformance.distributed import oracle
from conformance.distributed.adapters_at_work import (
    adapts_as_one_batch,
    adds_gradients_of_adapters_in_order,
    finetunes,
    moves_no_adapters_by_what_is_not_finite,
    refuses_ranks_whose_adapters_differ,
)
from conformance.distributed.at_work import (
    BATCH,
    RATE,
    Place,
    begin_a_run_of_four,
    digest_of,
    model_of,
    random_ids,
    ranks_of,
    take_pass,
    take_steps,
    together,
    voted_like_one,
)
from conformance.distributed.codes_at_work import (
    CODES,
    counts_bytes_of_codes,
    spreads_codes,
    trains_with_spread_codes,
)
from conformance.distributed.cuts_at_work import CUT, cuts_stacks
from conformance.distributed.experts_at_work import (
    spreads_experts,
    trains_with_spread_experts,
    votes_as_one_process,
)
from conformance.distributed.means_at_work import keeps_means, spreads_means
from conformance.distributed.micro_at_work import sums_micro_batches, trains_in_micro_batches
from conformance.distributed.passes_at_work import replays_what_it_launches
from conformance.distributed.runs_at_work import (
    goes_on,
    goes_on_with_a_run_of_four,
    goes_on_with_a_run_of_one,
    refuses_ranks_that_differ,
    trains,
)
from conformance.graph import models
from conformance.training import nano

TERMS = (1.0, 2.0**30, -(2.0**30))
"""Terms of the ranks, in float32. From the first on the sum of three is 0, from the last on it is 1."""

PLAIN = replace(nano.WHOLE, composite_codes=0, composite_inner=1280, num_experts=31)
"""Every module but composites, whose losses are means over chosen positions. There are more experts than slots of a rank."""

SHORT = (PLAIN.num_experts - 1) // (BATCH // 2 * PLAIN.top_k)
"""Bytes of a window that leave a rank of two or more with fewer slots than experts."""

MEANS = replace(PLAIN, average_gradients=True, expert_rank=32, shared_inner=32)
"""The same with running means of gradients, those of experts among them."""

# Not by name: `ops` has ops of the names of its files.
orthogonal_ops = import_module("arbitor.optimized.ops.orthogonal")

CASES: dict[str, tuple[ArbConfig, torch.dtype, str, bool]] = {
    "every module": (PLAIN, torch.float32, "full", False),
    "bfloat16": (nano.NANO, torch.bfloat16, "full", False),
    "sign votes": (with_fields(nano.NANO, **SIGN_VOTES), torch.float32, "full", False),
    "eight bits": (nano.NANO, torch.bfloat16, "mxint8", False),
    "spread codes": (replace(PLAIN, num_codes=400), torch.bfloat16, "full", True),
    "running means": (MEANS, torch.bfloat16, "full", False),
    "running means in eight bits": (MEANS, torch.float32, "mxint8", True),
    "stacks of several owners": (CUT, torch.float32, "full", False),
    "stacks of several owners in eight bits": (CUT, torch.bfloat16, "mxint8", False),
    "some matrices of stacks of several owners": (
        replace(PLAIN, expert_rank=35, shared_inner=40),
        torch.bfloat16,
        "full",
        False,
    ),
}
"""Models that are compared with the oracle bit for bit, how gradients travel, and whether rows of codebooks are spread."""


def cases_of(count: int, device: str) -> list[str]:
    """Return the cases that a number of ranks compares. Of two, whose sum has one order, a CPU sees every third case."""
    return list(CASES)[:: 3 if count == 2 and device == "cpu" else 1]


def one_by_one(product: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return a product of stacks that multiplies one matrix after the other."""
    return lambda a, b, *dtype: torch.stack([product(*pair, *dtype) for pair in zip(a, b, strict=True)])


def sums_as_the_rule_says(world: World, folder: Path) -> Any:
    """Two passes of a step, and another step, by the ranks, and by the oracle on rank 0.

    Owners send what changed in one piece, in pieces of few weights, and weight by weight, or send pieces as they are. Gradients are
    sent together, whole, in rows, and in runs of some rows.
    """
    found = {}
    asked = cases_of(world.count, Place.device)
    sizes = (
        (2**26, 2**31, 0, 2**22),
        (2**9, 2**12, 0, 2**22),
        (1, 2**13, 0, 0),
        (2**26, 2**12, 0, 2**22),
        (2**26, 2**31, 2**24, 0),
        (2**10, 2**31, 0, 2**22),
        (2**26, 2**13, 0, 0),
        (2**9, 2**14, 2**24, 2**11),
        (2**10, 2**13, 0, 2**11),
        (2**26, 2**31, 2**24, 2**22),
    )
    with pytest.MonkeyPatch.context() as patch:
        for (name, (config, dtype, exchange, spread)), (piece, held, whole, small) in zip(
            CASES.items(), sizes, strict=True
        ):
            if name not in asked:
                continue
            patch.setattr(ranks_module, "PIECE_BYTES", piece)
            patch.setattr(ranks_module, "WHOLE_BYTES", whole)
            patch.setattr(gradients, "SMALL_BYTES", small)
            # Pieces are sent at once, and some at a time.
            patch.setattr(ranks_module, "RUN_BYTES", 2**30 if piece == 2**26 else 3 * piece)
            patch.setattr(traffic, "HELD_BYTES", held)
            # A library on a GPU may add in another order for a stack of few matrices than for one of many, which the oracle has.
            for product in (rounded_product, wide_product):
                patch.setattr(orthogonal_ops, product.__name__, one_by_one(product))
            model = together(config, world, dtype, exchange, spread=spread)
            alone = model_of(config, dtype)
            both = (model, alone) if world.is_first else (model,)
            for step in range(3):
                take_pass(model, world, step, length=SHORT)
                if world.is_first:
                    ids_BT = random_ids(step, SHORT)
                    oracle.take_pass(
                        alone, ids_BT, count=world.count, rate=RATE, step=step, exchange=exchange
                    )
                if step == 1:
                    for each in both:
                        each.step()
            censuses = []
            for each in both:
                census = Census(each)
                census.before_step()
                each.step()
                censuses.append(census.after_step())
            found[name] = {"hashes": (digest_of(model), state_sha256(alone.state())), "censuses": censuses}
    return found


def adds_in_order(world: World, folder: Path) -> Any:
    """Terms whose sum depends on the order: values, and the gradient of a matrix that votes as it is, which travels row by row."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(traffic, "HELD_BYTES", 1)
        patch.setattr(gradients, "SMALL_BYTES", 0)
        model = together(nano.NANO, world)
    ranks, head = model.voting.ranks, model.byte_head.vocabulary
    term = torch.tensor(TERMS[world.number], device=Place.device)
    totals = oracle.watch_totals(model)
    with model.voting.taking(rate=RATE, step=0, undo=False):
        head.vote(term.expand(head.weight.shape))
    voted = [total.unique().tolist() for total in totals.values()]
    return {"total": float(ranks.total(term)), "voted": voted, "steps": ranks.steps(head.tensor_id)}


def is_one_batch(world: World, folder: Path) -> Any:
    """The gradients that vote, and the integer tables, beside those of one process that has all windows."""
    model = together(nano.WHOLE, world)
    alone, names = voted_like_one(model, world)
    model.step()
    alone.step()
    same = {name: bool(torch.equal(table, alone.tables()[name])) for name, table in model.tables().items()}
    return {**names, "same": same}


def agrees_after_steps(world: World, folder: Path) -> Any:
    """The trits, exponents and tables of every rank after steps, and what each keeps of accumulators."""
    model = together(nano.WHOLE, world)
    take_steps(model, world, 2)
    weights = {name: module.weight for name, module in model.ternary_modules().items()}
    read = {
        f"{name}.{part}": each.tensors()[part].cpu()
        for name, each in weights.items()
        for part in each.tensors()
        if part not in VOTED_IN
    }
    kept = {name: has_memory(weight.trit_accum) for name, weight in weights.items()}  # type: ignore[attr-defined]
    return {
        "read": state_sha256({**read, **{name: table.cpu() for name, table in model.tables().items()}}),
        "kept": kept,
    }


def counts_bytes(world: World, folder: Path) -> Any:
    """What the ranks received for the matrices of a step, and the formula of docs/scaling.md. The last step is of three passes."""
    config = replace(nano.NANO, num_layers=1)
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for name, dtype, exchange, passes, whole in (
            ("float32", torch.float32, "full", 1, 0),
            ("bfloat16", torch.bfloat16, "full", 1, 0),
            ("eight bits", torch.bfloat16, "mxint8", 1, 2**24),
            ("three micro-batches", torch.bfloat16, "full", 3, 0),
            ("pieces as they are", torch.bfloat16, "full", 1, 2**24),
        ):
            patch.setattr(ranks_module, "WHOLE_BYTES", whole)
            model = together(config, world, dtype, exchange)
            ranks = ranks_of(model)
            ids_BT = world.share(random_ids())
            losses = [model.losses(ids_BT) for _ in range(passes)]
            read = model.state_dict()
            before = {each: tensor.clone() for each, tensor in read.items()}
            ranks.measured()
            # The rows of the table of bytes, and the loss, are no matrices.
            for module in model.ternary_modules().values():
                if module.tensor_id not in ranks.owned:
                    module.frozen = True
            for keeper in model.table_modules().values():
                keeper.frozen = True
            for step, of_pass in enumerate(losses):
                model.backward(of_pass, rate=RATE, step=step, accum=passes)
            model.step()
            received = ranks.measured()[1]
            matrices = {n: m for n, m in model.ternary_modules().items() if m.tensor_id in ranks.owned}
            wanted = sum(
                received_bytes(
                    module.weight,
                    world.count,
                    gradient_bytes=bytes_of_an_element(module, dtype, exchange),
                    changed=0,
                )
                - (world.count - 1) * changes_bytes(read_bytes(module.weight), 0)
                for module in matrices.values()
            )
            is_whole = whole and exchange == "full"
            # The weights of an owner are one piece.
            for owner in range(world.count):
                size = differ = 0
                for of, module in matrices.items():
                    if ranks.owned[module.tensor_id][owner]:
                        size += read_bytes(module.weight)
                        for part in module.weight.tensors().keys() - VOTED_IN:
                            after, was = (as_bytes(each[f"{of}.{part}"]) for each in (read, before))
                            differ += int((after != was).sum())
                assert 0 < 2 * differ < size, "the changes are fewer than the bytes, or this compares nothing"
                wanted += (world.count - 1) * (size if is_whole else changes_bytes(size, differ))
            loss_bytes = passes * 4 * (world.count - 1) * world.count
            sizes_bytes = 0 if is_whole else 8 * (world.count - 1) * world.count
            everyones = int(ranks.total(torch.tensor(received)))
            found[name] = (everyones - loss_bytes - sizes_bytes, round(wanted))
    return found


def bytes_of_an_element(module: Any, dtype: torch.dtype, exchange: str) -> float:
    """Return in how many bytes an element of the gradient of a matrix travels. One that is not made orthogonal votes in float32."""
    if not getattr(module, "orthogonal", False):
        return 4
    if exchange == "mxint8":
        return encoded_bytes(*module.weight.shape) / math.prod(module.weight.shape)
    return dtype.itemsize


def sends_no_more_rows_than_there_are(world: World, folder: Path) -> Any:
    """A table that is named in as many slots as it has rows, and in more: what this leaves, bytes received, and bytes under way."""
    found = []
    for more in (0, 100):
        model = together(nano.NANO, world)
        table, ranks = model.embedding.table, ranks_of(model)
        num_rows, num_columns = table.weight.shape
        generator = torch.Generator().manual_seed(world.number)
        grad = torch.randn(num_rows, num_columns, generator=generator)
        rows = torch.arange(num_rows)
        rows[-3:] = -1
        grad[-3:] = 0.0
        grad = torch.cat([grad, torch.zeros(more, num_columns)]).to(Place.device)
        rows = torch.cat([rows, torch.full((more,), -1)]).to(Place.device)
        ranks.measured()
        with (
            mock.patch.object(ranks._traffic, "later", wraps=ranks._traffic.later) as later,
            model.voting.taking(rate=RATE, step=0, undo=False),
        ):
            table.vote(grad, rows, chosen=True)
        received, under_way = ranks.measured()[1], [call.args[0] for call in later.call_args_list]
        model.step()
        wanted = (world.count - 1) * num_rows * (4 * num_columns + 8), [num_rows * 4 * num_columns]
        found.append((digest_of(model), received, under_way, *wanted))
    return found


def refuses_what_is_not_finite(world: World, folder: Path) -> Any:
    model = together(nano.WHOLE, world)
    take_steps(model, world, 1)
    before = digest_of(model)
    losses = model.losses(world.share(random_ids(1)))
    broken = {**losses, "bytes": losses["bytes"] * (math.nan if world.number == world.count - 1 else 1.0)}
    accepted = model.backward(broken, rate=RATE, step=1)
    model.step()
    return {"accepted": accepted, "changed": digest_of(model) != before}


def counts_faults(world: World, folder: Path) -> Any:
    """Rows that are not finite in the sum cast no votes, and each is counted once, whoever owns it."""
    model = together(nano.NANO, world)
    for module in (model.byte_head.gate, model.embedding.table):
        rows, columns = module.weight.shape
        grad = torch.ones(2 if module is model.embedding.table else rows, columns, device=Place.device)
        if world.number == world.count - 1:
            grad[1] = math.inf
        with model.voting.taking(rate=RATE, step=0, undo=False):
            chosen = torch.tensor([4, 9], device=Place.device) if module is model.embedding.table else None
            module.vote(grad, chosen, chosen=chosen is not None)
    spread = together(CODES, world, spread=True)
    assert spread.shared_vq is not None
    book = spread.shared_vq.bridge.codebooks["text"]
    grad = torch.ones(2, book.weight.shape[1], device=Place.device)
    if world.number == world.count - 1:
        grad[1] = math.inf
    with spread.voting.taking(rate=RATE, step=0, undo=False):
        book.vote(grad, torch.tensor([4, 39], device=Place.device), chosen=True)
    return [int(each.voting.ranks.total(each.voting.faults)) for each in (model, spread)]


def agrees_on_triton(world: World, folder: Path) -> Any:
    """Votes of a matrix, and of rows that each rank chose, and their step: the same bits by the reference and by kernels.

    So are searches of a codebook that is spread over ranks, its votes, and what becomes of its unused codes. Experts that are
    spread are given whole numbers, whose sums are exact.
    """
    # The matrix votes as it is, for a gradient that is made orthogonal is not the same in every bit.
    triton = models.drawn_by_the_reference(triton_ops)
    digests = []
    for ops in (reference_ops, triton):
        number = world.number, world.count
        model = ArbModel(CODES, ops=ops, device=Place.device, seed=3, codes_over=number, experts_over=number)
        train_together(model, world, exchange="full")
        gate, table = model.byte_head.gate, model.embedding.table
        generator = torch.Generator().manual_seed(world.number)
        chosen = torch.randperm(table.weight.shape[0], generator=generator)[:7]
        for step in range(2):
            with model.voting.taking(rate=RATE, step=step, undo=False):
                gate.vote(torch.randn(gate.weight.shape, generator=generator).to(Place.device))
                grad = torch.randn(7, table.weight.shape[1], generator=generator).to(Place.device)
                table.vote(grad, chosen.to(Place.device), chosen=True)
                if step == 0:
                    vote_with_what_is_spread(model, generator)
            model.step()
        digests.append(digest_of(model))
    return digests


def vote_with_what_is_spread(model: ArbModel, generator: torch.Generator) -> None:
    """Let a codebook and a stack of experts vote in the pass that is open."""
    assert model.shared_vq is not None
    book, stack = model.shared_vq.bridge.codebooks["text"], model.layers[0].moe_graph.moe.expert_up
    assert book.spread is not None and stack.spread is not None
    z = torch.randn(5, CODES.code_dim, generator=generator).to(Place.device).requires_grad_()
    _, c, losses = book.quantize(z)
    (c.sum() + losses["codebook"]).backward()
    x, grad = (
        torch.randint(-3, 4, (5, width), generator=generator).float().to(Place.device)
        for width in (CODES.expert_rank, CODES.shared_inner)
    )
    stack(x, torch.arange(5, device=Place.device) % 4 - 1).backward(grad)


def passes_signals_on(world: World, folder: Path) -> Any:
    return [world.signal(15 if world.number == world.count - 1 else None), world.signal(None)]


def shares_windows(world: World, folder: Path) -> Any:
    return world.share(torch.arange(BATCH)[:, None]).flatten().tolist()


CHECKS: tuple[Callable[[World, Path], Any], ...] = (
    sums_as_the_rule_says,
    adds_in_order,
    is_one_batch,
    agrees_after_steps,
    spreads_codes,
    counts_bytes_of_codes,
    counts_bytes,
    sends_no_more_rows_than_there_are,
    refuses_what_is_not_finite,
    counts_faults,
    agrees_on_triton,
    sums_micro_batches,
    refuses_ranks_that_differ,
    passes_signals_on,
    shares_windows,
    trains,
    spreads_experts,
    votes_as_one_process,
    adds_gradients_of_adapters_in_order,
    adapts_as_one_batch,
    moves_no_adapters_by_what_is_not_finite,
    keeps_means,
    spreads_means,
    cuts_stacks,
)
"""What any number of ranks checks."""

OF_TWO: tuple[Callable[[World, Path], Any], ...] = (
    replays_what_it_launches,
    trains_in_micro_batches,
    trains_with_spread_experts,
    finetunes,
    refuses_ranks_whose_adapters_differ,
    goes_on_with_a_run_of_four,
    goes_on_with_a_run_of_one,
    goes_on,
)
"""What two ranks check besides: whole runs, which take most of the time. What a third rank changes in them, CHECKS see."""

OF_THREE: tuple[Callable[[World, Path], Any], ...] = (trains_with_spread_codes,)
"""What three ranks check besides, which do not all have a window in each turn of validation."""


def checks_of(count: int) -> tuple[Callable[[World, Path], Any], ...]:
    """Return what a number of ranks checks, in its order."""
    return (*CHECKS, *(OF_TWO if count == 2 else OF_THREE))


@contextmanager
def a_world(patch: pytest.MonkeyPatch) -> Iterator[World]:
    """Join the ranks as a run does, or let them share a GPU."""
    if Place.device == "cpu" or torch.cuda.device_count() >= int(os.environ["WORLD_SIZE"]):
        with joined() as world:
            world.take_device(Place.device)
            yield world
        return
    patch.setattr(World, "take_device", lambda *_: None)
    dist.init_process_group("cpu:gloo,cuda:gloo")
    yield World(dist.get_rank(), dist.get_world_size())
    dist.destroy_process_group()


def threads_of_exchange() -> list[str]:
    """Return the names of the threads of this process in which gloo exchanges."""
    names = [each.read_text().strip() for each in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]


def main(folder: Path, device: str) -> None:
    torch.set_num_threads(1)
    if os.environ["RANK"] == "0" and os.environ["WORLD_SIZE"] == "2":
        begin_a_run_of_four(folder)
    Place.device = device
    if device == "cuda":
        Place.ops = triton_ops
    else:
        interpreter.spare()
    found = {}
    with pytest.MonkeyPatch.context() as patch, a_world(patch) as world:
        nano.register(patch)
        nano.without_pictures(patch)
        for check in checks_of(world.count):
            try:
                found[check.__name__] = check(world, folder)
            except Exception as error:
                # The others may wait for this rank, which ends here.
                found[check.__name__] = f"{type(error).__name__}: {error}"
                break
            finally:
                (folder / f"rank{world.number}.json").write_text(json.dumps(found))
        else:
            # A rank that failed waits for nobody.
            dist.barrier()
            found["leaves"] = [threads_of_exchange()]
    if "leaves" in found:
        found["leaves"].append(threads_of_exchange())
        (folder / f"rank{world.number}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
