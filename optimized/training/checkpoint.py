"""Checkpoints: the integers of a run in one safetensors file, written atomically and read with suspicion.

A file holds the canonical form of every weight as ``<name>.packed``, ``.exponents``, ``.trit_accum`` and
``.exponent_accum``, every integer table (counters, neighbours) under its name, and one JSON object in the header under
``arbitor``: format version, model configuration, step, seed, best bits per byte, the settings of the run, the shape of
every weight and table, and two digests.
``state_sha256`` is over the tensors alone (two runs that agree in it hold the same model); ``content_sha256``
is over everything else in the object, that digest included.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from torch import Tensor

from arbitor.optimized.training.errors import TrainingError
from arbitor.optimized.training.regular import open_regular
from arbitor.optimized.training.whole_file import rename, told, write_beside
from arbitor.reference import checks
from arbitor.reference.config import parsed_json
from arbitor.reference.types import TernaryWeight

if TYPE_CHECKING:
    from arbitor.reference.graph.stateful import Stateful
    from arbitor.reference.types import LaidOutWeight

FORMAT_VERSION = 2
"""Version of the file format; another one is refused."""

METADATA_KEY = "arbitor"
"""Key of the safetensors header under which the JSON object stands."""

PARTS = ("packed", "exponents", "trit_accum", "exponent_accum")
"""The tensors of a weight, by their name in `TernaryWeight`."""

HEADER_BYTES = 2**26
"""Bytes of a header at most: one with ten thousand weights has some three million."""

_DTYPE_CODES = {
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
}
"""The dtypes of weights and tables, all of them integers, as the format names them."""

_DTYPES = {code: dtype for dtype, code in _DTYPE_CODES.items()}
"""The same, the other way round."""

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
    """

    state: dict[str, TernaryWeight | Tensor]
    config: dict[str, Any]
    step: int
    seed: int
    best_bpb: float | None
    run: dict[str, Any]
    progress: dict[str, Any]
    state_sha256: str


def state_sha256(state: State) -> str:
    """Return the digest of a model's state: every tensor's name, dtype, shape and bytes, in order of name.

    Args:
        state: as of ``ArbModel.state``, on any device.

    Returns:
        64 hexadecimal digits.
    """
    return _tensors_sha256(_named_tensors(state))


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
) -> str:
    """Write a checkpoint so that ``path`` holds what it held before or all of the new one, never a part.

    Returns:
        The ``state_sha256`` of what was written.

    Raises:
        TrainingError: the disk is full or cannot be written; ``path`` is as before and nothing is left beside
            it.
    """
    temporary, digest = write_checkpoint_beside(
        path, state, config=config, step=step, seed=seed, best_bpb=best_bpb, run=run, progress=progress
    )
    put_checkpoint(temporary, path)
    return digest


def load_checkpoint(path: Path, check: HeaderCheck | None = None) -> Checkpoint:
    """Return a checkpoint that was read and verified: structure, digests, shapes, and the integers of weights.

    The header is read first, and no memory is taken for tensors that do not fit it. What the integers of a table may be
    depends on the model, so that ``check_fits`` looks at them.

    Args:
        path: the file.
        check: what else the header must hold.

    Raises:
        CheckpointError: the file is missing, truncated, tampered with, of another format, or holds what no
            run can have written.
    """
    with _told_of(path):
        with open_regular(path) as file:
            header, entries = _checked_header(file, check)
            # Shapes are looked at where they take no memory.
            shapes = {
                name: torch.empty(shape, dtype=dtype, device="meta")
                for name, (dtype, shape) in entries.items()
            }
            _state(header, shapes)
            tensors = {name: _read_tensor(file, dtype, shape) for name, (dtype, shape) in entries.items()}
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
    text, entries = _read_entries(file)
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
        raise CheckpointError(f"the checkpoint {str(path)!r} is refused: {error}") from error
    except (OSError, _Damaged) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise CheckpointError(
            f"the checkpoint {str(path)!r} is damaged or not a safetensors file: {reason}"
        ) from error
    except MemoryError as error:
        raise CheckpointError(f"the checkpoint {str(path)!r} needs more memory than there is") from error
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).split("\n")[0]
        raise CheckpointError(
            f"the checkpoint {str(path)!r} is refused: its header is malformed ({reason})"
        ) from error


