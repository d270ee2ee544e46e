"""Checkpoints: the integers of a run in one safetensors file, written atomically and read with suspicion.

A file holds the canonical form of every weight as ``<name>.packed``, ``.exponents``, ``.trit_accum`` and
``.exponent_accum``, every integer table (counters, neighbours) under its name, and one JSON object in the header under
``arbitor``: format version, model configuration, step, seed, best bits per byte, the settings of the run, the shape of
every weight and table, the rules by which its parts learned (`changed_rules`), and two digests. Where the model has adapters,
their floats stand beside the integers (`adapter_state`). ``state_sha256`` is over the tensors alone (two runs that agree in it hold
the same model); ``content_sha256`` is over everything else in the object, that digest included.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from torch import Tensor

from arbitor.optimized.training.adapter_state import AdapterState, names_of, state_from
from arbitor.optimized.training.errors import TrainingError
from arbitor.optimized.training.machine_memory import is_full
from arbitor.optimized.training.regular import open_regular
from arbitor.optimized.training.tensor_file import (
    DamagedFileError,
    Entries,
    bytes_of,
    read_entries,
    read_tensor,
    write_safetensors,
)
from arbitor.optimized.training.whole_file import rename, told, write_beside
from arbitor.reference import checks
from arbitor.reference.constants import BESIDE_TRITS
from arbitor.reference.graph.changed_rules import refuse_other_rules, rules_of
from arbitor.reference.json_text import parsed_json
from arbitor.reference.types import TernaryWeight

if TYPE_CHECKING:
    from arbitor.reference.graph.stateful import Stateful
    from arbitor.reference.types import LaidOutWeight

FORMAT_VERSION = 3
"""Version of the file format; another one is refused."""

OTHER_VERSION = "another version of this program wrote it, and can go on with it"
"""What a refusal says of a file that is sound, and holds what this program has no rule for."""

METADATA_KEY = "arbitor"
"""Key of the safetensors header under which the JSON object stands."""

PARTS = ("packed", *BESIDE_TRITS)
"""The tensors of a weight, by their name in `TernaryWeight`."""

State = Mapping[str, TernaryWeight | Tensor]
"""What ``ArbModel.state`` returns: weights in canonical form and integer tables, by name."""

HeaderCheck = Callable[[Mapping[str, Any]], object]
"""What refuses a header, with a CheckpointError, before any tensor is read."""

_FIELD_TYPES: dict[str, Any] = {
    "format": int,
    "config": dict,
    "step": int,
    "seed": int,
    "best_bpb": (int, float, type(None)),
    "run": dict,
    "progress": dict,
    "weights": dict,
    "tables": dict,
    "state_sha256": str,
    "content_sha256": str,
}
"""The fields of the header, and what they must be."""


class CheckpointError(TrainingError):
    """A checkpoint that cannot be trusted, or that belongs to something else."""


class OtherRulesError(CheckpointError):
    """A checkpoint that is sound, with a part that learned by other rules than those of this program."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as read and verified.

    Attributes:
        state: weights in canonical form and integer tables by name, on the CPU.
        config: the model configuration as JSON data.
        step: optimisation steps taken.
        seed: the seed of the run.
        best_bpb: lowest validation bits per byte so far, or None before the first validation.
        run: the settings of the run as JSON data; what a resumed run must agree with.
        progress: counters that a resumed run carries on, as JSON data.
        state_sha256: hex digest over the state.
        other_rules: a sentence for each part that learned by other rules, by name; see `load_checkpoint`.
        adapter: floats of adapters beside the state, or None for a model without them.
    """

    state: dict[str, TernaryWeight | Tensor]
    config: dict[str, Any]
    step: int
    seed: int
    best_bpb: float | None
    run: dict[str, Any]
    progress: dict[str, Any]
    state_sha256: str
    other_rules: Mapping[str, str]
    adapter: AdapterState | None = None


def state_sha256(state: State) -> str:
    """Return the digest of a model's state: every tensor's name, dtype, shape and bytes, in order of name.

    Args:
        state: as of ``ArbModel.state``, on any device.

    Returns:
        64 hexadecimal digits.
    """
    return _tensors_sha256(_named_tensors(state))


def adapter_sha256(adapter: AdapterState) -> str:
    """Return the digest of the floats of adapters and of what AdamW keeps for them, made as `state_sha256` is."""
    return _tensors_sha256(_on_cpu(adapter.tensors()))


def save_checkpoint(
    path: Path,
    state: State,
    *,
    config: Mapping[str, Any],
    step: int,
    seed: int,
    best_bpb: float | None,
    run: Mapping[str, Any],
    progress: Mapping[str, Any],
    adapter: AdapterState | None = None,
) -> str:
    """Write a checkpoint so that ``path`` holds what it held before or all of the new one, never a part.

    Returns:
        The ``state_sha256`` of what was written.

    Raises:
        TrainingError: the disk is full or cannot be written; ``path`` is as before and nothing is left beside
            it.
    """
    temporary, digest = write_checkpoint_beside(
        path,
        state,
        config=config,
        step=step,
        seed=seed,
        best_bpb=best_bpb,
        run=run,
        progress=progress,
        adapter=adapter,
    )
    put_checkpoint(temporary, path)
    return digest


def load_checkpoint(path: Path, check: HeaderCheck | None = None, *, any_rules: bool = False) -> Checkpoint:
    """Return a checkpoint that was read and verified: structure, digests, shapes, and the integers of weights.

    The header is read first, and no memory is taken for tensors that do not fit it. What the integers of a table may be
    depends on the model, so that ``check_fits`` looks at them.

    Args:
        path: the file.
        check: what else the header must hold.
        any_rules: whether parts that learned by other rules than those here are returned, for `Checkpoint.other_rules` to tell.

    Raises:
        OtherRulesError: there is such a part, and ``any_rules`` is False.
        CheckpointError: the file is missing, truncated, tampered with, of another format, or holds what no
            run can have written.
    """
    with _told_of(path):
        with open_regular(path) as file:
            header, entries = _checked_header(file, check)
            if not any_rules:
                for reason in _other_rules(header).values():
                    raise OtherRulesError(
                        f"{reason}; arb train --init-from begins a run with its other parts"
                    )
            # Shapes are looked at where they take no memory.
            shapes = {
                name: torch.empty(shape, dtype=dtype, device="meta")
                for name, (dtype, shape) in entries.items()
            }
            _state(header, shapes)
            _adapter(header, shapes)
            tensors = {name: read_tensor(file, dtype, shape) for name, (dtype, shape) in entries.items()}
        return _verified(header, tensors)


def load_header(path: Path, check: HeaderCheck | None = None) -> dict[str, Any]:
    """Return the header of a checkpoint, verified but for the digest of the tensors, which are not read.

    Args:
        path, check: as for `load_checkpoint`.

    Raises:
        CheckpointError: as `load_checkpoint`.
    """
    with _told_of(path), open_regular(path) as file:
        return _checked_header(file, check)[0]


def _checked_header(file: IO[bytes], check: HeaderCheck | None) -> tuple[dict[str, Any], Entries]:
    """Return the header of a file and the entries of its tensors, which are left to read."""
    text, entries = read_entries(file, METADATA_KEY)
    header = _verified_header(text)
    if check is not None:
        check(header)
    return header, entries


@contextmanager
def _told_of(path: Path) -> Iterator[None]:
    """Turn whatever reading a checkpoint raises within the block into one sentence."""
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no checkpoint {str(path)!r}") from error
    except CheckpointError as error:
        raise type(error)(f"the checkpoint {str(path)!r} is refused: {error}") from error
    except (OSError, DamagedFileError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise CheckpointError(
            f"the checkpoint {str(path)!r} is damaged or not a safetensors file: {reason}"
        ) from error
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        OverflowError,
        RuntimeError,
        MemoryError,
    ) as error:
        if is_full(error):
            raise CheckpointError(f"the checkpoint {str(path)!r} needs more memory than there is") from error
        reason = (str(error) or type(error).__name__).split("\n")[0]
        raise CheckpointError(
            f"the checkpoint {str(path)!r} is refused: its header is malformed ({reason})"
        ) from error


def check_fits(checkpoint: Checkpoint, model: Stateful) -> None:
    """Refuse a checkpoint of another model, or with tables that no model can have, before anything of it is used.

    Args:
        checkpoint: as read.
        model: what it should fit; only the layout of its weights and tables is looked at.

    Raises:
        CheckpointError: a name, a shape or a group size differs, or an integer of a table is out of its range; the message
            names it.
    """
    check_layouts({name: layout(value) for name, value in checkpoint.state.items()}, model)
    for name, (low, high) in model.table_ranges().items():
        table = checkpoint.state[name]
        # Its layout is that of a table.
        assert isinstance(table, Tensor)
        with _refusing():
            checks.values_between(f"the checkpoint's {name}", table, low, high)


def check_layouts(theirs: Mapping[str, Mapping[str, Any]], model: Stateful) -> None:
    """Refuse weights and tables of another model by their layouts.

    Args:
        theirs: a layout for each name, as a header has them.
        model: what they should fit; it may be on the meta device.

    Raises:
        CheckpointError: a name, a shape, a dtype or a group size differs; the message names it.
    """
    held: dict[str, LaidOutWeight | Tensor] = {
        **{name: module.weight for name, module in model.ternary_modules().items()},
        **model.tables(),
    }
    if theirs.keys() != held.keys():
        name = sorted(theirs.keys() ^ held.keys())[0]
        where = "there but not here" if name in theirs else "here but not there"
        raise CheckpointError(f"the checkpoint is of another model: {name!r} is {where}")
    for name, value in held.items():
        there, here = theirs[name], layout(value)
        if there != here:
            raise CheckpointError(
                f"the checkpoint is of another model: {name!r} is {there} there and {here} here"
            )


def layout(value: LaidOutWeight | Tensor) -> dict[str, Any]:
    """Return how a weight or a table is laid out, as a header says it."""
    if isinstance(value, Tensor):
        return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    return {
        "shape": list(value.shape),
        "group_size": value.group_size,
        "mantissa_bits": value.mantissa_bits,
    }


def _named_tensors(state: State) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    for name, value in state.items():
        if isinstance(value, Tensor):
            named[name] = value
        else:
            named |= {f"{name}.{part}": tensor for part, tensor in value.tensors().items()}
    return _on_cpu(named)


def _on_cpu(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu").contiguous() for name, tensor in named.items()}


def _tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}\n".encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()


def _canonical_json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _content_sha256(metadata: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in metadata.items() if key != "content_sha256"}
    return hashlib.sha256(_canonical_json(rest).encode()).hexdigest()


def write_checkpoint_beside(
    path: Path, state: State, *, adapter: AdapterState | None = None, **metadata: Any
) -> tuple[Path, str]:
    """Write a checkpoint beside its place, and flush it to the disk.

    Args:
        path: where it belongs.
        state: as of ``ArbModel.state``.
        adapter: floats to write beside it.
        metadata: as for ``save_checkpoint``.

    Returns:
        The file written, for ``put_checkpoint``, and its ``state_sha256``.

    Raises:
        TrainingError: the disk is full or cannot be written; nothing is left.
    """
    tensors = _named_tensors(state)
    digest = _tensors_sha256(tensors)
    header: dict[str, Any] = {
        "format": FORMAT_VERSION,
        **{key: dict(value) if isinstance(value, Mapping) else value for key, value in metadata.items()},
        "weights": {name: layout(value) for name, value in state.items() if not isinstance(value, Tensor)},
        "tables": {name: layout(value) for name, value in state.items() if isinstance(value, Tensor)},
        "rules": rules_of(state),
        "state_sha256": digest,
    }
    if adapter is not None:
        floats = _on_cpu(adapter.tensors())
        header["adapter"] = adapter.header(_tensors_sha256(floats))
        tensors |= floats
    header["content_sha256"] = _content_sha256(header)
    with _writing(path):
        temporary = write_beside(
            path, lambda file: write_safetensors(file, tensors, {METADATA_KEY: _canonical_json(header)})
        )
    return temporary, digest


def put_checkpoint(source: Path, target: Path) -> None:
    """Rename a checkpoint over another.

    Raises:
        TrainingError: it cannot be done.
    """
    with _writing(target):
        rename(source, target)


def _writing(path: Path) -> AbstractContextManager[None]:
    return told(f"the checkpoint {str(path)!r}", "; the checkpoints written before are intact")


def _verified_header(text: Any) -> dict[str, Any]:
    """Return the header from its JSON text: of this format, with every field, and as it was written."""
    if not isinstance(text, str):
        raise CheckpointError("it is a safetensors file, but no checkpoint")
    header = parsed_json(text)
    if not isinstance(header, dict):
        raise CheckpointError("its header is no object")
    if header.get("format", FORMAT_VERSION) != FORMAT_VERSION:
        raise CheckpointError(
            f"its format version is {header['format']!r} and this program reads {FORMAT_VERSION}; {OTHER_VERSION}"
        )
    for field, kinds in _FIELD_TYPES.items():
        if field not in header:
            raise CheckpointError(f"its header has no {field}")
        if not isinstance(header[field], kinds) or isinstance(header[field], bool):
            raise CheckpointError(f"its header has {header[field]!r} for {field}")
    if header["content_sha256"] != _content_sha256(header):
        raise CheckpointError("its header does not match its digest, so it was changed or damaged")
    for field, low in (("step", 0), ("seed", 0), ("best_bpb", 0)):
        if header[field] is not None and header[field] < low:
            raise CheckpointError(f"its header has {header[field]!r} for {field}, but it is at least {low}")
    return header


def _state(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, TernaryWeight | Tensor]:
    """Return weights and tables as the header lays them out; tensors on the meta device are welcome."""
    weights = {name: _weight(name, stated, tensors) for name, stated in header["weights"].items()}
    tables = {name: _table(name, stated, tensors) for name, stated in header["tables"].items()}
    if len(tensors) != len(PARTS) * len(weights) + len(tables) + len(_floats(header)):
        raise CheckpointError("it holds tensors that belong to no weight and are no table")
    return {**weights, **tables}


def _other_rules(header: Mapping[str, Any]) -> dict[str, str]:
    """Return a sentence for each part that learned by other rules than those here. Old headers name none."""
    stated, found = header.get("rules", {}), {}
    rules = rules_of((*header["weights"], *header["tables"]))
    for part in sorted(rules.keys() | stated.keys()):
        try:
            refuse_other_rules(f"its {part}", rules.get(part, ()), stated.get(part, ()))
        except ValueError as error:
            found[part] = str(error)
    return found


def _floats(header: Mapping[str, Any]) -> list[str]:
    """Return the names of the floats that a header states."""
    return names_of(header["adapter"]) if "adapter" in header else []


def _adapter(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> AdapterState | None:
    """Return the floats of the adapters that a header states, or None; tensors on the meta device are welcome."""
    if "adapter" not in header:
        return None
    for name in _floats(header):
        if name not in tensors:
            raise CheckpointError(f"{name} is missing")
    with _refusing():
        return state_from(header["adapter"], tensors)


def _verified(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Checkpoint:
    floats = {name: tensors[name] for name in _floats(header)}
    integers = {name: tensor for name, tensor in tensors.items() if name not in floats}
    matches = header["state_sha256"] == _tensors_sha256(integers)
    if not matches or (floats and header["adapter"]["sha256"] != _tensors_sha256(floats)):
        raise CheckpointError("its tensors do not match their digest, so it was changed or damaged")
    state = _state(header, tensors)
    for name, value in state.items():
        if isinstance(value, TernaryWeight):
            with _refusing():
                for part, tensor in value.tensors().items():
                    value.check_values(f"{name}.", part, tensor)
    return Checkpoint(
        state=state,
        config=header["config"],
        step=header["step"],
        seed=header["seed"],
        best_bpb=header["best_bpb"],
        run=header["run"],
        progress=header["progress"],
        state_sha256=header["state_sha256"],
        other_rules=_other_rules(header),
        adapter=_adapter(header, tensors),
    )


def _weight(name: str, stated: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> TernaryWeight:
    missing = [part for part in PARTS if f"{name}.{part}" not in tensors]
    if missing:
        raise CheckpointError(f"{name}.{missing[0]} is missing")
    num_rows, num_columns = stated["shape"]
    try:
        return TernaryWeight(
            packed=tensors[f"{name}.packed"],
            exponents=tensors[f"{name}.exponents"],
            trit_accum=tensors[f"{name}.trit_accum"],
            exponent_accum=tensors[f"{name}.exponent_accum"],
            shape=(num_rows, num_columns),
            group_size=stated["group_size"],
            mantissa_bits=stated["mantissa_bits"],
        )
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"the weight {name!r} does not have the shape its header states: {error}"
        ) from error


def _table(name: str, stated: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Tensor:
    if name not in tensors:
        raise CheckpointError(f"{name} is missing")
    if layout(tensors[name]) != dict(stated):
        raise CheckpointError(
            f"the table {name!r} is {layout(tensors[name])}, but its header states {dict(stated)}"
        )
    return tensors[name]


@contextmanager
def _refusing() -> Iterator[None]:
    """Refuse a checkpoint whose values a check refuses."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise CheckpointError(str(error)) from error
