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
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from torch import Tensor

from arbitor.optimized.training.errors import TrainingError
from arbitor.optimized.training.whole_file import rename, told, write_beside
from arbitor.reference import checks
from arbitor.reference.types import TernaryWeight

if TYPE_CHECKING:
    from arbitor.reference.graph import ArbModel
    from arbitor.reference.types import LaidOutWeight

FORMAT_VERSION = 2
"""Version of the file format; another one is refused."""

METADATA_KEY = "arbitor"
"""Key of the safetensors header under which the JSON object stands."""

PARTS = ("packed", "exponents", "trit_accum", "exponent_accum")
"""The tensors of a weight, by their name in `TernaryWeight`."""

_DTYPE_CODES = {
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
}
"""The dtypes of weights and tables, all of them integers, as the format names them."""

State = Mapping[str, TernaryWeight | Tensor]
"""What ``ArbModel.state`` returns: weights in canonical form and integer tables, by name."""

_FIELD_TYPES: dict[str, Any] = {
    "config": dict,
    "step": int,
    "seed": int,
    "best_bpb": (int, float, type(None)),
    "run": dict,
    "progress": dict,
    "weights": dict,
    "tables": dict,
}
"""What the fields of the header must be."""


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


def load_checkpoint(path: Path) -> Checkpoint:
    """Return a checkpoint that was read and verified: structure, digests, shapes, and the integers of weights.

    What the integers of a table may be depends on the model, so that ``check_fits`` looks at them.

    Raises:
        CheckpointError: the file is missing, truncated, tampered with, of another format, or holds what no
            run can have written.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no checkpoint {str(path)!r}") from error
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"the checkpoint {str(path)!r} is damaged or not a safetensors file: {error}"
        ) from error
    try:
        return _verified(text, tensors)
    except CheckpointError as error:
        raise CheckpointError(f"the checkpoint {str(path)!r} is refused: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = str(error) or type(error).__name__
        raise CheckpointError(
            f"the checkpoint {str(path)!r} is refused: its header is malformed ({reason})"
        ) from error


def check_fits(checkpoint: Checkpoint, config: Mapping[str, Any], model: ArbModel) -> None:
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
    held: dict[str, LaidOutWeight | Tensor] = {
        **{name: module.weight for name, module in model.ternary_modules().items()},
        **model.tables(),
    }
    if checkpoint.state.keys() != held.keys():
        name = sorted(checkpoint.state.keys() ^ held.keys())[0]
        where = "there but not here" if name in checkpoint.state else "here but not there"
        raise CheckpointError(f"the checkpoint is of another model: {name!r} is {where}")
    for name, value in held.items():
        there, here = _layout(checkpoint.state[name]), _layout(value)
        if there != here:
            raise CheckpointError(
                f"the checkpoint is of another model: {name!r} is {there} there and {here} here"
            )
    for name, (low, high) in model.table_ranges().items():
        table = checkpoint.state[name]
        # Its layout is that of a table.
        assert isinstance(table, Tensor)
        with _refusing():
            checks.values_between(f"the checkpoint's {name}", table, low, high)


def _layout(value: LaidOutWeight | Tensor) -> dict[str, Any]:
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
        "weights": {name: _layout(value) for name, value in state.items() if not isinstance(value, Tensor)},
        "tables": {name: _layout(value) for name, value in state.items() if isinstance(value, Tensor)},
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


def _verified(text: str | None, tensors: dict[str, Tensor]) -> Checkpoint:
    if text is None:
        raise CheckpointError("it is a safetensors file, but not of this program")
    header = json.loads(text)
    if header["format"] != FORMAT_VERSION:
        raise CheckpointError(
            f"its format version is {header['format']!r} and this program reads {FORMAT_VERSION}"
        )
    if header["content_sha256"] != _content_sha256(header):
        raise CheckpointError("its header does not match its digest, so it was changed or damaged")
    for field, kinds in _FIELD_TYPES.items():
        if not isinstance(header[field], kinds) or isinstance(header[field], bool):
            raise CheckpointError(f"its header has {header[field]!r} for {field}")
    weights = {name: _weight(name, layout, tensors) for name, layout in header["weights"].items()}
    tables = {name: _table(name, layout, tensors) for name, layout in header["tables"].items()}
    if len(tensors) != len(PARTS) * len(weights) + len(tables):
        raise CheckpointError("it holds tensors that belong to no weight and are no table")
    if header["state_sha256"] != _tensors_sha256(tensors):
        raise CheckpointError("its tensors do not match their digest, so it was changed or damaged")
    return Checkpoint(
        state={**weights, **tables},
        config=header["config"],
        step=header["step"],
        seed=header["seed"],
        best_bpb=header["best_bpb"],
        run=header["run"],
        progress=header["progress"],
        state_sha256=header["state_sha256"],
    )


def _weight(name: str, layout: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> TernaryWeight:
    missing = [part for part in PARTS if f"{name}.{part}" not in tensors]
    if missing:
        raise CheckpointError(f"{name}.{missing[0]} is missing")
    num_rows, num_columns = layout["shape"]
    try:
        weight = TernaryWeight(
            packed=tensors[f"{name}.packed"],
            exponents=tensors[f"{name}.exponents"],
            trit_accum=tensors[f"{name}.trit_accum"],
            exponent_accum=tensors[f"{name}.exponent_accum"],
            shape=(num_rows, num_columns),
            group_size=layout["group_size"],
            mantissa_bits=layout["mantissa_bits"],
        )
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"the weight {name!r} does not have the shape its header states: {error}"
        ) from error
    with _refusing():
        for part, tensor in weight.tensors().items():
            weight.check_values(f"{name}.", part, tensor)
    return weight


def _table(name: str, layout: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Tensor:
    if name not in tensors:
        raise CheckpointError(f"{name} is missing")
    if _layout(tensors[name]) != dict(layout):
        raise CheckpointError(
            f"the table {name!r} is {_layout(tensors[name])}, but its header states {dict(layout)}"
        )
    return tensors[name]


@contextmanager
def _refusing() -> Iterator[None]:
    """Refuse a checkpoint whose values a check refuses."""
    try:
        yield
    except ValueError as error:
        raise CheckpointError(str(error)) from error