def check_fits(checkpoint: Checkpoint, config: Mapping[str, Any], model: Stateful) -> None:
    """Refuse a checkpoint of another model, or with tables that no model can have, before anything of it is used.

    Args:
        checkpoint: as read.
        config: configuration of the model it should fit, as JSON data.
        model: that model; only the layout of its weights and tables is looked at.

    Raises:
        CheckpointError: a field of the configuration, a name, a shape or a group size differs, or an integer
            of a table is out of its range; the message names it.
    """
    theirs = json.loads(json.dumps(checkpoint.config))
    ours = json.loads(json.dumps(dict(config)))
    for field in sorted(theirs.keys() | ours.keys()):
        if theirs.get(field) != ours.get(field):
            raise CheckpointError(
                f"the checkpoint is of another model: {field} is {theirs.get(field)!r} there "
                f"and {ours.get(field)!r} here"
            )
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
    return {name: tensor.detach().to("cpu").contiguous() for name, tensor in named.items()}


def _tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}\n".encode())
        digest.update(_bytes_of(tensor))
    return digest.hexdigest()


def _canonical_json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _content_sha256(metadata: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in metadata.items() if key != "content_sha256"}
    return hashlib.sha256(_canonical_json(rest).encode()).hexdigest()


def write_checkpoint_beside(path: Path, state: State, **metadata: Any) -> tuple[Path, str]:
    """Write a checkpoint beside its place, and flush it to the disk.

    Args:
        path: where it belongs.
        state: as of ``ArbModel.state``.
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
        "state_sha256": digest,
    }
    header["content_sha256"] = _content_sha256(header)
    with _writing(path):
        temporary = write_beside(
            path, lambda file: _write_safetensors(file, tensors, {METADATA_KEY: _canonical_json(header)})
        )
    return temporary, digest


def put_checkpoint(source: Path, target: Path) -> None:
    """Rename a checkpoint over another.

    Raises:
        TrainingError: it cannot be done.
    """
    with _writing(target):
        rename(source, target)


def _write_safetensors(file: IO[bytes], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors one after the other, so that a model is never held twice.

    The library's own writer makes a temporary file of a random name, which a killed run would leave behind.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        end = offset + tensor.nbytes
        header[name] = {
            "dtype": _DTYPE_CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for name in sorted(tensors):
        file.write(_bytes_of(tensors[name]))


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.numpy().data).cast("B")


def _writing(path: Path) -> AbstractContextManager[None]:
    return told(f"the checkpoint {str(path)!r}", "; the checkpoints written before are intact")


class _Damaged(Exception):
    """A file that is no safetensors file, or a part of one."""


Entries = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Dtype and shape of the tensors of a file, by name, in the order of their bytes."""


def _read_entries(file: IO[bytes]) -> tuple[str | None, Entries]:
    """Return our JSON text and the entries of a safetensors file; its tensors are what is left to read.

    Raises:
        _Damaged: it is none. Entries must lie one after the other, and end where the file ends.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(HEADER_BYTES, size - 8):
        raise _Damaged(f"its header would have {length:,} bytes, in a file of {size:,}")
    try:
        header = parsed_json(file.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header is no object")
        metadata = header.pop("__metadata__", {})
        text = metadata.get(METADATA_KEY)
        entries: Entries = {}
        place = 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            shape, (start, end) = tuple(entry["shape"]), entry["data_offsets"]
            if not all(type(number) is int and number >= 0 for number in (*shape, start, end)):
                raise ValueError(f"the tensor {name!r} has numbers that are no sizes")
            dtype = _DTYPES.get(entry["dtype"])
            if dtype is None:
                # Of another program: it is not read.
                return None, {}
            if start != place or end - start != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"the tensor {name!r} is not where it should be")
            entries[name] = dtype, shape
            place = end
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _Damaged(str(error) or type(error).__name__) from error
    if 8 + length + place != size:
        raise _Damaged(f"it has {size:,} bytes, but its header says {8 + length + place:,}")
    return text, entries


def _read_tensor(file: IO[bytes], dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Read a tensor into memory of its own, so that a model is never held twice."""
    tensor = torch.empty(shape, dtype=dtype)
    if tensor.numel() and file.readinto(_bytes_of(tensor)) != tensor.nbytes:  # type: ignore[attr-defined]
        raise _Damaged("it ends before its last tensor does")
    return tensor


def _verified_header(text: Any) -> dict[str, Any]:
    """Return the header from its JSON text: of this format, with every field, and as it was written."""
    if not isinstance(text, str):
        raise CheckpointError("it is a safetensors file, but not of this program")
    header = parsed_json(text)
    if not isinstance(header, dict):
        raise CheckpointError("its header is no object")
    if header.get("format", FORMAT_VERSION) != FORMAT_VERSION:
        raise CheckpointError(
            f"its format version is {header['format']!r} and this program reads {FORMAT_VERSION}"
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
    if len(tensors) != len(PARTS) * len(weights) + len(tables):
        raise CheckpointError("it holds tensors that belong to no weight and are no table")
    return {**weights, **tables}


def _verified(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Checkpoint:
    if header["state_sha256"] != _tensors_sha256(tensors):
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
    except ValueError as error:
        raise CheckpointError(str(error)) from error
