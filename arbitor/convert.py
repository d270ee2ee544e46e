"""Float matrices become ternary weights by least squares, and ternary weights become float matrices again.

    python -m arbitor.convert model.safetensors ternary.safetensors            # prints the error of each matrix
    python -m arbitor.convert --back ternary.safetensors model.safetensors

The same in Python: `ternarize` takes a matrix, `ternarize_all` a state dict, `arbitor.nn.swap_linears` a module, and `convert_file`
a file. Back go `dequantize`, `swap_back` and `restore_file`. docs/spec/convert.md has the rule.

A converted file is a safetensors file. A matrix NAME stands there as NAME.packed and NAME.exponents, the canonical form of its
trits and scales. All other tensors are as they were. The metadata `arbitor.ternary` says the shape, the dtype and the format of
each matrix.

Legend: N rows, K columns.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import click
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from arbitor.nn import Linear, swap_linears
from arbitor.optimized.cli import run_command
from arbitor.optimized.commands.command import Command
from arbitor.optimized.commands.parameters import FilePath
from arbitor.optimized.training.errors import TrainingError
from arbitor.optimized.training.regular import open_regular
from arbitor.optimized.training.shown import shown
from arbitor.optimized.training.whole_file import told, write_whole
from arbitor.reference.constants import (
    DEFAULT_GROUP_SIZE,
    DEFAULT_MANTISSA_BITS,
    GROUP_SIZES,
    MANTISSA_BITS,
    packed_bytes,
)
from arbitor.reference.convert import Loss, loss_of, ternarize, ternarize_all
from arbitor.reference.json_text import parsed_json
from arbitor.reference.ops.scale import dequantize
from arbitor.reference.types import TernaryWeight

__all__ = [
    "Loss",
    "convert_file",
    "dequantize",
    "loss_of",
    "restore_file",
    "swap_back",
    "swap_linears",
    "ternarize",
    "ternarize_all",
]

METADATA = "arbitor.ternary"
"""Key of the metadata under which a converted file says what is ternary in it."""

PARTS = ("packed", "exponents")
"""The tensors of a converted matrix. Its votes are empty, and take no room."""

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float16)
}
"""Dtypes of matrices that can be converted, by name."""

FileName = str | PathLike[str]
"""How a file is named."""


def convert_file(
    source: FileName,
    target: FileName,
    *,
    group_size: int = DEFAULT_GROUP_SIZE,
    mantissa_bits: int = DEFAULT_MANTISSA_BITS,
    select: Callable[[str], bool] | None = None,
) -> dict[str, Loss]:
    """Write a safetensors file with its matrices ternary, and return what each of them lost, by name.

    A tensor of more than two dimensions is taken as rows, as a convolution's weight is. Matrices are read one after the other.

    Args:
        source: file to read.
        target: file to write, which is replaced whole or not at all.
        group_size: columns that share a scale.
        mantissa_bits: bits of a scale below its power of two.
        select: which of the float tensors of two dimensions or more become ternary, by name; None: all.

    Raises:
        TrainingError: a file cannot be read or written, or the source is no safetensors file.
        TypeError, ValueError: source and target are one file, or no names; a matrix has an element that is not finite, no matrix is
            selected, or the format is not allowed.
    """
    if select is not None and not callable(select):
        raise TypeError(f"select is a {type(select).__name__}, but must be a function of a name")
    source, target = _two_files(source, target)
    tensors: dict[str, Tensor] = {}
    stated: dict[str, Any] = {}
    losses: dict[str, Loss] = {}
    for name, tensor in _tensors(Path(source)):
        is_matrix = tensor.ndim >= 2 and tensor.dtype in DTYPES.values() and tensor.numel() > 0
        if not is_matrix or not (select is None or select(name)):
            _add(tensors, name, tensor)
            continue
        # The format computes in float32 and wider.
        w_NK = tensor.flatten(1)
        w_NK = w_NK.float() if w_NK.dtype == torch.float16 else w_NK
        weights, lost = ternarize_all({name: w_NK}, group_size=group_size, mantissa_bits=mantissa_bits)
        losses |= lost
        for part in PARTS:
            _add(tensors, f"{name}.{part}", getattr(weights[name], part))
        stated[name] = {
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "group_size": group_size,
            "mantissa_bits": mantissa_bits,
        }
    if not losses:
        raise ValueError(f"{str(source)!r} has no float matrix that is selected, but must have at least one")
    _write(Path(target), tensors, {METADATA: json.dumps(stated)})
    return losses


def restore_file(source: FileName, target: FileName) -> list[str]:
    """Write a file that `convert_file` wrote with its matrices in float, of the dtypes they had; return their names.

    A matrix has the values that its trits and scales say. Converted again in the same format, it gives the same trits and scales;
    float16 may be too narrow for small ones.

    Raises:
        TrainingError: a file cannot be read or written, or the source is no converted file.
        TypeError, ValueError: source and target are one file, or no names.
    """
    path, target = _two_files(source, target)
    stated = _stated(path)
    tensors = dict(_tensors(path))
    for name, layout in stated.items():
        try:
            packed, exponents = (tensors.pop(f"{name}.{part}") for part in PARTS)
            shape = tuple(layout["shape"])
            matrix = (shape[0], math.prod(shape[1:]))
            # Before memory is taken for a shape that somebody made up.
            if packed.numel() != packed_bytes(math.prod(matrix)):
                raise ValueError(f"its trits are {packed.numel():,} bytes, which is not {shape}")
            weight = TernaryWeight(
                packed=packed,
                exponents=exponents,
                trit_accum=torch.zeros(matrix, dtype=torch.int8),
                exponent_accum=torch.zeros_like(exponents),
                shape=matrix,
                group_size=layout["group_size"],
                mantissa_bits=layout["mantissa_bits"],
            )
            for part in PARTS:
                weight.check_values("", part, getattr(weight, part))
            dtype = DTYPES[layout["dtype"]]
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            reason = str(error).split("\n")[0] or type(error).__name__
            raise TrainingError(
                f"the file {str(path)!r} is refused: {name!r} is no ternary matrix ({reason})"
            ) from None
        wide = dequantize(weight, dtype=torch.float64)
        tensors[name] = wide.to(dtype).reshape(shape)
    _write(Path(target), tensors, {"format": "pt"})
    return list(stated)


def swap_back(module: torch.nn.Module) -> list[str]:
    """Replace every `arbitor.nn.Linear` below a module by a `torch.nn.Linear` with the same weight; return their names.

    Raises TypeError for what is no module, ValueError where there is none of them.
    """
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"module is a {type(module).__name__}, but must be a torch.nn.Module")
    chosen = {
        name: part
        for name, part in module.named_modules(remove_duplicate=False)
        if type(part) is Linear and name
    }
    if not chosen:
        raise ValueError("module has no arbitor.nn.Linear below it, but must have at least one")
    made: dict[Linear, torch.nn.Linear] = {}
    for name, part in chosen.items():
        if part not in made:
            made[part] = _float_linear(part)
        parent, _, last = name.rpartition(".")
        setattr(module.get_submodule(parent), last, made[part])
    return list(chosen)


def _float_linear(layer: Linear) -> torch.nn.Linear:
    w_NK = dequantize(layer.ops.to_spec(layer.weight).to("cpu"), dtype=torch.float64)
    linear = torch.nn.Linear(
        layer.in_features,
        layer.out_features,
        layer.bias is not None,
        device=layer.context.device,
        dtype=layer.context.dtype,
    )
    with torch.no_grad():
        linear.weight.copy_(w_NK)
    if layer.bias is not None:
        linear.bias = layer.bias
    return linear


def _two_files(source: FileName, target: FileName) -> tuple[Path, Path]:
    """Return the paths of a file to read and of another one to write; refuse one file in both places, which would be lost."""
    for name, file in (("source", source), ("target", target)):
        if not isinstance(file, str | PathLike):
            hint = ": ternarize_all takes a state dict" if isinstance(file, Mapping) else ""
            raise TypeError(f"{name} is a {type(file).__name__}, but must be the name of a file{hint}")
    paths = Path(source), Path(target)
    if paths[1].exists() and paths[0].exists() and paths[1].samefile(paths[0]):
        raise ValueError(
            f"target is {str(target)!r}, but must be another file than source, whose weights would be lost"
        )
    return paths


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what reading a safetensors file raises within the block into one sentence."""
    try:
        yield
    except OSError as error:
        raise TrainingError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
    except SafetensorError as error:
        reason = str(error).split("\n")[0]
        raise TrainingError(f"{str(path)!r} is damaged or not a safetensors file: {reason}") from error


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor of a file by name, one in memory at a time."""
    with _reading(path):
        # A pipe or a device is refused here.
        open_regular(path).close()
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
    for name in names:
        with _reading(path), safe_open(path, framework="pt") as file:
            tensor = file.get_tensor(name)
        yield name, tensor


def _add(tensors: dict[str, Tensor], name: str, tensor: Tensor) -> None:
    """Add a tensor to those of a file. Raises ValueError for a name that is taken."""
    if name in tensors:
        raise ValueError(
            f"the name {name!r} is that of a tensor and of a part of a ternary matrix, but must be of one"
        )
    tensors[name] = tensor


def _stated(path: Path) -> Mapping[str, Any]:
    """Return what a converted file says of its matrices."""
    with _reading(path):
        open_regular(path).close()
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(METADATA)
    try:
        stated = parsed_json(text or "")
    except ValueError:
        stated = None
    if not isinstance(stated, dict) or not stated:
        raise TrainingError(f"{str(path)!r} is no file that arbitor.convert wrote")
    return stated


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    content = save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata=metadata)
    with told(repr(str(path))):
        write_whole(path, content)


@click.command(
    cls=Command, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.argument("source", type=FilePath(path_type=Path))
@click.argument("target", type=FilePath(path_type=Path))
@click.option("--back", is_flag=True, help="SOURCE is a converted file: write its matrices in float [off].")
@click.option(
    "--group-size",
    type=click.Choice([str(size) for size in GROUP_SIZES]),
    help=f"Columns that share a scale [{DEFAULT_GROUP_SIZE}].",
)
@click.option(
    "--mantissa-bits",
    type=click.Choice([str(bits) for bits in MANTISSA_BITS]),
    help=f"Bits of a scale below its power of two [{DEFAULT_MANTISSA_BITS}].",
)
@click.option("--select", metavar="REGEX", help="Convert matrices alone whose names hold this [all].")
@click.option("--skip", metavar="REGEX", help="Leave out matrices whose names hold this [none].")
@click.option("--json", "as_json", is_flag=True, help="Print JSON [off].")
def command(
    source: Path,
    target: Path,
    back: bool,
    group_size: str | None,
    mantissa_bits: str | None,
    select: str | None,
    skip: str | None,
    as_json: bool,
) -> None:
    """Write the safetensors file SOURCE to TARGET with its float matrices ternary, and say what each of them lost."""
    asked = {"--group-size": group_size, "--mantissa-bits": mantissa_bits, "--select": select, "--skip": skip}
    if back:
        for name, value in asked.items():
            if value is not None:
                raise click.UsageError(f"{name} was given, but does nothing with --back")
        restored = restore_file(source, target)
        click.echo(
            json.dumps(restored) if as_json else f"{len(restored):,} matrices in float: {shown(str(target))}"
        )
        return
    wanted, unwanted = (_pattern(name, asked[name]) for name in ("--select", "--skip"))
    losses = convert_file(
        source,
        target,
        group_size=int(group_size or DEFAULT_GROUP_SIZE),
        mantissa_bits=int(mantissa_bits or DEFAULT_MANTISSA_BITS),
        select=lambda name: (
            (wanted is None or bool(wanted.search(name)))
            and not (unwanted is not None and unwanted.search(name))
        ),
    )
    if as_json:
        rows = {
            name: {"shape": loss.shape, "error": loss.error, "zero_part": loss.zero_part}
            for name, loss in losses.items()
        }
        click.echo(json.dumps(rows, indent=2))
        return
    click.echo(f"{'error':>7}  {'zeros':>6}  {'shape':>15}  matrix")
    for name, loss in losses.items():
        shape = " x ".join(map(str, loss.shape))
        click.echo(f"{loss.error:>7.4f}  {loss.zero_part:>6.1%}  {shape:>15}  {shown(name)}")
    click.echo(f"{len(losses):,} matrices ternary: {shown(str(target))}")


def _pattern(name: str, text: str | None) -> re.Pattern[str] | None:
    try:
        return None if text is None else re.compile(text)
    except re.error as error:
        raise click.UsageError(f"{name} is {text!r}, but must be a regular expression: {error}") from None


if __name__ == "__main__":
    run_command(command, name="python -m arbitor.convert")
