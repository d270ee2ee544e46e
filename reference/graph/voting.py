"""Voting: how a backward pass changes the weights of a model, and the notes that it leaves for the next step.

A pass is open while `Voting.taking` is entered. Within it weights vote in place. A gradient that votes as it is votes at once. A
gradient that is made orthogonal first waits for others of its shape, so that one call makes them orthogonal together. Few gradients
wait at a time, and none outlives the pass. All else that the next step must know becomes a note of the pass. A pass that ends well
hands its notes to the model, whose next step delivers them. A pass that raises leaves neither votes nor notes.

A step may have several passes, one for each of its micro-batches. Their gradients are then summed, and the sums vote with the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import groupby
from operator import itemgetter
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from arbitor.reference import checks
from arbitor.reference.config import ArbConfig
from arbitor.reference.graph.op_set import OpSet
from arbitor.reference.graph.open_pass import Key, Note, Pass, Sum, Sums, Vote, Voter
from arbitor.reference.graph.ranks import Gradient, Ranks
from arbitor.reference.graph.rule import is_recorded

WAITING_ELEMENTS = 2**25
"""Elements of the gradients that wait to be made orthogonal, above which all of them vote: 64 MiB of bfloat16."""


Apart = Callable[[Sequence[Callable[[], None]]], None]
"""What runs pieces of work that do not depend on each other."""


class Voting:
    """The voting of one model: how its weights vote, and the notes of its passes. All modules of the model share it.

    Attributes:
        current: the pass that is open, or None.
        notes:   the notes of the passes since the last step.
        sums:    the sums of gradients that vote with the next step; None if no pass has left anything for it.
        step:    dither step of the last pass that ended well. The step rule and the sums draw with it.
        faults:  int64 [], gradient rows so far that were not finite and cast no votes.
        dtype:   dtype in which gradients are made orthogonal: bfloat16 if the activations are, else float32.
        version: steps and loads of the model's weights and tables so far. Each of them makes ledgers stale.
        torn:    whether a step raised, or a pass that could not be undone. The state is then of no use until another is loaded.
        strayed: whether gradients came through weights outside of a pass, which nobody has answered since.
        whole:   whether the modules make a whole model, which has passes and steps of its own. Parts of one have none.
        alone:   whether the weights are of a layer that belongs to no model, so that nobody can take a pass or a step.
        ranks:   the ranks that train the model together.
        apart:   runs pieces of work of votes and steps of which none writes what another one reads or writes, but for sums of
            integers. They run in turn, unless whoever records them lets them run side by side.
        reads_apart: the same for pieces of a pass without gradients: `alongside`.
    """

    def __init__(
        self,
        op_set: OpSet,
        config: ArbConfig,
        *,
        seed: int,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.op_set = op_set
        self.vote_rule = config.vote_rule
        self.exponent_rule = config.exponent_rule
        self.orthogonal_steps = config.orthogonal_steps
        self.dtype = gradient_dtype(dtype)
        self.seed = seed
        self.current: Pass | None = None
        self.notes: list[Note] = []
        self.sums: Sums | None = None
        self.step: int | Tensor = 0
        self.faults = torch.zeros((), dtype=torch.int64, device=device)
        self.version = 0
        self.torn = False
        self.strayed = False
        self._strayed_in = 0
        self.whole = False
        self.alone = False
        self.ranks = Ranks()
        self.apart: Apart = in_turn
        self.reads_apart: Apart = in_turn

    @property
    def ops(self) -> ModuleType:
        """The op set that counts the votes."""
        return self.op_set.ops

    @property
    def active(self) -> bool:
        """Whether a backward pass running now takes votes."""
        return self.current is not None and self.current.moves

    @property
    def waits(self) -> bool:
        """Whether passes have left something for the next step."""
        return bool(self.notes or self.totals)

    @property
    def totals(self) -> dict[Key, Sum]:
        """The sums of gradients by weight and part."""
        return {} if self.sums is None else self.sums.totals

    @contextmanager
    def taking(
        self,
        *,
        rate: float | Tensor,
        step: int | Tensor,
        size: int = 1,
        accum: int = 1,
        undo: bool = True,
    ) -> Iterator[Pass]:
        """Take a pass: weights vote in the backward passes that are run inside of this context.

        If the context raises, weights, sums and `faults` are as before it. For this a pass keeps a copy of the counts that votes
        change, a byte for each weight and a byte for each group. While a CUDA graph is recorded nothing runs, and so nothing is
        copied.

        Args:
            rate: 0 .. 127, a number or a 0-dim float32 tensor. At 0 nothing moves, and nothing is left for the step. In a
                recording its value is not read, and counts as above 0.
            step: 0 .. 2^32 - 2, a number or a 0-dim int64 tensor.
            size: vote size of the `sign` rule.
            accum: how many micro-batches the step has, of which this pass takes one. The gradients of several are summed, and vote
                with the step (`vote_sums`), but for those whose rows a batch chose.
            undo: False keeps no copy, for callers that throw the model away if a pass raises. A pass that raises then leaves the
                model `torn`.

        Raises:
            TypeError or ValueError: a rate, step, size or accum that is not allowed, before anything ran; or an accum that does not
                fit the passes since the last step.
            RuntimeError: another pass is open, or the model is torn.
        """
        self.check_ready()
        recorded = is_recorded(self.faults)
        checks.vote_rate(rate, values=not recorded)
        checks.vote_clock(self.seed, step, 0, values=not recorded)
        checks.threshold("size", size)
        checks.integer("accum", accum, 1, 2**32 - 1)
        moves = recorded or float(rate) != 0
        if moves:
            self.check_fits(accum)
        taken = Pass(
            rate=rate,
            step=step,
            size=size,
            moves=moves,
            recorded=recorded,
            keeps=undo and not recorded,
            accum=accum,
            held=self.totals,
        )

        def leave() -> None:
            if taken.moves:
                self.leave(taken.notes, step=step)
                # While a graph is recorded the rate has no value. Who replays it holds the sums at a number.
                self.hold(taken.held, accum=accum, rate=0.0 if recorded else float(rate))

        with self._open(taken, undo=undo, leave=leave):
            yield taken

    def check_fits(self, accum: int) -> None:
        """Refuse, by a ValueError, a pass that cannot be of the step for which passes have left something."""
        if self.sums is None:
            return
        if accum != self.sums.accum:
            raise ValueError(
                f"accum is {accum}, but must be {self.sums.accum}, as in the passes since the last step, until the next one"
            )
        # Passes of one micro-batch each vote by themselves, and a step may have any number of them.
        if self.sums.count == accum > 1:
            raise ValueError(
                f"accum is {accum}, but so many passes were taken since the last step: a step must come before the next one"
            )

    @contextmanager
    def _open(self, taken: Pass, *, undo: bool, leave: Callable[[], None]) -> Iterator[None]:
        """Open a pass for the context, and end it: what waits in it votes, and `leave` leaves what the next step must know.

        If any of this raises, nothing is left, and all is undone.
        """
        left = list(self.notes), self.sums, self.step
        self.current, self.strayed = taken, False
        try:
            yield
            self._cast_sums(taken)
            self.ranks.finish()
            self._count_waiting(taken)
            leave()
        except BaseException:
            self.ranks.abandon()
            # The mark is set while the pass is undone, because undoing may be interrupted.
            self.torn = taken.wrote and not taken.recorded
            self.notes, self.sums, self.step = left
            if undo:
                taken.undo()
                self.torn = False
            raise
        finally:
            self.current = None

    def hold(self, totals: dict[Key, Sum], *, accum: int, rate: float) -> None:
        """Hold the sums for the next step after a pass that ended well and left its notes. They vote at the rate of that pass."""
        if totals or self.notes:
            count = 0 if self.sums is None else self.sums.count
            self.sums = Sums(totals, accum, count + 1, rate)

    def vote_sums(self) -> None:
        """Let the sums vote that the passes since the last step have left, each once. A step does this first.

        The sum of a weight that was frozen since then is dropped.
        If it raises after a vote, the model is torn.
        """
        sums = self.sums
        if sums is None or not sums.totals:
            return
        self.check_ready()
        taken = Pass(rate=sums.rate, step=self.step, size=1, moves=True, recorded=False, keeps=False)

        def leave() -> None:
            self.leave(taken.notes, step=self.step)
            self.sums = replace(sums, totals={})

        with self._open(taken, undo=False, leave=leave):
            # Every rank has the same order.
            for _, (voter, total) in sorted(sums.totals.items(), key=itemgetter(0)):
                weight, grad_NK = voter.now(), total.grad_NK.to(self.dtype_of(total.num_matrices))
                if weight is not None:
                    self._exchange(replace(voter, weight=weight), replace(total, grad_NK=grad_NK))

    def leave(self, notes: Iterable[Note], *, step: int | Tensor) -> None:
        """Add the notes of a pass that ended well to those for the next step. `step` is the dither step of the pass."""
        self.notes.extend(notes)
        self.step = step

    def note(self, tell: Callable[..., None], *seen: Tensor | None) -> None:
        """Leave a note in the pass that is open."""
        assert self.current is not None
        self.current.notes.append(Note(tell, seen))

    def deliver(self) -> None:
        """Deliver the notes of the passes since the last step to the modules."""
        notes, self.notes = self.notes, []
        self._end_step()
        for note in notes:
            note.tell(*note.seen)

    def forget(self, module: object) -> None:
        """Drop the notes for one module, and the sums of its weight."""
        self.notes = [note for note in self.notes if getattr(note.tell, "__self__", None) is not module]
        self.sums = None if self.sums is None else self.sums.without(module)
        self._end_step()

    def _end_step(self) -> None:
        """Let the next pass be of another step, if nothing waits for this one."""
        if not self.waits:
            self.sums = None

    def stray(self) -> None:
        """Note that gradients came through weights outside of a pass, which the next pass or step refuses.

        A lone layer has neither. A loop that has neither would never learn, and so its second backward pass is refused.

        Raises:
            RuntimeError: the weights are of a layer that belongs to no model; or gradients of an earlier backward pass came outside
                of a pass too, and nobody has answered them.
        """
        if self.alone:
            raise RuntimeError(
                "gradients came through a ternary layer that belongs to no model, and so would never learn: wrap the module in "
                "arbitor.nn.Ternary and call its backward, or keep the layer as it is by requires_grad_(False)"
            )
        # The number of the backward pass that autograd runs in this thread.
        running = torch._C._current_graph_task_id()
        if self.strayed and running != self._strayed_in:
            self.check_answered()
        self.strayed, self._strayed_in = True, running

    def check_answered(self) -> None:
        """Refuse to go on after gradients that came outside of a pass and did not vote, by a RuntimeError."""
        if self.strayed and self.whole:
            raise RuntimeError(
                "gradients came through the weights outside of model.backward, and so did not vote, but "
                "model.backward(loss, rate=..., step=...) must take the place of loss.backward(): model.drop_gradients() goes on "
                "without them, and requires_grad_(False) keeps the weights as they are"
            )

    def check_ready(self) -> None:
        """Refuse a pass while another one is open, or gradients did not vote, and of a model that is torn, by a RuntimeError."""
        self.check_whole()
        self.check_answered()
        if self.current is not None:
            raise RuntimeError("a pass is open, but must end before another one begins")

    def check_whole(self) -> None:
        """Refuse a model that a pass or a step left torn, by a RuntimeError."""
        if self.torn:
            raise RuntimeError(
                "the model holds part of a pass or step that raised, but must be loaded anew (load_state) before it goes on"
            )

    def move(self, change: Callable[[Tensor], Tensor]) -> None:
        """Move the count of faults, all notes and sums as `change` moves a tensor. A count from the meta device begins at 0."""
        was_meta = self.faults.is_meta
        self.faults = change(self.faults)
        if was_meta:
            self.faults = torch.zeros_like(self.faults)
        self.notes = [note.on(change) for note in self.notes]
        self.sums = None if self.sums is None else self.sums.on(change)
        self.step = change(self.step) if isinstance(self.step, Tensor) else self.step

    def cast(self, voter: Voter, gradient: Gradient) -> None:
        """Count the votes of a gradient, summed over ranks, in the accumulators of a weight, in place.

        This is done now or before the pass ends. If the step has several micro-batches, it is done with the step, for the sum of
        the gradients of all passes, each sum rounded to their dtype. Rows that the batch chose differ from pass to pass. So their
        gradients vote in each pass, at the rate divided by the square root of the number of micro-batches.

        A gradient of stacked matrices is first made orthogonal, in the dtype of the activations, unless the rule is `sign`. With 0
        matrices the gradient votes as it is, as the rows of a table do.
        With an `average` the gradient is led by it before it is made orthogonal. A gradient that votes as it is has none.
        If a pass uses a weight several times, the gradients of its `uses` are summed, each sum rounded to their dtype, and the sum
        votes. Rows that the batch chose differ from use to use. So each use of these votes at its part of the rate: the size of a
        vote does not depend on the size of the gradient, and votes at the full rate would together go too far. If a batch chose
        rows in some uses alone, the sum of the others votes at what is left of the rate. The `sign` rule counts the votes of each
        use, and of each pass.
        The pass leaves a note for `voted`.
        """
        taken = self.current
        assert taken is not None
        # Ranks exchange no more bits than the votes come from.
        grad_NK = gradient.grad_NK.to(self.dtype_of(gradient.num_matrices))
        gradient = replace(gradient, grad_NK=grad_NK)
        if voter.uses == 1 or self.vote_rule == "sign":
            self._settle(taken, voter, gradient)
        elif gradient.chosen:
            taken.lone[voter.tensor_id, gradient.part] += 1
            self._settle(taken, voter, gradient)
        elif (found := taken.summed(voter, gradient)) is not None:
            self._settle(taken, *found)

    def _settle(self, taken: Pass, voter: Voter, gradient: Gradient) -> None:
        """Let a gradient vote, or hold it for the sum of the micro-batches of the step."""
        if taken.accum > 1 and not gradient.chosen and self.vote_rule == "stochastic":
            taken.hold(voter, gradient)
        else:
            self._exchange(voter, gradient)

    def _exchange(self, voter: Voter, gradient: Gradient) -> None:
        """Sum a gradient over ranks, and count its votes."""
        self.ranks.exchange(voter.tensor_id, gradient, partial(self._cast_total, voter))

    def _cast_sums(self, taken: Pass) -> None:
        """Count the votes of sums to which not every use of a weight has added, as of a loop that was left early."""
        for voter, total in taken.rest():
            self._settle(taken, voter, total)

    def makes_orthogonal(self, num_matrices: int) -> bool:
        """Return whether a gradient of so many stacked matrices is made orthogonal before it votes."""
        return bool(num_matrices and self.orthogonal_steps and self.vote_rule == "stochastic")

    def dtype_of(self, num_matrices: int) -> torch.dtype:
        """Return the dtype of a gradient of so many stacked matrices: `dtype` if it is made orthogonal, else float32."""
        return self.dtype if self.makes_orthogonal(num_matrices) else torch.float32

    def _cast_total(self, voter: Voter, total: Gradient | None) -> None:
        """Count the votes of a gradient that was summed over ranks, unless it is None, and leave a note of them."""
        taken = self.current
        assert taken is not None
        if total is not None:
            vote = Vote(voter, total)
            if self.makes_orthogonal(total.num_matrices):
                taken.waiting.append(vote.of(total.grad_NK.to(self.dtype)))
                if sum(each.gradient.grad_NK.numel() for each in taken.waiting) > WAITING_ELEMENTS:
                    self._count_waiting(taken)
            else:
                self._count(taken, vote)
        if voter.voted is not None:
            self.note(voter.voted, None if total is None else total.rows)

    def _count_waiting(self, taken: Pass) -> None:
        """Make the gradients that wait orthogonal, all matrices of one shape in one call, and count their votes.

        The votes of one weight are counted in the order in which they came, because a count saturates.
        """
        stacks: dict[Any, list[Vote]] = {}
        for vote in taken.waiting:
            stacks.setdefault(vote.matrix, []).append(vote)
        taken.waiting.clear()
        # The gradients of one weight are in one stack, or are of other rows.
        self.apart([partial(self._count_stack, taken, votes) for votes in stacks.values()])

    def _count_stack(self, taken: Pass, votes: Sequence[Vote]) -> None:
        """Make gradients of one shape orthogonal in one call, and count their votes, those of alike weights in one call."""
        # Votes of one weight keep their order.
        votes = sorted(votes, key=lambda vote: vote.kind)
        # A gradient of a weight is led by those before it.
        grads = [self._led(taken, vote) for vote in votes]
        made = self.ops.orthogonalize(
            grads[0] if len(grads) == 1 else torch.cat(grads),
            iterations=self.orthogonal_steps,
            num_groups=sum(vote.gradient.num_matrices for vote in votes),
        )
        pieces, begin = [], 0
        for _, of_kind in groupby(votes, key=lambda vote: vote.kind):
            alike = list(of_kind)
            end = begin + sum(len(vote.gradient.grad_NK) for vote in alike)
            pieces += self._pieces(taken, alike, made[begin:end])
            begin = end
        self.apart(pieces)

    def _pieces(self, taken: Pass, votes: Sequence[Vote], made: Tensor) -> list[Callable[[], None]]:
        """Return the calls that count the votes of alike weights, whose orthogonal gradients lie one below the other.

        One call counts for all of them, unless some rows vote, or a later part of a weight, or a weight votes twice. A count
        saturates, so that order matters then.
        """
        parts = any(vote.voter.first_row for vote in votes)
        tensor_ids = {vote.voter.tensor_id for vote in votes}
        if votes[0].gradient.rows is None and not parts and len(tensor_ids) == len(votes) > 1:
            return [partial(self._count_together, taken, votes, made)]
        of_weights: dict[int, list[Vote]] = {}
        heights = [len(vote.gradient.grad_NK) for vote in votes]
        for vote, grad_NK in zip(votes, made.split(heights), strict=True):
            of_weights.setdefault(vote.voter.tensor_id, []).append(vote.of(grad_NK))
        return [partial(self._count_each, taken, of_weight) for of_weight in of_weights.values()]

    def _count_together(self, taken: Pass, votes: Sequence[Vote], grad_NK: Tensor) -> None:
        """Count the votes of alike weights, all rows of each, whose gradients lie one below the other."""
        for vote in votes:
            self._before_count(taken, vote)
        weights = tuple(vote.voter.weight for vote in votes)
        self.ops.accumulate_gradients(
            weights,
            grad_NK,
            _rate_of(taken, votes[0]),
            seed=self.seed,
            step=taken.step,
            tensor_ids=tuple(vote.voter.tensor_id for vote in votes),
            exponent_rule=self.exponent_rule,
            faults=self.faults,
            out=weights,
        )

    def _led(self, taken: Pass, vote: Vote) -> Tensor:
        """Return what is made orthogonal for a vote: its gradient, led by the running mean if the weight has one."""
        voter, gradient = vote.voter, vote.gradient
        if voter.average is None:
            return gradient.grad_NK
        self._begin_writing(taken)
        tables = voter.average.tables().values()
        taken.keep_rows(("average", voter.tensor_id), tables, voter.weight.shape[0], gradient.rows)
        return voter.average.lead(gradient.grad_NK, gradient.rows, taken.rate)

    def _begin_writing(self, taken: Pass) -> None:
        """Note that the pass is about to write to the state of the model."""
        if not taken.wrote:
            taken.keep(self.faults)
        taken.wrote = True

    def _count_each(self, taken: Pass, votes: Sequence[Vote]) -> None:
        """Count votes in their order."""
        for vote in votes:
            self._count(taken, vote)

    def _count(self, taken: Pass, vote: Vote) -> None:
        """Count a vote whose gradient is as it votes."""
        voter, weight, grad_NK = vote.voter, vote.voter.weight, vote.gradient.grad_NK
        self._before_count(taken, vote)
        clock: dict[str, Any] = {
            "seed": self.seed,
            "step": taken.step,
            "tensor_id": voter.tensor_id,
            "exponent_rule": self.exponent_rule,
            "rows": vote.gradient.rows,
            "first_row": voter.first_row,
            "out": weight,
        }
        if self.vote_rule == "stochastic":
            rate = _rate_of(taken, vote)
            self.ops.accumulate_gradient(weight, grad_NK, rate, faults=self.faults, **clock)
        else:
            self.faults += self.ops.count_nonfinite_rows(grad_NK)
            self.ops.accumulate(weight, self.ops.sign_votes(grad_NK, taken.size), **clock)

    def _before_count(self, taken: Pass, vote: Vote) -> None:
        """Keep what a vote is about to change, and note that the pass writes."""
        self._begin_writing(taken)
        taken.keep_counts(vote)

    def alongside(self, *pieces: Callable[[], Any]) -> tuple[Any, ...]:
        """Return what pieces of a pass return that do not depend on each other, as `reads_apart` runs them.

        The kernels of few positions leave most of a device idle, so a recorded step of generation has such pieces side by side.
        Autograd would go back in the streams in which they ran, so that a pass with gradients must not.
        """
        found: list[Any] = [None] * len(pieces)

        def run(place: int) -> None:
            found[place] = pieces[place]()

        self.reads_apart([partial(run, place) for place in range(len(pieces))])
        return tuple(found)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy or a pickle; raise RuntimeError while a pass is open."""
        if self.current is not None:
            raise RuntimeError("a pass is open, but must end before the model is copied")
        return self.__dict__


