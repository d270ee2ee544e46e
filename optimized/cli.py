"""The ``arb`` command: its commands are the modules of `arbitor.optimized.commands`.

Exit codes: 0 done, 1 it could not be done, 2 the command line makes no sense, 130 and 143 stopped by SIGINT and
SIGTERM, 129 by SIGHUP. Whatever goes wrong is one sentence on stderr; ``arb --traceback ...`` shows where it came from.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import traceback as traceback_module
import warnings
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from typing import NoReturn

import click

from arbitor.optimized.commands import (
    audit,
    evaluate,
    export,
    finetune,
    generate,
    info,
    preset,
    report,
    smoke,
    train,
)
from arbitor.optimized.commands.command import Command
from arbitor.optimized.interrupts import interruptible
from arbitor.optimized.training.shown import shown, write_nowhere
from arbitor.optimized.version import package_version


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line of ``arb`` and exit.

    Args:
        argv: arguments, or None for those of the process.
    """
    run_command(cli, argv, name="arb")


def run_command(command: click.Command, argv: Sequence[str] | None = None, *, name: str) -> NoReturn:
    """Run a command and exit; whatever goes wrong is one sentence.

    Args:
        command: to run.
        argv: arguments, or None for those of the process.
        name: how it is called.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Read when torch is imported: a waiting thread spins for microseconds and then sleeps. Spinning longer gains a
    # tenth on idle cores, and makes training five times slower on two cores that something else uses too.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # What a terminal has no letters for is written as an escape, and fails nothing.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    tells: Callable[[], bool] = _always
    try:
        with interruptible(), _warnings_in_sentences(), _among_ranks(arguments) as tells:
            command(arguments, prog_name=name, standalone_mode=False)
    except (KeyboardInterrupt, click.Abort):
        _fail("stopped by SIGINT", 130, tells)
    except click.UsageError as error:
        _fail(error.format_message().rstrip(".") + _hint(error), 2, tells)
    except click.ClickException as error:
        _fail(error.format_message(), error.exit_code, tells)
    except Exception as error:
        if "--traceback" in arguments:
            traceback_module.print_exc()
        _fail(*_explained(error), tells)
    sys.exit(0)


def _hint(error: click.UsageError) -> str:
    """Return what a user may have meant, and where help is."""
    if error.ctx is None:
        return ""
    if "unexpected extra argument" in error.format_message() and error.ctx.params.get("resume"):
        return ": the folder of the run to go on with is named by --run, as in --resume --run runs/mine"
    # Other programs take files, runs and prompts without an option.
    options = [option.opts[0] for option in error.ctx.command.params if isinstance(option, click.Option)]
    named = [name for name in ("--data", "--prompt", "--preset", "--run") if name in options]
    if "unexpected extra argument" in error.format_message() and named:
        return (
            f": options name what is meant, such as {', '.join(named)} (try: {error.ctx.command_path} --help)"
        )
    return f" (try: {error.ctx.command_path} --help)"


def _always() -> bool:
    return True


@contextlib.contextmanager
def _warnings_in_sentences() -> Iterator[None]:
    """Let a warning of Python be a sentence on stderr too, without the place in the code that it came from."""

    def tell(message: Warning | str, *where: object, **more: object) -> None:
        sentence = shown(" ".join(str(message).split())).rstrip(".")
        with contextlib.suppress(OSError):
            click.echo(f"arb: {sentence}.", err=True)

    with warnings.catch_warnings():
        warnings.showwarning = tell
        yield


@contextlib.contextmanager
def _among_ranks(arguments: Sequence[str]) -> Iterator[Callable[[], bool]]:
    """Join the ranks that torchrun has started to train with this one. Yield what says whether this rank tells what goes wrong."""
    command = next((argument for argument in arguments if not argument.startswith("-")), None)
    if command != "train" or os.environ.get("WORLD_SIZE", "1") == "1":
        yield _always
        return
    from arbitor.optimized.distributed.world import joined

    with joined() as world, contextlib.ExitStack() as stack:
        if not world.is_first:
            silence = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(silence))
        yield world.tells


@click.group(
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_version(), message="arb %(version)s")
@click.option("--traceback", is_flag=True, expose_value=False, help="Show where an error came from.")
@click.pass_context
def cli(context: click.Context) -> None:
    """Train and run true-ternary models: every weight a trit, trained in place with small integers."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@click.command("help", cls=Command, hidden=True)
@click.argument("name", required=False)
@click.pass_context
def _help(context: click.Context, name: str | None) -> None:
    """Print the help of arb, or of its command NAME, as --help does."""
    main_context = context.parent
    assert main_context is not None
    if name is None:
        click.echo(main_context.get_help())
        return
    command = cli.get_command(main_context, name)
    if command is None:
        near = get_close_matches(name, cli.commands, n=1)
        meant = f" Did you mean {near[0]!r}?" if near else ""
        raise click.UsageError(f"No such command {name!r}.{meant}", main_context)
    click.echo(command.get_help(click.Context(command, parent=main_context, info_name=name)))


for _command in (
    _help,
    train.train,
    finetune.finetune,
    generate.generate,
    evaluate.evaluate,
    info.info,
    report.report,
    export.export,
    preset.preset,
    audit.audit,
    smoke.smoke,
):
    cli.add_command(_command)


def _explained(error: Exception) -> tuple[str, int]:
    """What to tell the user about an error, and the exit code."""
    # Torch may be what is missing, and the errors below need it.
    if isinstance(error, ModuleNotFoundError):
        return (
            f"the package {error.name!r} is not installed: `make install` in a checkout installs what arb needs (arb --traceback "
            "shows where)",
            1,
        )
    from arbitor.optimized.training.errors import TrainingError
    from arbitor.optimized.training.machine_memory import is_full
    from arbitor.optimized.training.runtime import Stopped
    from arbitor.sidecars import SidecarError

    if isinstance(error, Stopped):
        return str(error), 128 + error.signal_number
    if isinstance(error, TrainingError | SidecarError):
        return str(error), 1
    if isinstance(error, ValueError):
        return str(error), 2
    if isinstance(error, OSError):
        where = f" {str(error.filename)!r}" if error.filename else ""
        return f"the system refused{where}: {error.strerror or error}", 1
    less = "a smaller --batch or --context needs less"
    if is_full(error):
        return f"the machine has not enough memory: {less} (arb --traceback shows where)", 1
    # It is torch's, which is not imported here for its name alone.
    if type(error).__name__ == "OutOfMemoryError":
        return (
            f"the GPU has not enough memory: {less}, and so does training with --no-cuda-graph (arb --traceback shows where)",
            1,
        )
    return f"{type(error).__name__}: {error} (arb --traceback shows where)", 1


def _fail(sentence: str, code: int, tells: Callable[[], bool]) -> NoReturn:
    sentence = shown(" ".join(sentence.split()))
    with contextlib.suppress(OSError):
        if tells():
            click.echo(f"arb: {sentence}{'' if sentence.endswith(('.', ')', '?')) else '.'}", err=True)
    try:
        sys.stdout.flush()
    except OSError:
        write_nowhere(sys.stdout)
    sys.exit(code)


if __name__ == "__main__":
    main()
