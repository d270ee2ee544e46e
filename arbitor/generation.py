"""What a model adds to prompts: texts become bytes, are gone on with together, and come back as texts."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, cast

from torch import Tensor

from arbitor.optimized.training.generate import MOST_SEED, stream_batch
from arbitor.optimized.training.media import Features
from arbitor.optimized.training.options import MOST_BYTES
from arbitor.optimized.training.recording import records
from arbitor.optimized.training.runtime import OP_SETS, Runtime
from arbitor.reference import checks
from arbitor.reference.graph import ArbModel
from arbitor.reference.graph.adapters import adapters_of

Text = str | bytes
"""A text. What is made of bytes comes back as bytes, what is made of a string as a string."""

LENGTHS = ("max_new_tokens", "max_tokens", "max_length", "length")
"""What other libraries call the number of tokens to add."""


def refuse_unknown(names: Iterable[str]) -> None:
    """Refuse arguments of other names than those of `generate`, by a TypeError with the first."""
    for name in names:
        meant = "; max_new_bytes is how many bytes to add, and a byte is a token" if name in LENGTHS else ""
        raise TypeError(f"generate has no argument {name!r}{meant}")


def added_text(
    model: ArbModel,
    prompts: Text | Sequence[Text],
    *,
    max_new_bytes: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    stop: Text | Sequence[Text],
    seed: int | Sequence[int],
    context: int | None,
    features: Callable[[], Mapping[str, Tensor]],
    stream: bool,
) -> Any:
    """Return what a model adds to a prompt, or to each of several, as `arbitor.ArbModel.generate` says.

    Args:
        features: function that makes the features of raw media before the prompts, by name, a row for each prompt.
    """
    checks.integer("max_new_bytes", max_new_bytes, 0, MOST_BYTES)
    alone = isinstance(prompts, Text)
    several = _texts("prompts", prompts)
    given = [_bytes_of("prompts" if alone else f"prompts[{i}]", text) for i, text in enumerate(several)]
    stops = [_bytes_of("stop", text) for text in _texts("stop", stop)]
    made = features()
    media: list[Features] | None = None
    if made:
        for name, value in made.items():
            if len(value) != len(given):
                raise ValueError(
                    f"{name} has {len(value)} samples, but must have {len(given)}, one for each prompt"
                )
        media = [{name: value[place, None] for name, value in made.items()} for place in range(len(given))]
    pieces = stream_batch(
        model,
        given,
        max_new_bytes,
        temperature=temperature,
        seeds=_seeds(seed, len(given)),
        top_k=top_k,
        top_p=top_p,
        stop=stops,
        context=context,
        media=media,
        cuda_graph=_records(model),
    )
    texts = _as_given(_unchanged(model, pieces), several)
    if stream:
        return (piece[0] for piece in texts) if alone else texts
    added = list(texts)
    joined = [_joined(text, [piece[place] for piece in added]) for place, text in enumerate(several)]
    return joined[0] if alone else joined


def _unchanged(model: ArbModel, pieces: Iterator[list[bytes]]) -> Iterator[list[bytes]]:
    """Yield pieces of texts. Raises RuntimeError if the weights were changed since the first one was asked for."""
    version = model.voting.version
    for piece in pieces:
        yield piece
        if model.voting.version != version:
            raise RuntimeError(
                "the model was stepped, loaded or given other adapters between two pieces of a text, but must stay as it is until "
                "the last one"
            )


def _records(model: ArbModel) -> bool:
    """Return whether steps of generation are recorded and replayed: the same bytes, sooner."""
    backend = next((name for name, home in OP_SETS.items() if home == model.context.op_set.name), "")
    runtime = Runtime(model.context.device.type, backend, model.dtype)
    return records(None, runtime, adapted=bool(adapters_of(model)))


def _joined(like: Text, pieces: Sequence[Text]) -> Text:
    """Return pieces as one text, of the type of another."""
    return "".join(cast(list[str], pieces)) if isinstance(like, str) else b"".join(cast(list[bytes], pieces))


def _seeds(seed: Any, count: int) -> list[int]:
    """Return a seed for each of some prompts, from the first or from all of them."""
    if isinstance(seed, Sequence) and not isinstance(seed, Text):
        return list(seed)
    checks.integer("seed", seed, 0, MOST_SEED)
    return [seed + place for place in range(count)]


def _texts(name: str, texts: Text | Sequence[Text]) -> list[Text]:
    """Return a text, or several, as a list; refuse what is neither."""
    if isinstance(texts, Text):
        return [texts]
    if isinstance(texts, Tensor):
        raise TypeError(
            f"{name} is a Tensor, but must be a string or bytes, or a sequence of them: bytes(ids.tolist()) of a row of ids"
        )
    # The order of a set is no order, and of a mapping it is not clear what is meant.
    if not isinstance(texts, Iterable) or isinstance(texts, Mapping | Set):
        raise TypeError(
            f"{name} is a {type(texts).__name__}, but must be a string or bytes, or a sequence of them"
        )
    return list(texts)


def _bytes_of(name: str, text: Text) -> bytes:
    """Return the bytes of a text; refuse what is none."""
    if not isinstance(text, Text):
        raise TypeError(f"{name} is a {type(text).__name__}, but must be a string or bytes")
    try:
        return text.encode() if isinstance(text, str) else text
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} holds {text[error.start]!r}, which UTF-8 has no bytes for, but must be text, or bytes"
        ) from None


def _as_given(pieces: Iterator[list[bytes]], prompts: Sequence[Text]) -> Iterator[list[Text]]:
    """Yield pieces as strings for prompts that are strings; a character comes when its last byte is there."""
    decoders = [
        codecs.getincrementaldecoder("utf-8")("replace") if isinstance(prompt, str) else None
        for prompt in prompts
    ]
    for piece in pieces:
        yield [
            part if decoder is None else decoder.decode(part)
            for part, decoder in zip(piece, decoders, strict=True)
        ]
    rest: list[Text] = [b"" if decoder is None else decoder.decode(b"", final=True) for decoder in decoders]
    if any(rest):
        yield rest
