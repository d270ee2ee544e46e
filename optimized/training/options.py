"""The table of the trainer's settings: a field of `Settings` is a row, and its `Option` says all there is to say of it.

From the rows are made: the options of the command line (`arbitor.optimized.cli`), what a caller of `train` may ask for
(`TrainOptions`), the defaults, the checks of values, ``config.json``, and what a resumed run must agree with
(`arbitor.optimized.training.plan`). A new setting is one row here, and the code that reads it.
Nothing heavy is imported, so that ``arb --help`` is quick.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

from arbitor.optimized.settings import BACKENDS
from arbitor.optimized.training.setting import ALWAYS_RECORDED, Option, Row, row_of

_T = TypeVar("_T")

STREAM_BYTES = 2**28
"""Bytes of a stream that are read, at most, where nobody says."""

ONLY: Mapping[str, tuple[str, str]] = {
    "vision": ("image", "image_features"),
    "audio": ("audio", "audio_features"),
    "diffusion": ("video", "video_latent"),
}
"""Kind of data of a run on one kind alone, and the field that a model must have for it, by the seeds' name of the run."""

MOST_BYTES = 2**24
"""Bytes that a prompt is continued by, at most."""

EXCHANGES = ("full", "mxint8")
"""How ranks send the gradients that are made orthogonal: in the dtype of the activations, or in eight bits."""

OF_PRESET = "of the preset"
"""How help names a default that is a field of the preset's model."""


def _source(help: str, **more: Any) -> Option:
    """Return the option of a path that is left out by default."""
    return Option(help=help, default=None, default_help="none", path=True, **more)


def _model_change(
    help: str, *, default: bool | None, commands: tuple[str, ...] = ("train",), **more: Any
) -> Option:
    """Return the option of a change of the preset's model, which by default is none."""
    return Option(
        help=help,
        default=default,
        bound=True,
        before=default,
        changes_model=True,
        commands=commands,
        **more,
    )


FINETUNE_DEFAULTS: Mapping[str, Any] = {
    "lora_rank": 8,
    "lora_alpha": 16.0,
    "lora_targets": "all-linear",
    "learning_rate": 1e-3,
    "weight_decay": 0.0,
    "max_moe_iters": 1,
}
"""Defaults of `arb finetune` for settings that other runs do not have, or leave to the preset."""


def _of_adapters(name: str, help: str, *, before: Any = None, **more: Any) -> Option:
    """Return the option of a setting of adapters. It is None in a run that has none, and in one from before adapters."""
    default_help = str(FINETUNE_DEFAULTS[name])
    return Option(
        help=help,
        default=None,
        default_help=default_help,
        bound=True,
        before=before,
        commands=("finetune",),
        **more,
    )


