"""The vocabulary and the configuration of a model. Named configurations are in presets.py.

Legend: E_b embedding width, D width, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from types import SimpleNamespace
from typing import Any, cast

from arbitor.reference import checks
from arbitor.reference.constants import (
    ACCUM_MAX,
    AVERAGE_MEMORY_MAX,
    DEFAULT_GROUP_SIZE,
    DEFAULT_MANTISSA_BITS,
    DEFAULT_ORTHOGONAL_STEPS,
    DEFAULT_THETA,
    DEFAULT_THETA_E,
    EXPONENT_RULES,
    MAX_ORTHOGONAL_STEPS,
    MAX_SIGN_BITS,
    ON_FLIP,
)
from arbitor.reference.json_text import parsed_json

NUM_BYTES = 256
"""Ids 0 .. 255 are the bytes themselves."""

SPECIALS = (
    "PAD",
    "EOS",
    "BOS",
    "SYSTEM",
    "USER",
    "ASSISTANT",
    "SCRATCHPAD",
    "PLAN",
    "REFLECTION",
    "SUMMARY",
    "ACTION",
    "TOOL",
    "TOOL_RESULT",
    "FUNCTION",
    "CODE",
    "CODE_BLOCK",
    "PATCH",
    "EXECUTION",
    "SEARCH",
    "RETRIEVAL",
    "CONTEXT",
    "CITATION",
    "JSON",
    "XML",
    "TABLE",
    "LIST",
    "MARKDOWN",
    "ERROR",
    "WARNING",
    "POLICY",
    "STOP",
    "RESERVED",
)
"""Names of the special ids, from 256 on, in order."""

MODALITY_MARKS = (
    "TEXT_START",
    "TEXT_END",
    "IMAGE_START",
    "IMAGE_END",
    "AUDIO_START",
    "AUDIO_END",
    "VIDEO_START",
    "VIDEO_END",
    "MODALITY_SEPARATOR",
)
"""Names of the ids that mark where a modality starts and ends, after the specials. The seeds count nine and name none."""

SPECIAL_IDS = {name: NUM_BYTES + place for place, name in enumerate((*SPECIALS, *MODALITY_MARKS))}
"""Id of each special and modality mark by name."""

VOCABULARY_SIZE = NUM_BYTES + len(SPECIALS) + len(MODALITY_MARKS)
"""V: 256 bytes, 32 specials and 9 modality marks are 297 ids."""

NGRAM = 3
"""Bytes in one position of the trigram sequencer."""

VOTE_RULES = ("stochastic", "sign")
"""How a gradient becomes votes: by size, or, as in the seeds, by sign."""

CODE_SEARCHES = ("exact", "candidates")
"""How the nearest code is searched for: in the whole table, or in the buckets that the signs of a vector name."""

MAX_MOE_ITERS = 16
"""Largest `max_moe_iters` of a configuration."""

HALT_THRESHOLD = 0.99
"""Halting probability at which a position leaves the loop of the last layer."""

_MAX_SIZE = 2**31 - 1


@dataclass(frozen=True)
class ArbConfig:
    """The shape of a model and the rules that it trains by.

    Fields:
        name:           name of the configuration in run folders and audits.
        embed_dim:      E_b, width of the byte embedding.
        width:          D, width of a trigram position and of the residual stream.
        num_layers:     attention and MoE pairs.
        num_heads:      attention heads.
        head_dim:       width of a head's query, key and value, the rotary part included.
        rotary_dim:     leading part of a head's query and key that carries the position; even, below head_dim.
        query_latent:   rank of the queries.
        kv_latent:      width of the latent that keys and values are made from. A cache holds it and the rotary keys.
        shared_inner:   width of the hidden vector that all experts share; this and the next three fields are 0 without `use_moe`.
        num_experts:    experts of a MoE, at least 2.
        top_k:          experts that a position uses.
        expert_rank:    rank of an expert's modulation.
        head_inner:     width of the hidden vector of the byte head.

    The next fields are off at their defaults, and a count of 0 leaves a module out. A field that nothing reads must have its
    default. SWITCHES says when that is:
        num_codes:      entries of the shared codebook; 0 for no codes, and then no graph, memory or composites either.
        code_dim:       C, width of a code.
        motif_residual: whether a position's own vector is added to its motif.
        code_search:    codes that a position is compared with: all for `exact`, those of some buckets for `candidates`.
        sign_bits:      columns of a code whose signs name its bucket, for the candidate search; 0 for no buckets.
        num_probes:     buckets that the candidate search looks into.
        num_hops:       hops of the graph; 0 for no graph.
        hop_rank:       rank of a hop's adapter.
        num_neighbours: neighbours that a code keeps.
        use_moe:        whether there are experts.
        dense_dispatch_max_tokens: most positions of a pass for which every expert runs in any case, with a share of 0 where it
                        was not chosen. Passes of many positions do so too where ranks are few (`graph.moe`). Both ways differ
                        by rounding.
        max_moe_iters:  most turns of the last layer's loop, 1 .. 16.
        window:         positions that attention sees one by one; a multiple of `block`.
        block:          positions of the smallest summary.
        num_summaries:  summaries of a size that attention sees, at least.
        memory_rows:    rows of each memory table; 0 for no memory.
        memory_dim:     width of a memory row.
        composite_codes: entries of the composite codebook; 0 for no proposals.
        composite_inner: width between a position and its proposal.
        image_features: width of an image patch's features; 0 for no images.
        image_codes:    entries of the image codebook.
        audio_features: width of an audio frame's features; 0 for no audio.
        audio_codes:    entries of the audio codebook.
        router_inner:   width inside the output router, which needs a video or talker head to choose from; 0 for no router.
        video_latent:   numbers of a video latent (channels * frames * height * width); 0 for no video head.
        video_steps:    most denoising steps.
        talker_tokens:  audio tokens that the talker head chooses from; 0 for no talker head.

    Rules:
        group_size:     columns per exponent, one of GROUP_SIZES.
        mantissa_bits:  b, one of MANTISSA_BITS: a scale has 2**b steps an octave. Codebooks have none.
        theta:          votes that move a trit, 1 .. 127.
        theta_e:        votes that move an exponent, 1 .. 127.
        on_flip:        `reset` or `carry`: what a moved trit's accumulator keeps.
        exponent_rule:  `score`, `sign` or `frozen`.
        vote_rule:      `stochastic` or `sign`.
        orthogonal_steps: iterations of `orthogonalize` before the gradient of a matrix casts stochastic votes; 0 for none.
        average_gradients: whether a running mean leads a gradient before it is made orthogonal. It takes a byte a weight.
        average_memory: a gradient moves that mean by 2**-average_memory of its way; 1 to 6.
        max_vote_step:  largest vote of the `sign` rule, 1 .. 127.

    Raises TypeError or ValueError, one sentence, for a field that is not allowed.
    Source: docs/spec/update.md (rules), docs/spec/graph.md (shape).
    """

    name: str
    embed_dim: int
    width: int
    num_layers: int
    num_heads: int
    head_dim: int
    rotary_dim: int
    query_latent: int
    kv_latent: int
    shared_inner: int
    num_experts: int
    top_k: int
    expert_rank: int
    head_inner: int
    # The default of a field is what models had before there was the field: files from before lack it.
    num_codes: int = 0
    code_dim: int = 64
    motif_residual: bool = True
    code_search: str = "exact"
    sign_bits: int = 0
    num_probes: int = 0
    num_hops: int = 0
    hop_rank: int = 64
    num_neighbours: int = 10
    use_moe: bool = True
    dense_dispatch_max_tokens: int = 0
    max_moe_iters: int = 1
    window: int = 512
    block: int = 64
    num_summaries: int = 16
    memory_rows: int = 0
    memory_dim: int = 64
    composite_codes: int = 0
    composite_inner: int = 1280
    image_features: int = 0
    image_codes: int = 0
    audio_features: int = 0
    audio_codes: int = 0
    router_inner: int = 0
    video_latent: int = 0
    video_steps: int = 3
    talker_tokens: int = 0
    group_size: int = DEFAULT_GROUP_SIZE
    mantissa_bits: int = DEFAULT_MANTISSA_BITS
    theta: int = DEFAULT_THETA
    theta_e: int = DEFAULT_THETA_E
    on_flip: str = "reset"
    exponent_rule: str = "score"
    vote_rule: str = "stochastic"
    orthogonal_steps: int = DEFAULT_ORTHOGONAL_STEPS
    average_gradients: bool = False
    average_memory: int = 1
    max_vote_step: int = 8

    def __post_init__(self) -> None:
        """Refuse a field that is not allowed."""
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"name is {self.name!r}, but must be a string of at least one character")
        for field in fields(self):
            if field.type == "int":
                low = (
                    0
                    if at_rest(field.name) == 0 or field.name in ("orthogonal_steps", "mantissa_bits")
                    else 1
                )
                checks.integer(field.name, getattr(self, field.name), low, _MAX_SIZE)
            if field.type == "bool" and not isinstance(getattr(self, field.name), bool):
                raise TypeError(f"{field.name} is {getattr(self, field.name)!r}, but must be true or false")
        for switch in SWITCHES:
            if not switch.is_on(self):
                for name in switch.fields:
                    if getattr(self, name) != at_rest(name):
                        raise ValueError(
                            f"{name} is {getattr(self, name)!r}, but must be {at_rest(name)!r} {switch.off}: "
                            "nothing would read it"
                        )
        checks.integer("max_moe_iters", self.max_moe_iters, 1, MAX_MOE_ITERS)
        checks.one_of("code_search", self.code_search, CODE_SEARCHES)
        if self.code_search == "candidates":
            checks.integer("sign_bits", self.sign_bits, 1, MAX_SIGN_BITS)
            checks.integer("num_probes", self.num_probes, 1, 2**self.sign_bits)
        if self.window % self.block:
            raise ValueError(
                f"window is {self.window}, but must be a multiple of block, which is {self.block}"
            )
        for kind in ("image", "audio"):
            if self.num_codes and getattr(self, f"{kind}_features") and not getattr(self, f"{kind}_codes"):
                raise ValueError(
                    f"{kind}_codes is 0, but must be at least 1 with {kind}_features and num_codes: every position has a code"
                )
        if self.use_moe:
            for name in ("shared_inner", "expert_rank"):
                checks.integer(name, getattr(self, name), 1, _MAX_SIZE)
            # The router of a single expert would have nothing to choose, and would learn nothing.
            checks.integer("num_experts", self.num_experts, 2, _MAX_SIZE)
            checks.integer("top_k", self.top_k, 1, self.num_experts)
        if self.rotary_dim % 2 or self.rotary_dim >= self.head_dim:
            raise ValueError(
                f"rotary_dim is {self.rotary_dim}, but must be even and below head_dim, which is {self.head_dim}"
            )
        check_rules(self)
        checks.integer("average_memory", self.average_memory, 1, AVERAGE_MEMORY_MAX)
        checks.integer("max_vote_step", self.max_vote_step, 1, ACCUM_MAX)
        checks.one_of("vote_rule", self.vote_rule, VOTE_RULES)

    def to_json(self) -> str:
        """Return the configuration as a JSON object with one key a field, in field order."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> ArbConfig:
        """Return the configuration that `to_json` wrote.

        Raises ValueError for text that is no JSON object, names a key twice, or has an unknown or a missing field; a field
        that may be left out takes its default.
        """
        try:
            values = parsed_json(text)
        except ValueError as error:
            raise ValueError(f"text must be a JSON object with the fields of a config, but {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"text holds a JSON {type(values).__name__}, but must be an object")
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(
                f"config has the unknown field {unknown[0]!r}, but must have none but {', '.join(sorted(known))}"
            )
        missing = [
            field.name for field in fields(cls) if field.default is MISSING and field.name not in values
        ]
        if missing:
            raise ValueError(f"config has no field {missing[0]!r}, but must name every one without a default")
        return cls(**values)


def check_rules(rules: Any) -> None:
    """Refuse rules that no weight is held or trained by.

    Args:
        rules: an `ArbConfig`, or what has its fields from `group_size` to `orthogonal_steps` without the rule of the votes.
    """
    checks.group_size(rules.group_size)
    checks.mantissa_bits(rules.mantissa_bits)
    checks.threshold("theta", rules.theta)
    checks.threshold("theta_e", rules.theta_e)
    checks.one_of("on_flip", rules.on_flip, ON_FLIP)
    checks.one_of("exponent_rule", rules.exponent_rule, EXPONENT_RULES)
    checks.integer("orthogonal_steps", rules.orthogonal_steps, 0, MAX_ORTHOGONAL_STEPS)


@dataclass(frozen=True)
class Switch:
    """A condition under which a model reads some fields of its configuration.

    Fields:
        off:    the opposite of the condition, in the words of a refusal.
        is_on:  whether the condition holds for a configuration.
        fields: names of the fields. If the condition does not hold, each must have the value that `at_rest` gives.
    """

    off: str
    is_on: Callable[[ArbConfig], bool]
    fields: tuple[str, ...]


_EXPERT_SIZES = ("shared_inner", "num_experts", "top_k", "expert_rank")
"""Fields without a default that only experts read."""

SWITCHES = (
    Switch(
        "without use_moe",
        lambda config: config.use_moe,
        (*_EXPERT_SIZES, "dense_dispatch_max_tokens", "max_moe_iters"),
    ),
    Switch(
        "without num_codes",
        lambda config: config.num_codes > 0,
        (
            "code_dim",
            "motif_residual",
            "code_search",
            "num_hops",
            "memory_rows",
            "image_codes",
            "audio_codes",
        ),
    ),
    Switch(
        "with code_search 'exact'",
        lambda config: config.code_search == "candidates",
        ("sign_bits", "num_probes"),
    ),
    Switch(
        "without num_hops",
        lambda config: config.num_hops > 0,
        ("hop_rank", "num_neighbours", "composite_codes"),
    ),
    Switch("without composite_codes", lambda config: config.composite_codes > 0, ("composite_inner",)),
    Switch("without memory_rows", lambda config: config.memory_rows > 0, ("memory_dim",)),
    Switch("without image_features", lambda config: config.image_features > 0, ("image_codes",)),
    Switch("without audio_features", lambda config: config.audio_features > 0, ("audio_codes",)),
    Switch("without video_latent", lambda config: config.video_latent > 0, ("video_steps",)),
    Switch(
        "without video_latent or talker_tokens",
        lambda config: config.video_latent > 0 or config.talker_tokens > 0,
        ("router_inner",),
    ),
    Switch("with vote_rule 'sign'", lambda config: config.vote_rule != "sign", ("orthogonal_steps",)),
    Switch(
        "without orthogonal_steps that are read",
        lambda config: config.orthogonal_steps > 0 and config.vote_rule != "sign",
        ("average_gradients",),
    ),
    Switch("without average_gradients", lambda config: config.average_gradients, ("average_memory",)),
    Switch("with vote_rule 'stochastic'", lambda config: config.vote_rule == "sign", ("max_vote_step",)),
    Switch("with exponent_rule 'frozen'", lambda config: config.exponent_rule != "frozen", ("theta_e",)),
)
"""Every switch. A switch that depends on a field comes after the switch of that field, so that `with_fields` puts all fields at
rest in one pass.

`exponent_rule` does not switch `mantissa_bits`, because a loaded state may bring mantissas, which then stay.
"""


def at_rest(name: str) -> Any:
    """Return the value of a field that nothing reads: its default, or 0 for the sizes of experts, which have no default."""
    return 0 if name in _EXPERT_SIZES else ArbConfig.__dataclass_fields__[name].default


def with_fields(config: ArbConfig, **changes: Any) -> ArbConfig:
    """Return a configuration with some fields exchanged, and the fields that nothing reads any more at rest.

    Raises TypeError or ValueError, as a configuration does, for a field among the changes that nothing would read.
    """
    values = {field.name: getattr(config, field.name) for field in fields(config)} | changes
    for switch in SWITCHES:
        if not switch.is_on(cast(ArbConfig, SimpleNamespace(**values))):
            values |= {name: at_rest(name) for name in switch.fields if name not in changes}
    return ArbConfig(**values)


MEMORY_ROWS = 16_384
"""Rows of each memory table where memory is switched on and the preset names no number."""


IMAGE_FEATURES = {"image_features": 384, "image_codes": 8192}
AUDIO_FEATURES = {"audio_features": 416, "audio_codes": 16_384}
"""Fields of a model that reads pictures or sounds, where that is switched on and the preset does not say. They are the widths of
DINOv2-small and Moonshine-base, and the codes of REFACTOR11."""

VIDEO_LATENT = 16_384
"""Numbers of a video latent where the video head is switched on and the preset names no number: [16, 1, 32, 32] (REFACTOR9)."""

TALKER_TOKENS = 289
"""Tokens of the talker head where it is switched on and the preset names no number: the codes of the audio encoder (REFACTOR9)."""

ROUTER_SHARE = 4
"""Width of the model over the width inside of its router, where the video head brings a router along (REFACTOR14)."""

SIGN_VOTES: Mapping[str, Any] = {
    "vote_rule": "sign",
    "max_vote_step": 8,
    "theta": 32,
    "on_flip": "reset",
    "exponent_rule": "sign",
    "theta_e": 32,
    "mantissa_bits": 0,
}
"""Fields of a configuration that learns by the seeds' rule. Trits learn by the signs of their gradients, times an integer that
grows with the loss. Exponents move by whole octaves, by the signs of their groups' scores. docs/spec/votes.md says what the seeds
leave open."""


def with_modules(
    config: ArbConfig,
    *,
    vq: bool = True,
    graph: bool = True,
    moe: bool = True,
    memory: bool | None = None,
    max_moe_iters: int | None = None,
    image: bool = False,
    audio: bool = False,
    video: bool = False,
    speech: bool = False,
) -> ArbConfig:
    """Return a configuration with modules switched off, or memory and media on (REFACTOR12's options of the trainer).

    Args:
        vq:            False leaves out the codebooks, and with them graph, memory and composites, which need codes.
        graph:         False leaves out the graph and the composites, which speak through it.
        moe:           False leaves out the experts.
        memory:        True or False switches memory on or off; None leaves it as it is.
        max_moe_iters: most turns of the last layer's loop; None leaves it as it is.
        image, audio:  True lets the model read features of pictures, or of sounds.
        video:         True gives the model a video head, and a router to choose it.
        speech:        True gives the model a talker head, and a router to choose it.

    The fields that only a left-out module reads return to rest (`with_fields`).
    Raises ValueError for memory without codes, turns without experts, or turns out of range.
    """
    changes: dict[str, Any] = {}
    if not vq:
        changes["num_codes"] = 0
    if not graph:
        changes["num_hops"] = 0
    if not moe:
        changes["use_moe"] = False
    if memory is not None:
        changes["memory_rows"] = (config.memory_rows or MEMORY_ROWS) if memory else 0
    if max_moe_iters is not None:
        changes["max_moe_iters"] = max_moe_iters
    for wanted, features in ((image, IMAGE_FEATURES), (audio, AUDIO_FEATURES)):
        if wanted:
            coded = vq and config.num_codes > 0
            names = [name for name in features if coded or not name.endswith("_codes")]
            changes |= {name: getattr(config, name) or features[name] for name in names}
    if video:
        changes["video_latent"] = config.video_latent or VIDEO_LATENT
    if speech:
        changes["talker_tokens"] = config.talker_tokens or TALKER_TOKENS
    if video or speech:
        changes["router_inner"] = config.router_inner or max(1, config.width // ROUTER_SHARE)
    return with_fields(config, **changes)
