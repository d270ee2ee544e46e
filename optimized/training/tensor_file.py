"""Safetensors files in pieces: written one tensor after the other, and read entry by entry before any tensor takes memory.

The library's own writer makes a temporary file of a random name, which a killed run would leave behind, and its reader holds a
file twice.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from typing import IO, Any

import torch
from torch import Tensor

from arbitor.reference.json_text import parsed_json

HEADER_BYTES = 2**26
"""Bytes of a header at most: one with ten thousand weights has some three million."""

_DTYPE_CODES = {
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float32: "F32",
}
"""The dtypes of weights and tables, all of them integers, and that of adapters, as the format names them."""

_DTYPES = {code: dtype for dtype, code in _DTYPE_CODES.items()}
"""The same, the other way round."""

Entries = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Dtype and shape of the tensors of a file, by name, in the order of their bytes."""


class DamagedFileError(Exception):
    """A file that is no safetensors file, or a part of one."""


def write_safetensors(file: IO[bytes], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write CPU tensors into a safetensors file, one after the other, so that a model is never held twice.

    Args:
        file: open for writing, at its start.
        tensors: contiguous, of a dtype that weights, tables or adapters have.
        metadata: texts that the header holds beside them.
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
        file.write(bytes_of(tensors[name]))


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, not copied."""
    return memoryview(tensor.numpy().data).cast("B")


def read_entries(file: IO[bytes], key: str) -> tuple[Any, Entries]:
    """Return what a safetensors file says under a key of its metadata, and its entries; its tensors are what is left to read.

    Raises:
        DamagedFileError: it is none. Entries must lie one after the other, and end where the file ends.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if length > HEADER_BYTES:
        raise DamagedFileError("it does not begin as one")
    if size < 8 or length > size - 8:
        raise DamagedFileError(f"its header would have {length:,} bytes, in a file of {size:,}")
    try:
        header = parsed_json(file.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header is no object")
        metadata = header.pop("__metadata__", {})
        text = metadata.get(key)
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
        raise DamagedFileError(str(error) or type(error).__name__) from error
    if 8 + length + place != size:
        raise DamagedFileError(f"it has {size:,} bytes, but its header says {8 + length + place:,}")
    return text, entries


def read_tensor(file: IO[bytes], dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Read a tensor into memory of its own, so that a model is never held twice."""
    tensor = torch.empty(shape, dtype=dtype)
    if tensor.numel() and file.readinto(bytes_of(tensor)) != tensor.nbytes:  # type: ignore[attr-defined]
        raise DamagedFileError("it ends before its last tensor does")
    return tensor