@dataclass(frozen=True)
class Settings:
    """Every setting of a run, decided. It is written to ``config.json`` and into each checkpoint as plain data."""

    preset: Annotated[
        str,
        Option(
            help="What to train: tiny, small, ... or FILE.json",
            default="tiny",
            bound=True,
            commands=("train",),
        ),
    ]
    # Not bound by its name: a resumed run must agree in the bytes, see `run_text.check_same_data`.
    data: Annotated[
        str,
        Option(
            help="stdlib (the sources of this Python), a file, a folder or hf:NAME[/CONFIG][:SPLIT]",
            default="stdlib",
            path=True,
            also=("--data-text",),
        ),
    ]
    data_code: Annotated[str | None, _source("More bytes to learn from, a file, a folder or a stream")]
    data_image: Annotated[str | None, _source("Folder of pictures with captions, which needs --vision")]
    data_audio: Annotated[str | None, _source("Folder of sounds with transcripts, which needs --audio")]
    data_video: Annotated[str | None, _source("Folder of videos with captions, which needs --video")]
    data_speech: Annotated[
        str | None,
        _source("Folder of sounds with transcripts, which the model learns to say", commands=("train",)),
    ]
    stream_bytes: Annotated[
        int,
        Option(
            help="Bytes of a stream that are read, at most",
            default=STREAM_BYTES,
            low=1,
            high=2**44,
            bound=True,
            before=STREAM_BYTES,
        ),
    ]
    only: Annotated[
        str | None,
        Option(
            help="Learn from one kind of data alone, without experts but for text",
            default=None,
            default_help="every kind of data",
            choices=("text", *ONLY),
            bound=True,
            before=None,
            commands=("train",),
        ),
    ]
    mix: Annotated[
        str | None,
        Option(
            help="How often a micro-batch is of a kind: text=4,image=1",
            default=None,
            default_help="each kind of data once",
            bound=True,
            before=None,
        ),
    ]
    vision: Annotated[str | None, _source("DINOv2: a folder, or OWNER/NAME on a hub", on_hub=True)]
    audio: Annotated[str | None, _source("Moonshine: a folder, or OWNER/NAME on a hub", on_hub=True)]
    video: Annotated[
        str | None, _source("Wan autoencoder: a .safetensors file, or OWNER/NAME/FILE", on_hub=True)
    ]
    feature_cache: Annotated[
        str | None,
        Option(
            help="Folder of features, which several runs may share",
            default=None,
            default_help="features in the run folder",
            path=True,
        ),
    ]
    # Nor is this one.
    val_data: Annotated[
        str | None,
        Option(
            help="What the run is judged by, a file, a folder or a stream",
            default=None,
            default_help="a tenth of --data",
            path=True,
        ),
    ]
    init_from: Annotated[
        str | None,
        Option(
            help="Begin with the weights of a run, of a folder of arb export, or of a checkpoint",
            default=None,
            default_help="weights drawn by the seed",
            bound=True,
            before=None,
            path=True,
            commands=("train",),
        ),
    ]
    keep_votes: Annotated[
        bool,
        Option(
            help="With --init-from: go on with the votes that its weights have gathered too",
            default=False,
            bound=True,
            before=False,
            commands=("train",),
        ),
    ]
    steps: Annotated[int, Option(help="Optimisation steps", default=1000, low=1, bound=True)]
    batch: Annotated[
        int,
        Option(
            help="Windows of a micro-batch",
            default=4,
            low=1,
            high=2**20,
            bound=True,
            auto=True,
        ),
    ]
    # The shortest window: three bytes are read to predict the fourth.
    context: Annotated[
        int,
        Option(help="Bytes of a window", default=128, low=4, high=2**20, bound=True, also=("--ctx",)),
    ]
    accum: Annotated[int, Option(help="Micro-batches of a step", default=1, low=1, bound=True)]
    accum_votes: Annotated[
        bool,
        Option(
            help="Each micro-batch votes by itself, which takes no memory for sums of gradients",
            default=False,
            bound=True,
            before=True,
            commands=("train",),
        ),
    ]
    seed: Annotated[
        int, Option(help="Of weights, batches and dither", default=0, low=0, high=2**63 - 1, bound=True)
    ]
    rate: Annotated[
        float | None,
        Option(
            help="Size of the votes where the schedule is flat",
            default=None,
            default_help="6/64 of theta: 6 for theta 64",
            low=0,
            high=127,
            bound=True,
            before=None,
            commands=("train",),
        ),
    ]
    disable_vq: Annotated[
        bool, _model_change("No codes, and nothing that needs them", default=False, also=("--no-vq",))
    ]
    disable_graph: Annotated[
        bool, _model_change("No graph over the codes", default=False, also=("--no-graph",))
    ]
    disable_moe: Annotated[bool, _model_change("No experts", default=False)]
    enable_memory: Annotated[bool, _model_change("Tables of code n-grams", default=False)]
    enable_image: Annotated[bool, _model_change("Reads features of pictures", default=False)]
    enable_audio: Annotated[bool, _model_change("Reads features of sounds", default=False)]
    enable_video: Annotated[bool, _model_change("A video head, and a router to choose it", default=False)]
    enable_speech: Annotated[bool, _model_change("A talker head, and a router to choose it", default=False)]
    max_moe_iters: Annotated[
        int | None,
        _model_change(
            "Most turns of the last layer's loop",
            default=None,
            default_help=OF_PRESET,
            low=1,
            high=16,
            commands=("train", "finetune"),
        ),
    ]
    sign_votes: Annotated[
        bool, _model_change("The seeds' rule: votes are signs times a size by the loss", default=False)
    ]
    eval_interval: Annotated[
        int,
        Option(
            help="Steps between validations",
            default=100,
            low=1,
        ),
    ]
    save_interval: Annotated[
        int,
        Option(
            help="Steps between checkpoints, 0 for none before the last",
            default=100,
            low=0,
        ),
    ]
    log_interval: Annotated[
        int,
        Option(
            help="Steps between lines of metrics",
            default=10,
            low=1,
        ),
    ]
    eval_windows: Annotated[
        int,
        Option(
            help="Validation windows, at most, and files of each kind of media",
            default=256,
            low=1,
            bound=True,
            also=("--eval-steps",),
        ),
    ]
    sample_bytes: Annotated[
        int, Option(help="Bytes of the sample at the end", default=256, low=0, asked=False)
    ]
    device: Annotated[
        str,
        Option(help="Where to run: auto is a GPU if any", default="auto", choices=("auto", "cpu", "cuda")),
    ]
    backend: Annotated[
        str | None,
        Option(
            help="Op set",
            default=None,
            default_help="reference on cpu, triton on cuda",
            choices=BACKENDS,
        ),
    ]
    dtype: Annotated[
        str | None,
        Option(
            help="Activations",
            default=None,
            default_help="bfloat16 for triton on cuda, else float32",
            choices=("float32", "bfloat16"),
        ),
    ]
    cuda_graph: Annotated[
        bool | None,
        Option(
            help="Record the passes once, then replay them: the same results, sooner",
            default=None,
            default_help="wherever possible",
            has_opposite=True,
            commands=("train",),
        ),
    ]
    exchange: Annotated[
        str,
        Option(
            help="How several ranks send gradients: mxint8 halves bfloat16",
            default="full",
            choices=EXCHANGES,
            bound=True,
            before="full",
            commands=("train",),
        ),
    ]
    shard_codes: Annotated[
        bool,
        Option(
            help="Each of several ranks keeps a part of the codes and their edges: the same results in less memory",
            default=False,
            has_opposite=True,
            commands=("train",),
        ),
    ]
    shard_experts: Annotated[
        bool,
        Option(
            help="Each of several ranks keeps some experts of each layer, to which positions travel",
            default=False,
            bound=True,
            before=False,
            commands=("train",),
        ),
    ]
    lora_rank: Annotated[int | None, _of_adapters("lora_rank", "Rank of the adapters", low=1, high=2**16)]
    lora_alpha: Annotated[
        float | None,
        _of_adapters("lora_alpha", "Factor of the adapters times their rank", low=0, high=2**20),
    ]
    lora_targets: Annotated[
        str | None,
        _of_adapters(
            "lora_targets", "Linears that get adapters, by the ends of their names: query_up,value_up"
        ),
    ]
    learning_rate: Annotated[
        float | None,
        _of_adapters("learning_rate", "Of AdamW, where the schedule is flat", low=0, high=1),
    ]
    weight_decay: Annotated[float | None, _of_adapters("weight_decay", "Of AdamW", low=0, high=1)]

    @property
    def summed(self) -> int:
        """How many micro-batches a step has whose gradients are summed; 1 where each votes by itself."""
        return 1 if self.accum_votes else self.accum

    def as_json(self) -> dict[str, Any]:
        """Return the settings as JSON data."""
        return asdict(self)


