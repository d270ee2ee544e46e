"""The KV ledger: the bytes that a model has read, and the rows that its attention keeps of them. It only grows.

The ledger is a transcript. Ids are given or predicted, and later read once. The ledger holds activations, and no state of the
model, so it may be thrown away and made anew from its ids.

Legend: B batch (sequences), T bytes, P positions of one pass, V vocabulary, K columns of a row, S slots, Q queries.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from arbitor.reference import checks
from arbitor.reference.config import NGRAM, VOCABULARY_SIZE, ArbConfig
from arbitor.reference.dtypes import wide_dtype
from arbitor.reference.graph.rotary import turns_at, with_turned_key
from arbitor.reference.graph.scheduler import ContextAttentionScheduler, Seen
from arbitor.reference.graph.voting import Voting
from arbitor.reference.unordered import in_any_order

CONTEXT = NGRAM - 1
"""Bytes before a new byte that the position of the new byte reads too."""


class KVLedger:
    """The transcript of some sequences that are read in lockstep; they may differ in length.

    A pass of the model is `begin`, the layers, `end`. A pass that raises in between leaves no trace, because the next `begin`
    takes back what the pass had added. The places that a pass writes to depend on two counters on the device of the rows, not on
    numbers of the host. So a recorded pass of one position can be replayed for the next position (`replay`).

    A ledger belongs to the model that first read it, with the weights and tables of that moment. `bind` refuses any other. A step,
    a load, and adapters that come or go make the ledger stale, and a stale ledger must be made anew from its ids. The steps of an
    optimizer that trains adapters are not noticed.

    Attributes:
        positions: number of positions that attention has read, of each sequence.
        unread:    number of ids at the end of every transcript that no pass has read yet.

    Args:
        config: configuration of the model that reads. It gives the attention widths, and the rows that a position sees.
        batch:  number of sequences, at least 1.
        device: device of the ledger.
        dtype:  dtype of the model's activations.

    Source:  REFACTOR14 (seeded with the prompt, appended to by each forward pass); docs/spec/attention.md
    """

    def __init__(
        self,
        config: ArbConfig,
        batch: int = 1,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        checks.integer("batch", batch, 1, 2**31 - 1)
        checks.one_of("dtype", dtype, checks.FLOAT_DTYPES)
        self.config, self.batch, self.device, self.dtype = config, batch, torch.device(device), dtype
        self.scheduler = ContextAttentionScheduler(config)
        self.lengths = [0] * batch
        self.positions = [0] * batch
        self.unread = 0
        self._ids = self._growing((), torch.int64)
        self._codes = self._growing((), torch.int64)
        self._vectors = self._growing((config.code_dim,), dtype)
        columns = config.kv_latent + 2 * config.rotary_dim
        self._logs = [self._growing((columns,), dtype) for _ in range(config.num_layers)]
        # The number of positions and of read ids, on the device of the rows. They are written in place, because a recorded pass
        # reads them there.
        self._first_B = torch.zeros(batch, dtype=torch.int64, device=self.device)
        self._read_B = torch.zeros(batch, dtype=torch.int64, device=self.device)
        # The first numbers, which a step of one position needs again and again.
        self._numbers = torch.arange(max(batch, CONTEXT + 1, config.num_heads), device=self.device)
        self._pass: _Pass | None = None
        # The voting of the model whose rows these are. A copy of the ledger shares the weak reference, which keeps no model alive.
        self._owner: weakref.ref[Voting] | None = None
        self._version = 0

    def __len__(self) -> int:
        """Return the bytes of the longest transcript."""
        return max(self.lengths)

    def ids(self, sequence: int = 0) -> Tensor:
        """Return the transcript of a sequence, int64 [length], read or not."""
        return self._ids.rows[sequence, : self.lengths[sequence]].clone()

    def codes(self, sequence: int = 0) -> Tensor:
        """Return the codes of the positions that a sequence has read, int64. A model without codes records none."""
        return self._codes.rows[sequence, : self.positions[sequence]].clone()

    def layer(self, index: int) -> LayerLedger:
        """Return the ledger of a layer, which its attention reads and appends to.

        It is made anew each time. This ledger holds the rows alone, so that they are freed when nobody holds the ledger any more.
        """
        return LayerLedger(self, self._logs[index])

    def retract(self) -> None:
        """Take back the ids that were not read yet."""
        self._roll_back()
        self.lengths = [length - self.unread for length in self.lengths]
        self.unread = 0

    def bind(self, voting: Voting, config: ArbConfig, *, device: torch.device, dtype: torch.dtype) -> None:
        """Bind this ledger to a model before a pass; refuse a ledger that another model or an earlier state of the model has read.

        Args:
            voting: voting of the model, with the `version` of its weights.
            config, device, dtype: those of the model.

        Raises:
            ValueError: the model differs in config, device or dtype, or another model has read the ledger.
            RuntimeError: the model was stepped or loaded, or given other adapters, since it read the ledger.
        """
        self._roll_back()
        if self.config != config:
            name = next(name for name, value in vars(config).items() if getattr(self.config, name) != value)
            raise ValueError(
                f"ledger is of a model with {name} {getattr(self.config, name)!r}, but this model has {getattr(config, name)!r}"
            )
        for name, own, other in (("device", self._first_B.device, device), ("dtype", self.dtype, dtype)):
            if own != other:
                raise ValueError(f"ledger has {name} {own}, but must have that of the model, {other}")
        if not any(self.positions):
            self._owner, self._version = weakref.ref(voting), voting.version
        elif self._owner is None or self._owner() is not voting:
            raise ValueError(
                f"ledger holds what one model {self.config.name!r} has read, but is given to another model {config.name!r} "
                "of the same config; make a new one from its ids"
            )
        self._check_current()

    def _check_current(self) -> None:
        """Refuse to go on with rows that today's weights of the model would not have made."""
        voting = None if self._owner is None else self._owner()
        if voting is not None and voting.version != self._version:
            raise RuntimeError(
                f"ledger holds what the model read at version {self._version} of its weights, but they are at version "
                f"{voting.version} after a step, a load or other adapters; make a new one from its ids"
            )

    def begin(self, ids_BT: Tensor | None) -> Tensor:
        """Start a pass: append ids to the transcripts, and return all unread ids, with the bytes before them.

        Args:
            ids_BT: int64 [B, T], or None to read the predicted ids.

        Returns:
            int64 [B, C + unread]: the C = 2 bytes that were read last (none in the first pass), then all unread ids.

        Raises:
            TypeError or ValueError: ids that do not fit, nothing to read, or fewer than three bytes in the first pass.
        """
        self._roll_back()
        given = 0
        if ids_BT is not None:
            checks.dtype_in("ids_BT", ids_BT, (torch.int64,))
            if ids_BT.ndim != 2 or ids_BT.shape[0] != self.batch:
                raise ValueError(
                    f"ids_BT has shape {tuple(ids_BT.shape)}, but must be [batch, bytes] with the ledger's batch, "
                    f"{self.batch}"
                )
            checks.values_between("ids_BT", ids_BT, 0, VOCABULARY_SIZE - 1)
            given = ids_BT.shape[1]
        read = min(self.lengths) - self.unread
        wanted = 1 if read else NGRAM
        if self.unread + given < wanted:
            raise ValueError(
                f"ids_BT leaves {self.unread + given} bytes to read, but a pass must read at least {wanted}"
            )
        self._pass = _Pass(self)
        if ids_BT is not None:
            self._append(ids_BT)
        count = self.unread + (CONTEXT if read else 0)
        return self._ids.read(self._lengths_B1() - count + self.ahead(count))

    def replay(self) -> None:
        """Begin a pass over a single unread id, whose rows a recorded pass writes, and `follow` in it. `replayed` must come next.

        Raises ValueError if not just one id is unread, or if nothing was read before. Raises RuntimeError if the model was
        stepped or loaded since it read.
        """
        self._roll_back()
        self._check_current()
        if self.unread != 1 or not all(self.positions):
            raise ValueError(
                f"the ledger has {self.unread} unread ids after {min(self.positions)} positions, but a replay must read one id "
                "after at least one position"
            )
        self._pass = _Pass(self)
        self._pass.count = 1

    def replayed(self) -> None:
        """Finish a pass that `replay` began, when the recorded pass is on its way."""
        if self._pass is None:
            raise RuntimeError("replayed was called, but must follow a replay")
        self._finish(self._pass)

    def end(self, predicted_B: Tensor) -> None:
        """Finish a pass: note that all ids were read, and append the predicted ids, int64 [B], as unread."""
        if self._pass is None:
            raise RuntimeError("end was called, but must follow a begin")
        self.follow(predicted_B)
        self._finish(self._pass)

    def follow(self, predicted_B: Tensor) -> None:
        """Do what can be recorded of the end of a pass: count positions and ids on the device, and write the predicted ids."""
        if self._pass is None:
            raise RuntimeError("follow was called, but must follow a begin")
        checks.tensor("predicted_B", predicted_B, torch.int64, (self.batch,))
        self._first_B += self._pass.count
        self._read_B += self.unread
        self._ids.write(self._read_B[:, None], predicted_B[:, None].to(self.device), len(self) + 1)

    def _finish(self, ended: _Pass) -> None:
        """Note what `follow` has done, and write the summaries of the blocks that a single position has completed."""
        if ended.count == 1:
            self.summarise(self._logs, ended.count)
        positions = [position + ended.count for position in self.positions]
        lengths = [length + 1 for length in self.lengths]
        # All of it or, where something raises before, nothing.
        self.positions, self.lengths, self.unread, self._pass = positions, lengths, 1, None

    def previous_codes(self, count: int) -> Tensor:
        """Return the codes of the `count` positions before this pass, int64 [B, count]; -1 where there was no position."""
        return self._previous(self._codes, count, -1)

    def record_codes(self, codes_BP: Tensor) -> None:
        """Append the codes of the positions of this pass."""
        self._record(self._codes, codes_BP)

    def previous_vectors(self, count: int) -> Tensor:
        """Return what the codebooks kept of the `count` positions before this pass, [B, count, C]; 0 without a position."""
        return self._previous(self._vectors, count, 0)

    def record_vectors(self, vectors_BPC: Tensor) -> None:
        """Append what later positions read of the positions of this pass to find their codes."""
        self._record(self._vectors, vectors_BPC.detach())

    def _previous(self, store: GrowingRows, count: int, nothing: int) -> Tensor:
        """Return the rows of the `count` positions before this pass, [B, count, ...], filled where there was no position."""
        places_Bn = self._first_B[:, None] - count + self.ahead(count)
        if not any(self.positions):
            shape = (*places_Bn.shape, *store.rows.shape[2:])
            return torch.full(shape, nothing, dtype=store.rows.dtype, device=store.rows.device)
        rows = store.read(places_Bn.clamp(min=0))
        missing_Bn = (places_Bn < 0).reshape(*places_Bn.shape, *(1 for _ in rows.shape[2:]))
        return rows.masked_fill(missing_Bn, nothing)

    def _record(self, store: GrowingRows, values: Tensor) -> None:
        """Append a row of each position of this pass."""
        count = values.shape[1]
        self.expect(count)
        places_BP = self._first_B[:, None] + self.ahead(count)
        store.write(places_BP, values, max(self.positions) + count)

    def reserve(self, count: int) -> None:
        """Make room to read all unread ids, and to append `count` ids more and read all of these but the last."""
        positions = max(self.positions) + self.unread + count - 1
        self._ids.reserve(len(self) + count)
        if self.config.num_codes:
            self._codes.reserve(positions)
            self._vectors.reserve(positions)
        for log in self._logs:
            log.reserve(self.scheduler.log_size(positions))

    def places(self) -> list[tuple[int, int]]:
        """Return the addresses and the capacities of the rows. Both change when room is made."""
        return [(store.rows.data_ptr(), store.rows.shape[1]) for store in self._stores()]

    def copy(self) -> Self:
        """Return the same ledger on memory of its own."""
        return self.select(range(self.batch))

    def select(self, rows: Sequence[int]) -> Self:
        """Return a ledger of some of the sequences, in the given order, on memory of its own."""
        self._roll_back()
        index = torch.tensor(list(rows), dtype=torch.int64, device=self.device)
        chosen = type(self)(self.config, len(index), device=self.device, dtype=self.dtype)
        chosen._owner, chosen._version = self._owner, self._version
        chosen.lengths = [self.lengths[row] for row in rows]
        chosen.positions = [self.positions[row] for row in rows]
        chosen.unread = self.unread
        chosen._first_B, chosen._read_B = self._first_B[index], self._read_B[index]
        for own, other in zip(chosen._stores(), self._stores(), strict=True):
            own.rows = other.rows[index]
        return chosen

    @classmethod
    def stack(cls, ledgers: Sequence[KVLedger]) -> KVLedger:
        """Return one ledger with the sequences of several ledgers side by side, on memory of its own.

        Raises ValueError if the ledgers differ in config, dtype, device or unread ids, if only some were read, or if different
        models or states of a model read them.
        """
        first = ledgers[0]
        for each in ledgers:
            each._roll_back()
        for other in ledgers[1:]:
            for name in ("config", "dtype", "device", "unread"):
                if getattr(other, name) != getattr(first, name):
                    raise ValueError(
                        f"ledgers differ in {name}, {getattr(first, name)} and {getattr(other, name)}, but must agree"
                    )
            if any(other.positions) != any(first.positions):
                raise ValueError("some ledgers were read and others were not, but must agree")
            if any(first.positions) and other._owner != first._owner:
                raise ValueError("ledgers were read by different models, but must belong to one")
            if any(first.positions) and other._version != first._version:
                raise ValueError(
                    f"ledgers were read at versions {first._version} and {other._version} of a model's weights, but must agree"
                )
        stacked = cls(first.config, sum(one.batch for one in ledgers), device=first.device, dtype=first.dtype)
        stacked._owner, stacked._version = first._owner, first._version
        stacked.lengths = [length for one in ledgers for length in one.lengths]
        stacked.positions = [position for one in ledgers for position in one.positions]
        stacked.unread = first.unread
        stacked._first_B = torch.cat([one._first_B for one in ledgers])
        stacked._read_B = torch.cat([one._read_B for one in ledgers])
        for own, *parts in zip(stacked._stores(), *(one._stores() for one in ledgers), strict=True):
            capacity = max(part.rows.shape[1] for part in parts)
            padded = [
                part.rows.new_zeros(part.rows.shape[0], capacity, *part.rows.shape[2:]) for part in parts
            ]
            for whole, part in zip(padded, parts, strict=True):
                whole[:, : part.rows.shape[1]] = part.rows
            own.rows = torch.cat(padded)
        return stacked

    @property
    def first_B(self) -> Tensor:
        """First position of this pass, of each sequence, int64 [B]."""
        return self._first_B

    def ahead(self, count: int) -> Tensor:
        """Return 0 .. count - 1, int64 on the ledger's device; to be read alone."""
        if count > len(self._numbers):
            return torch.arange(count, device=self.device)
        return self._numbers[:count]

    def summarise(self, logs: Sequence[GrowingRows], count: int) -> None:
        """Write the summaries of the blocks that the `count` positions of this pass complete, into the logs of some layers."""
        block = self.scheduler.sizes[0]
        for first in sorted(set(self.positions)):
            if (first + count) // block != first // block:
                here = [sequence for sequence, position in enumerate(self.positions) if position == first]
                is_all = len(here) == self.batch
                # A list would make the host wait for the device.
                sequences = self.ahead(self.batch) if is_all else torch.tensor(here, device=self.device)
                self._summarise(logs, sequences, first, first + count)

    def _summarise(self, logs: Sequence[GrowingRows], sequences: Tensor, first: int, end: int) -> None:
        """Write the summaries of the blocks that end within first .. end - 1, of some sequences."""
        scheduler, rotary_dim = self.scheduler, self.config.rotary_dim
        size = scheduler.log_size(end)
        for level, block in enumerate(scheduler.sizes):
            if end // block == first // block:
                # A larger block ends only where a smaller one does.
                return
            blocks = torch.arange(first // block, end // block, device=self.device)
            parts = scheduler.places_of_parts(level, blocks)
            places = scheduler.place_of_block(level, blocks).expand(len(sequences), -1)
            turns = turns_at(scheduler.middle(level, blocks), rotary_dim)
            for log in logs:
                rows = log.rows[sequences[:, None, None], parts, : log.rows.shape[-1] - rotary_dim]
                log.write(places, with_turned_key(mean_of_parts(rows), turns), size, sequences)

    def expect(self, count: int) -> None:
        """Note that this pass has `count` positions; refuse a layer or codes with another number of positions."""
        if self._pass is None:
            raise RuntimeError("the ledger was written to, but a pass must begin first")
        if self._pass.count not in (0, count):
            raise ValueError(
                f"a layer appends {count} positions, but this pass has {self._pass.count} in another one"
            )
        self._pass.count = count

    def seen(self, num_queries: int, skipped: int) -> Seen:
        """Return what the positions from first_B + skipped on see; all layers of a pass share it."""
        if self._pass is None:
            raise RuntimeError("the ledger was looked at, but a pass must begin first")
        found = self._pass.seen
        if (num_queries, skipped) not in found:
            first_B, voting = self._first_B, None if self._owner is None else self._owner()
            found[num_queries, skipped] = self.scheduler.seen(
                first_B + skipped if skipped else first_B, num_queries, None if voting is None else voting.ops
            )
        return found[num_queries, skipped]

    def _growing(self, shape: tuple[int, ...], dtype: torch.dtype) -> GrowingRows:
        return GrowingRows(self.batch, shape, dtype=dtype, device=self.device)

    def _stores(self) -> list[GrowingRows]:
        return [self._ids, self._codes, self._vectors, *self._logs]

    def _lengths_B1(self) -> Tensor:
        return (self._read_B + self.unread)[:, None]

    def _append(self, ids_BT: Tensor) -> None:
        count = ids_BT.shape[1]
        self._ids.write(self._lengths_B1() + self.ahead(count), ids_BT, len(self) + count)
        self.lengths = [length + count for length in self.lengths]
        self.unread += count

    def _roll_back(self) -> None:
        """Take back the additions of a pass that began and did not end."""
        if self._pass is not None:
            self.lengths, self.unread = self._pass.lengths, self._pass.unread
            # In place, where recorded passes read them. `follow` may have counted the pass.
            self._first_B.copy_(torch.tensor(self.positions))
            self._read_B.copy_(torch.tensor([length - self.unread for length in self.lengths]))
            self._pass = None


class _Pass:
    """A pass that has begun: the state to go back to if the pass does not end, and the results that its layers share."""

    def __init__(self, ledger: KVLedger) -> None:
        self.lengths, self.unread = ledger.lengths, ledger.unread
        self.count = 0
        self.seen: dict[tuple[int, int], Seen] = {}


class GrowingRows:
    """Rows of several sequences in one tensor [B, capacity, ...], whose capacity doubles when it is full."""

    def __init__(
        self, batch: int, shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.rows = torch.zeros(batch, 0, *shape, dtype=dtype, device=device)
        self._sequences_B1 = torch.arange(batch, device=device)[:, None]

    def reserve(self, size: int) -> None:
        """Make room for `size` rows of each sequence; new rows are 0."""
        capacity = self.rows.shape[1]
        if size > capacity:
            grown = self.rows.new_zeros(self.rows.shape[0], max(size, 2 * capacity), *self.rows.shape[2:])
            grown[:, :capacity] = self.rows
            self.rows = grown

    def write(self, places_BQ: Tensor, values: Tensor, size: int, sequences: Tensor | None = None) -> None:
        """Write values [B, Q, ...] to places below `size`, which differ; with `sequences` int64 [b], of those sequences only."""
        self.reserve(size)
        with in_any_order():
            self.rows[self._sequences_B1 if sequences is None else sequences[:, None], places_BQ] = values

    def read(self, places_BS: Tensor) -> Tensor:
        """Return the rows [B, S, ...] at places int64 [B, S]."""
        return self.rows[self._sequences_B1, places_BS]


class LayerLedger:
    """The log of rows that the attention of one layer keeps. `ContextAttentionScheduler` says in which order they are.

    A row is [rotary key; normed latent; rotary key turned to the row's position].
    """

    def __init__(self, ledger: KVLedger, log: GrowingRows) -> None:
        self.ledger, self.log = ledger, log
        self.rotary_dim = ledger.config.rotary_dim

    @property
    def first_B(self) -> Tensor:
        """First position of this pass, of each sequence, int64 [B]."""
        return self.ledger.first_B

    @property
    def is_empty(self) -> bool:
        """Whether no position of any sequence came before this pass."""
        return not any(self.ledger.positions)

    def append(self, rows_BPK: Tensor) -> None:
        """Write the rows of this pass, and the summaries of the blocks that they complete.

        A single position sees no block that it completes, because a block is seen once it lies before the window. The summaries of
        that block are left to the end of the pass, so that the pass launches the same kernels for every position.
        """
        ledger, scheduler, count = self.ledger, self.ledger.scheduler, rows_BPK.shape[1]
        ledger.expect(count)
        if count == 1:
            places_BP = self.seen(1).own_BQ
        else:
            places_BP = scheduler.place_of_position(ledger.first_B[:, None] + ledger.ahead(count))
        self.log.write(places_BP, rows_BPK.detach(), scheduler.log_size(max(ledger.positions) + count))
        if count > 1:
            ledger.summarise([self.log], count)

    def seen(self, num_queries: int, skipped: int = 0) -> Seen:
        """Return what the positions from first_B + skipped on see; all layers of a pass share it."""
        return self.ledger.seen(num_queries, skipped)


def mean_of_parts(parts_BncK: Tensor) -> Tensor:
    """Return the mean of the parts of each block, [B, blocks, K], summed in float32 or better."""
    wide = wide_dtype(parts_BncK)
    return parts_BncK.to(wide).mean(dim=2).to(parts_BncK.dtype)
