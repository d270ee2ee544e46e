"""The ``arb`` command: train, generate, audit, smoke.

Exit codes: 0 done, 1 it could not be done, 2 the command line makes no sense, 130 and 143 stopped by SIGINT and
SIGTERM, 129 by SIGHUP. Whatever goes wrong is one sentence on stderr; ``arb --traceback ...`` shows where it came from.
Everything heavy is imported inside the commands, so that ``arb --help`` is quick.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import traceback as traceback_module
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

import click

from arbitor.optimized.training.options import CHANGES, MOST_BYTES, ROWS
from arbitor.optimized.training.shown import Unbreakable, shown
from arbitor.optimized.version import package_version

if TYPE_CHECKING:
    from arbitor.optimized.training.loop import TrainResult
    from arbitor.reference.audit import AuditReport
    from arbitor.sidecars import SidecarAudit

MIB = 2**20
"""Bytes of a mebibyte, the seeds' unit of state."""


class _FilePath(click.Path):
    """A path that names something: an empty one would be the working directory."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("'' is empty, but must name a file or a folder", param, ctx)
        return super().convert(value, param, ctx)


_Command = TypeVar("_Command", bound=Callable[..., Any])


def _setting(
    name: str,
    flag: str | None = None,
    *,
    help: str | None = None,
    default: Any = None,
    default_help: str | None = None,
    low: int | None = None,
) -> Callable[[_Command], _Command]:
    """Return the option of a setting, as the table of settings has it.

    Args:
        name: of the setting, which is also the name of the command's parameter.
        flag: how it is spelled; None: as its name, with dashes.
        help: what the command does with it, where that is not what the trainer does.
        default: of the command, where it has one of its own.
        default_help: what help says of it.
        low: the least number that the command allows, where it has one of its own.
    """
    row = ROWS[name]
    option = row.option
    flag = flag or "--" + name.replace("_", "-")
    if default_help is None:
        default_help = option.default_help if default is None else str(default)
    if default_help is None:
        default_help = "off" if row.kind is bool else str(option.default)
    text = f"{help or option.help} [{default_help}]."
    if row.kind is bool:
        spelling = f"{flag}/--no-{flag.removeprefix('--')}" if option.has_opposite else flag
        return click.option(spelling, name, is_flag=True, default=None, help=text)
    kind: click.ParamType | type = row.kind
    if option.choices:
        kind = click.Choice(option.choices)
    elif row.kind is int:
        kind = click.IntRange(option.low if low is None else low, option.high)
    return click.option(flag, name, type=kind, default=default, help=text)


def _settings(*names: str) -> Callable[[_Command], _Command]:
    """Give a command the options of several settings."""

    def give(command: _Command) -> _Command:
        for name in reversed(names):
            command = _setting(name)(command)
        return command

    return give


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit.

    Args:
        argv: arguments, or None for those of the process.
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
        with _among_ranks(arguments) as tells:
            cli(arguments, prog_name="arb", standalone_mode=False)
    except (KeyboardInterrupt, click.Abort):
        _fail("stopped by SIGINT", 130, tells)
    except click.UsageError as error:
        hint = f" (try: {error.ctx.command_path} --help)" if error.ctx is not None else ""
        _fail(error.format_message().rstrip(".") + hint, 2, tells)
    except click.ClickException as error:
        _fail(error.format_message(), error.exit_code, tells)
    except Exception as error:
        if "--traceback" in arguments:
            traceback_module.print_exc()
        _fail(*_explained(error), tells)
    sys.exit(0)


def _always() -> bool:
    return True


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


@cli.command()
@_settings(*(name for name, row in ROWS.items() if row.option.asked))
@click.option(
    "--run", "--out", "run", type=_FilePath(path_type=Path), help="Run folder [runs/<preset>-<number>]."
)
@click.option("--resume", is_flag=True, help="Go on with the run in --run, with its own settings [off].")
@click.option("--no-save", is_flag=True, help="Write no checkpoints; without --run, write nothing [off].")
def train(no_save: bool, **options: Any) -> None:
    """Train a model on bytes, and compare it with what counting alone achieves."""
    if options["resume"] and options["run"] is None:
        raise click.UsageError("--resume needs --run, the folder of the run to go on with")
    from rich.console import Console

    from arbitor.optimized.training.loop import train as run_training
    from arbitor.optimized.training.options import TrainOptions

    console = Console(file=cast(Any, Unbreakable(sys.stdout)))
    result = run_training(TrainOptions(save=not no_save, **options), console=console)
    _print_result(console, result)


@cli.command()
@click.option("--run", type=_FilePath(path_type=Path), required=True, help="Folder of a run.")
@click.option("--prompt", help="Text to continue [none].")
@click.option(
    "--prompt-file", type=_FilePath(path_type=Path), help="A file with the bytes to continue [none]."
)
@click.option(
    "--bytes", "num_bytes", type=click.IntRange(0, MOST_BYTES), default=256, help="Bytes to add [256]."
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.8,
    help="Of the draws; 0: the likeliest byte [0.8].",
)
@_setting(
    "context", help="Bytes at the end of the prompt that are read, at most", default_help="as trained", low=3
)
@_setting("seed", help="Of the draws", default=0)
@_settings("device", "backend", "dtype")
@_setting("cuda_graph", help="Record a step once, then replay it: the same bytes, sooner")
@click.pass_context
def generate(
    command: click.Context,
    run: Path,
    prompt: str | None,
    prompt_file: Path | None,
    num_bytes: int,
    temperature: float,
    context: int | None,
    seed: int,
    device: str | None,
    backend: str | None,
    dtype: str | None,
    cuda_graph: bool | None,
) -> None:
    """Continue a prompt with the best model of a run. A pipe gets the bytes as they are."""
    if prompt is not None and prompt_file is not None:
        raise click.UsageError(
            f"--prompt-file {str(prompt_file)!r} was given with --prompt, but only one may be"
        )
    if num_bytes == 0:
        _refuse_given(command, "temperature", "context", "seed", "cuda_graph", where="with --bytes 0")
    if temperature == 0:
        _refuse_given(command, "seed", where="with --temperature 0, which takes the likeliest byte")
    if not prompt and prompt_file is None:
        _refuse_given(command, "context", where="without --prompt or --prompt-file")
    import json

    from arbitor.optimized.training.checkpoint import check_fits
    from arbitor.optimized.training.generate import generate as continue_prompt
    from arbitor.optimized.training.recording import records
    from arbitor.optimized.training.run_folder import RunFolder
    from arbitor.optimized.training.runtime import choose_runtime, deterministic
    from arbitor.optimized.training.sizes import check_memory
    from arbitor.reference.config import ArbConfig
    from arbitor.reference.graph import ArbModel

    runtime = choose_runtime(device or "auto", backend, dtype)
    record = records(cuda_graph, runtime)
    given = os.fsencode(prompt or "") if prompt_file is None else _prompt_of(prompt_file)
    checkpoint = RunFolder(run).load_best(
        lambda refusal: click.echo(f"arb: {refusal}; trying another one", err=True)
    )
    config = ArbConfig.from_json(json.dumps(checkpoint.config))
    check_memory(config, runtime.device)
    with deterministic(checkpoint.run.get("threads")):
        model = ArbModel(config, ops=runtime.ops(), device=runtime.device, dtype=runtime.dtype, seed=0)
        check_fits(checkpoint, checkpoint.config, model)
        model.load_state(checkpoint.state)
        added = continue_prompt(
            model,
            given,
            num_bytes,
            temperature=temperature,
            seed=seed,
            context=context or checkpoint.run["context"],
            cuda_graph=record,
        )
    if sys.stdout.isatty():
        click.echo(_printable(given + added))
    else:
        sys.stdout.buffer.write(given + added)
        sys.stdout.buffer.flush()


@cli.command()
@_setting("preset", help="What to look at: tiny, small, ... or FILE.json", default="tiny")
@_settings(*CHANGES)
@click.option(
    "--sidecars", is_flag=True, help="Also count frozen encoders of other projects, at full size [off]."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON [off].")
def audit(preset: str, sidecars: bool, as_json: bool, **changes: Any) -> None:
    """Count the weights and bytes of a preset, area by area, without building it."""
    import json
    from dataclasses import asdict

    from arbitor.optimized.layouts import resident_bytes
    from arbitor.optimized.training.plan import model_config
    from arbitor.reference.audit import audit as audit_config

    config, beside, counted = model_config(preset, **changes), None, 0.0
    if sidecars:
        from arbitor.sidecars import counted_mib, standard_audit

        beside = standard_audit()
        counted = counted_mib(beside)
    report = audit_config(config, resident_bytes=resident_bytes, sidecar_mib=counted)
    if as_json:
        extra = {} if beside is None else {"sidecars": [asdict(each) for each in beside]}
        click.echo(json.dumps({**json.loads(report.to_json()), **extra}, indent=2))
    else:
        _print_audit(report, beside)


@cli.command()
@_setting("preset", help="What to run: tiny, small, ... or FILE.json", default="tiny")
@_settings(*CHANGES)
@_setting("context", "--ctx", default=4)
@_setting("batch", help="Windows", default=1)
@click.option("--backward", is_flag=True, help="Also run a backward pass and one update [off].")
@_setting("seed", help="Of weights, bytes and dither", default=0)
@_settings("device", "backend", "dtype")
def smoke(
    preset: str,
    context: int,
    batch: int,
    backward: bool,
    seed: int,
    device: str | None,
    backend: str | None,
    dtype: str | None,
    **changes: Any,
) -> None:
    """Run a preset twice, and report time and memory. Warms the kernel cache for a real run."""
    from arbitor.optimized.training.plan import model_config
    from arbitor.optimized.training.runtime import choose_runtime
    from arbitor.optimized.training.smoke import smoke as run_twice

    runtime = choose_runtime(device or "auto", backend, dtype)
    config = model_config(preset, **changes)
    report = run_twice(config, runtime, context=context, batch=batch, backward=backward, seed=seed)
    click.echo(f"preset {shown(preset)}, {runtime.backend} on {runtime.device}, ctx {context}, batch {batch}")
    click.echo(f"logical ternary weights: {report.weights:,}")
    click.echo(f"training state: {report.state_bytes / MIB:.2f} MiB")
    click.echo(f"loss: {report.bpb:.3f} bits per byte")
    click.echo(f"build: {report.build_seconds:.3f} s")
    for name, times in (("cold", report.cold), ("warm", report.warm)):
        click.echo(f"forward, {name}: {times.forward:.3f} s")
        if times.update is not None:
            click.echo(f"backward/update, {name}: {times.update:.3f} s")
    if report.peak_bytes is not None:
        click.echo(f"CUDA peak: {report.peak_bytes / MIB:.2f} MiB")


def _print_audit(report: AuditReport, sidecars: Sequence[SidecarAudit] | None) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("area", title=Text(f"preset {shown(report.config_name)}"))
    for heading in ("ternary weights", "canonical MiB", "on a GPU MiB"):
        table.add_column(heading, justify="right")
    total = ("total", report.weights, report.canonical_bytes, report.resident_bytes)
    for section in (report.areas, None, report.apart):
        rows = [(a.name, a.weights, a.canonical_bytes, a.resident_bytes) for a in section or ()]
        for name, weights, canonical, resident in rows if section is not None else [total]:
            table.add_row(name, f"{weights:,}", f"{canonical / MIB:.2f}", f"{resident / MIB:.2f}")
        table.add_section()
    tables = Table("integer table, apart", "dtype", "shape")
    tables.add_column("MiB", justify="right")
    for entry in report.tables:
        shape = " x ".join(f"{size:,}" for size in entry.shape)
        tables.add_row(entry.name, entry.dtype, shape, f"{entry.bytes / MIB:.2f}")
    tables.add_section()
    tables.add_row("total", "", "", f"{report.table_bytes / MIB:.2f}")
    figures = Table("figure", "source")
    for heading in ("seed", "ours", "difference"):
        figures.add_column(heading, justify="right")
    figures.add_column()
    for figure in report.figures:
        numbers = [f"{figure.seed:,}", f"{figure.ours:,}", f"{figure.difference:+,}"]
        figures.add_row(figure.what, figure.source, *numbers, "" if figure.agrees else "(!)")

    console = Console()
    console.print(table)
    if report.tables:
        console.print(tables)
    if report.figures:
        console.print(figures)
    if not all(figure.agrees for figure in report.figures):
        console.print("(!) ours does not round to the seed's figure", highlight=False)
    console.print(f"trainable float parameters: {report.trainable_float_params}", highlight=False)
    console.print(f"float buffers: {report.float_buffers}", highlight=False)
    if sidecars is None:
        console.print(
            "sidecars: not counted (--sidecars counts the frozen encoders of other projects)", highlight=False
        )
    else:
        _print_sidecars(console, sidecars)


def _print_sidecars(console: Any, sidecars: Sequence[SidecarAudit]) -> None:
    from rich.table import Table

    table = Table("sidecar, frozen and apart", "modules in int8")
    for heading in ("weights", "stored MiB", "counted as float32, MiB"):
        table.add_column(heading, justify="right")
    for each in sidecars:
        modules = (
            ", ".join(f"{count} {name}" for name, count in each.modules.items()) or "none: kept in bfloat16"
        )
        sizes = [f"{size / MIB:.2f}" for size in (each.stored_bytes, each.counted_bytes)]
        table.add_row(each.name, modules, f"{each.weights:,}", *sizes)
    console.print(table)
    console.print(
        "REFACTOR11 counts an int8 weight as four bytes, since quanto reports float32 for it", highlight=False
    )


def _print_result(console: Any, result: TrainResult) -> None:
    from rich.table import Table
    from rich.text import Text

    summary = result.summary
    table = Table("model")
    table.add_column("validation bits per byte", justify="right")
    for name, bpb in summary["baselines"].items():
        table.add_row(name, f"{bpb:.3f}")
    table.add_section()
    value = summary["val_bpb"]
    ours = Text(f"arb {shown(summary['preset'])}")
    table.add_row(ours, "not finite" if value is None else f"{value:.3f}", style="bold")
    console.print(table)
    console.print("sample, prompt first:", highlight=False)
    console.print(Text(_printable(result.prompt), style="dim") + Text(_printable(result.sample)))
    console.print(
        f"{summary['steps']} steps in {summary['seconds']:.0f} s, state {summary['state_sha256'][:16]}",
        highlight=False,
    )
    if result.folder is not None:
        folder = shown(str(result.folder))
        console.print(f"run folder: {folder}", markup=False, highlight=False, soft_wrap=True)


def _refuse_given(command: click.Context, *names: str, where: str) -> None:
    """Refuse options that the user gave although nothing reads them; at its default an option is never refused."""
    for option in command.command.params:
        source = command.get_parameter_source(str(option.name))
        if option.name in names and source is click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(f"{option.opts[0]} was given, but does nothing {where}")


def _prompt_of(path: Path) -> bytes:
    """The bytes of a prompt file."""
    from arbitor.optimized.training.errors import TrainingError

    try:
        return path.read_bytes()
    except OSError as error:
        raise TrainingError(f"cannot read the prompt {str(path)!r}: {error.strerror or error}") from error


def _printable(content: bytes) -> str:
    """Bytes as text for a terminal: UTF-8 where it is, and no control characters but newline and tab."""
    text = content.decode("utf-8", errors="replace")
    return shown(text, allowed="\n\t")


def _explained(error: Exception) -> tuple[str, int]:
    """What to tell the user about an error, and the exit code."""
    from arbitor.optimized.training.errors import TrainingError
    from arbitor.optimized.training.runtime import Stopped

    if isinstance(error, Stopped):
        return str(error), 128 + error.signal_number
    if isinstance(error, TrainingError):
        return str(error), 1
    if isinstance(error, ValueError):
        return str(error), 2
    if isinstance(error, OSError):
        where = f" {str(error.filename)!r}" if error.filename else ""
        return f"the system refused{where}: {error.strerror or error}", 1
    if isinstance(error, MemoryError):
        return "there is not enough memory", 1
    # It is torch's, which is not imported here for its name alone.
    if type(error).__name__ == "OutOfMemoryError":
        return (
            "the GPU has not enough memory: a smaller --batch or --context needs less, and so does training with "
            "--no-cuda-graph (arb --traceback shows where)",
            1,
        )
    return f"{type(error).__name__}: {error} (arb --traceback shows where)", 1


def _fail(sentence: str, code: int, tells: Callable[[], bool]) -> NoReturn:
    sentence = shown(" ".join(sentence.split()))
    with contextlib.suppress(OSError):
        if tells():
            click.echo(f"arb: {sentence}{'' if sentence.endswith(('.', ')')) else '.'}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
