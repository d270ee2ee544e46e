"""The runs that are wanted next of what a rule or a module is worth, as commands that fit ten minutes of one H200 each.

    python -m bench.learning.wanted --out wanted           # writes the configurations that they need, and prints the commands

TEXTS stands for a file or folder of 30 MB or more of prose and code, OTHER for a text of another source, which judges. A command
with `--pieces` is repeated until it exits with 0.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from arbitor.reference.config import ArbConfig
from arbitor.reference.presets import preset
from bench import parts

CALL_SECONDS = 600
"""A call of a machine ends after so many, at most."""

CONFIGS: Mapping[str, ArbConfig] = {
    "two.json": preset("small"),
    "one.json": replace(preset("small"), mantissa_bits=1),
    "none.json": replace(preset("small"), mantissa_bits=0),
    "wide.json": replace(
        preset("small"),
        name="wide",
        embed_dim=256,
        width=1024,
        num_layers=8,
        num_heads=16,
        query_latent=512,
        kv_latent=256,
        shared_inner=2048,
        expert_rank=32,
        head_inner=2048,
    ),
    "r12-mean.json": replace(preset("r12"), name="r12-mean", average_gradients=True, average_memory=3),
}
"""Configurations by file: `small` with two, one and no mantissa bits, and with 105 M weights; `r12` with a mean of gradients."""


@dataclass(frozen=True)
class Wanted:
    """A question, and what answers it.

    Fields:
        asked:    in a few words.
        commands: each as one line.
        calls:    how often each is called, with a part of it done in each call.
        seconds:  expected for a call of each, the start with an empty cache of kernels included.
    """

    asked: str
    commands: tuple[str, ...]
    seconds: int
    calls: int = 1


def _learning(words: str) -> str:
    return f"python -m bench.learning {words} --data TEXTS --pieces --seconds 520"


def _ablation(words: str, options: str) -> str:
    return f"python -m bench.ablation {words} -- --data TEXTS {options}"


R12_WINDOWS = "--batch 32 --context 256"
SMALL = "--variants 'trunk alone' --side-by-side 3"

WANTED = (
    # Seconds of seed 0, measured.
    Wanted(
        "the modules of r12, another seed",
        (
            _ablation(
                "--preset r12 --steps 600 --seeds 1 --variants 'every module' 'no graph' 'one turn' 'no codes' --side-by-side 1 "
                "--out r12-modules",
                R12_WINDOWS,
            ),
        ),
        450,
    ),
    # 8,192 bytes a step came to 1.450 after 4,800 steps, and noise decides there. Some 75 and 130 ms a step.
    Wanted(
        "the trunk of r12 by larger steps, as many bytes",
        tuple(
            _ablation(
                f"--preset r12 --steps {steps} --seeds 1 --variants 'trunk alone' --side-by-side 1 --out r12-{windows}",
                f"--batch {windows} --context 256",
            )
            for windows, steps in ((64, 2400), (128, 1200))
        ),
        230,
    ),
    # 77 ms a step of the trunk were measured. Every module is expected to take 0.2 s.
    Wanted(
        "r12 with a mean of gradients: its modules, and two seeds of its trunk",
        (
            _ablation(
                "--preset r12-mean.json --steps 600 --seeds 0 1 --variants 'every module' 'trunk alone' --side-by-side 1 "
                "--out r12-mean",
                f"{R12_WINDOWS} --rate 1.5",
            ),
        ),
        400,
    ),
    # 40 ms a step; 8 rules with 6 settings or more, and two seeds more of each.
    Wanted(
        "every rule at 110 M weights, tuned",
        (_learning("--suite tune best --size '110 M' --steps 1500 --out wide"),),
        560,
        calls=10,
    ),
    Wanted(
        "the same, judged by a text that no choice was made on",
        ("python -m bench.learning --judge OTHER --data TEXTS --out wide",),
        120,
    ),
    # 10 ms a step at 4 windows as at 64: launches, no products.
    Wanted(
        "the rate by batch and length",
        tuple(
            _ablation(
                f"--preset small --seeds 0 1 --steps {steps} {SMALL} --out rates-{batch}-{rate}-{steps}",
                f"--batch {batch} --rate {rate}",
            )
            for batch in (4, 16)
            for rate in (3, 6)
            for steps in (500, 3000)
        ),
        90,
    ),
    # The suite takes a third of the steps: 15 runs of 16 s.
    Wanted(
        "what mantissa bits gain, by five seeds",
        (
            _learning(
                "--suite graph --rules integer --steps 4500 --size two.json one.json none.json --seeds 0 1 2 3 4 --out mantissa"
            ),
        ),
        400,
    ),
    # Seconds of seeds 0 and 1, measured.
    Wanted(
        "each module at 110 M weights, a third seed",
        (
            _ablation(
                "--preset wide.json --steps 500 --seeds 2 --side-by-side 3 --out modules-2",
                "--batch 64 --context 256",
            ),
        ),
        225,
    ),
)


def lines(folder: Path) -> Iterator[str]:
    """Yield each command, with how often it is called and what a call takes behind it, and configurations in a folder."""
    for wanted in WANTED:
        for command in wanted.commands:
            words = [str(folder / word) if word in CONFIGS else word for word in shlex.split(command)]
            yield f"{shlex.join(words)}  # {wanted.calls} x {wanted.seconds} s"


def table() -> str:
    """Return what is asked, and how many seconds of an H200 the answer takes, as Markdown."""
    found = ["| asked | commands | calls of each | seconds in all |", "|---|---:|---:|---:|"]
    for wanted in WANTED:
        number = len(wanted.commands)
        found.append(
            f"| {wanted.asked} | {number} | {wanted.calls} | {number * wanted.calls * wanted.seconds:,} |"
        )
    return "\n".join(found)


def commands() -> str:
    """Return the commands as the page has them, as Markdown."""
    return "\n".join(["```", *lines(Path("wanted")), "```"])


def main(argv: Sequence[str] | None = None) -> int:
    """Write the configurations into a folder, and print the commands."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.learning.wanted",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the configurations")
    args = parser.parse_args(argv)
    try:
        for name, config in CONFIGS.items():
            parts.write_text(args.out / name, config.to_json())
    except OSError as error:
        parser.error(f"argument --out: is '{args.out}', but must be a folder to write to: {error.strerror}")
    print("\n".join(lines(args.out)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