ROWS: Mapping[str, Row] = {
    name: row_of(name, hint) for name, hint in get_type_hints(Settings, include_extras=True).items()
}
"""Every setting by name, in the order of the table."""

CHANGES = tuple(name for name, row in ROWS.items() if row.option.changes_model)
"""Settings that change the model of the preset: modules off or on, and the seeds' votes."""

ADAPTERS = tuple(name for name, row in ROWS.items() if row.option.commands == ("finetune",))
"""Settings of adapters, which are None in a run without them."""


def settings_of(command: str) -> tuple[str, ...]:
    """Return the settings that a command which trains can be asked for, by name."""
    return tuple(name for name, row in ROWS.items() if row.option.asked and command in row.option.commands)


BOUND = tuple(name for name, row in ROWS.items() if row.option.bound)
"""Settings that decide what a run computes: a resumed run must agree with them."""

BEFORE: Mapping[str, Any] = {
    name: ROWS[name].option.before for name in BOUND if ROWS[name].option.before is not ALWAYS_RECORDED
}
"""Bound settings that a checkpoint may lack, as it is from before there were these, and the values that its run has."""

PRESET_DEFAULTS: dict[str, Mapping[str, Any]] = {
    "tiny": {"steps": 500, "batch": 32},
    "small": {"batch": 64, "context": 256, "eval_windows": 512},
    "r12": {"batch": 32, "context": 256},
}
"""Defaults that suit a preset better than those of the rows, which are cautious: one step of a large model fills a GPU."""


def default_in_words(name: str) -> str:
    """Return the default of a setting as help says it: a number, and what presets have instead."""
    option = ROWS[name].option
    others = [f"{of[name]} for {preset}" for preset, of in PRESET_DEFAULTS.items() if name in of]
    if option.default_help is not None:
        return option.default_help
    return ", ".join([*others, f"else {option.default}" if others else str(option.default)])


def preset_defaults(preset: str) -> dict[str, Any]:
    """Return the defaults of all settings for a preset, by name.

    Args:
        preset: name of a configuration; one that is no preset has the defaults of the rows.
    """
    return {
        **{name: row.option.default for name, row in ROWS.items()},
        **PRESET_DEFAULTS.get(preset, {}),
    }


def _with_settings(cls: type[_T]) -> type[_T]:
    """Make a class a frozen dataclass that has a field for every setting that can be asked for, None by default."""
    for name, row in ROWS.items():
        if row.option.asked:
            cls.__annotations__[name] = f"{row.kind.__name__} | None"
            setattr(cls, name, None)
    make: Callable[[type[_T]], type[_T]] = dataclass(frozen=True)
    return make(cls)


@_with_settings
class TrainOptions:
    """What the user asked for: where the run is, and settings by the names of `Settings`.

    A setting that is None is left to the run that is resumed, or to the preset's defaults.

    Attributes:
        run: the run folder.
        resume: continue what the run folder holds.
        reset: begin anew where the run folder holds a run, whose files go.
        save: whether to write checkpoints.
        finetune: whether the run trains adapters over the frozen weights of `init_from`.
    """

    run: Path | None = None
    resume: bool = False
    reset: bool = False
    save: bool = True
    finetune: bool = False

    if TYPE_CHECKING:

        def __init__(self, **options: Any) -> None: ...

        def __getattr__(self, name: str) -> Any: ...

    def settings(self) -> dict[str, Any]:
        """Return the settings asked for, by name; those that are None are left out."""
        asked = {field.name: getattr(self, field.name) for field in fields(self) if field.name in ROWS}  # type: ignore[arg-type]
        return {name: value for name, value in asked.items() if value is not None}