def in_turn(pieces: Sequence[Callable[[], None]]) -> None:
    """Run pieces of work one after the other."""
    for piece in pieces:
        piece()


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which gradients are made orthogonal, for activations of some dtype."""
    return torch.bfloat16 if dtype is torch.bfloat16 else torch.float32


def _rate_of(taken: Pass, vote: Vote) -> float | Tensor:
    """Return the rate at which a vote is cast in a pass."""
    # Votes of several micro-batches add up as noise does, and so they share the rate by the root of their number.
    parts = math.sqrt(taken.accum) if vote.gradient.chosen else 1
    return part_of_rate(taken.rate, vote.voter.uses * parts, vote.voter.shares)


def part_of_rate(rate: float | Tensor, uses: float, shares: int = 1) -> float | Tensor:
    """Return the float32 nearest to `shares / uses` of a float32 rate; the same for a number and for a tensor on a device."""
    if uses == shares:
        return rate
    if isinstance(rate, Tensor):
        # The divisor is a tensor. For a number CUDA would multiply by its reciprocal, which rounds differently.
        wide = rate.to(torch.float64) * shares
        return (wide / torch.full_like(wide, uses)).to(torch.float32)
    # An op rounds the quotient to float32, and so gets the same as from a tensor.
    return torch.tensor(rate, dtype=torch.float32).item() * shares / uses
