"""What all commands of ``arb`` have in common: options that other programs name otherwise, and one value an option."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import click

from arbitor.optimized.commands.parameters import FilePath

HABITS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("--lr", "--learning-rate"), ("--learning-rate", "--rate")),
    "--rate": ("--learning-rate",),
    **dict.fromkeys(("--rank", "--lora-r"), ("--lora-rank",)),
    "--alpha": ("--lora-alpha",),
    **dict.fromkeys(("--targets", "--target-modules"), ("--lora-targets",)),
    **dict.fromkeys(("--epochs", "--num-epochs", "--max-steps", "--iters", "--iterations"), ("--steps",)),
    **dict.fromkeys(("--batch-size", "--bs"), ("--batch",)),
    **dict.fromkeys(("--grad-accum", "--gradient-accumulation-steps"), ("--accum",)),
    **dict.fromkeys(("--block-size", "--seq-len", "--context-length"), ("--context",)),
    **dict.fromkeys(("--model", "--config"), ("--preset", "--base", "--run")),
    **dict.fromkeys(("--checkpoint", "--ckpt", "--init-from", "--base"), ("--base", "--init-from", "--run")),
    **dict.fromkeys(("--dataset", "--train-data"), ("--data",)),
    **dict.fromkeys(("--text", "--input", "--file"), ("--data", "--prompt")),
    **dict.fromkeys(("--eval-data", "--validation-data"), ("--val-data",)),
    **dict.fromkeys(("--out", "--output", "--out-dir", "--output-dir"), ("--to", "--run")),
    **dict.fromkeys(("--max-tokens", "--max-new-tokens", "--max-new-bytes", "--tokens"), ("--bytes",)),
    **dict.fromkeys(("--length", "--max-length"), ("--bytes", "--context")),
    "--temp": ("--temperature",),
    **dict.fromkeys(("--gpu", "--cuda", "--cpu"), ("--device",)),
    "--precision": ("--dtype",),
}
"""Options of other programs, and what a command here may have in their place. The first that it has is meant."""


class Command(click.Command):
    """A command of ``arb``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the words of a command line.

        Raises:
            click.NoSuchOption: an option is unknown; the message names the one that may be meant.
            click.UsageError: an option that holds one value was given twice, so that one of them would be lost.
        """
        try:
            _, _, given = self.make_parser(ctx).parse_args(args=list(args))
        except click.NoSuchOption as error:
            raise self._with_what_is_meant(error, ctx) from None
        for param, count in Counter(given).items():
            if isinstance(param, click.Option) and count > 1 and not param.multiple:
                folder = ", and a folder may hold many files" if param.name == "data" else ""
                raise click.UsageError(
                    f"{'/'.join((*param.opts, *param.secondary_opts))} was given {count} times, but may be given once{folder}",
                    ctx,
                )
        return super().parse_args(ctx, args)

    def get_short_help_str(self, limit: int = 45) -> str:
        """Return the first sentence of the help, whole."""
        return (self.help or "").split("\n\n")[0].replace("\n", " ").split(". ")[0].rstrip(".")

    def _with_what_is_meant(self, error: click.NoSuchOption, ctx: click.Context) -> click.NoSuchOption:
        known = {
            spelling for param in self.get_params(ctx) for spelling in (*param.opts, *param.secondary_opts)
        }
        name = error.option_name.replace("_", "-")
        habits = (option for option in (name, *HABITS.get(name, ())) if option in known)
        meant = next(habits, None) or next(iter(get_close_matches(name, sorted(known), n=1)), None)
        if meant is None:
            return error
        return click.NoSuchOption(
            error.option_name, f"No such option {error.option_name!r}. Did you mean {meant!r}?", ctx=ctx
        )


_Function = TypeVar("_Function", bound=Callable[..., Any])

MODEL = "A run, a folder of arb export, or a checkpoint"
"""What names a trained model."""


def of_run(function: _Function) -> _Function:
    """Give a command the run that it is about, with or without ``--run`` before it, as its argument ``run``."""

    @functools.wraps(function)
    def named(*first: Any, run: Path | None, named_run: Path | None, **more: Any) -> Any:
        if run is not None and named_run is not None:
            raise click.UsageError(f"Got unexpected extra argument ({run})", click.get_current_context())
        found = named_run or run
        if found is None:
            raise click.UsageError(
                f"--run is missing: {MODEL[0].lower()}{MODEL[1:]}", click.get_current_context()
            )
        return function(*first, run=found, **more)

    option = click.option("--run", "named_run", type=FilePath(path_type=Path), help=f"{MODEL} [RUN].")
    argument = click.argument("run", type=FilePath(path_type=Path), required=False)
    return argument(option(named))  # type: ignore[return-value]
