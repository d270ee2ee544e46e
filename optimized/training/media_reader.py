"""Files of media as what a model takes of them: features, latents and tokens. Which files can be decoded is found out once.

Legend: B items of a batch, N vectors or tokens, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from arbitor.optimized.training.media_files import Item
from arbitor.optimized.training.media_speech import TOGETHER, padded, tokens_of
from arbitor.reference.graph.codec import AudioCodec
from arbitor.reference.graph.targets import NO_TOKEN
from arbitor.sidecars import MachineError, SidecarError, read_audio, read_image, read_video
from arbitor.sidecars.audio import SAMPLE_RATE, refuse_clip
from arbitor.sidecars.encoders import Encoders, whole_seconds

MAX_CLIP_SECONDS = 30
"""Longest sound that is learned from, in seconds. Attention is over all of its frames, 41 and two thirds a second."""

Say = Callable[[str], None]
"""What is told a sentence."""

GROUPS_KEPT = 4096
"""Groups of neighbouring sounds whose tokens are kept, at most: 400 MB of the longest sounds. The oldest goes first, and is made
again."""

CLIPS_KEPT = 16
"""Sounds that stay decoded, at most. One item is asked for its length, whether it can be read, and its samples."""


class MediaReader:
    """Reads items of media through encoders.

    Attributes:
        encoders: of pictures, sounds and videos, with their cache.
        side: rows of the latent of a frame.
        warn: is told one sentence for each file that cannot be decoded.
        speech: the sounds that a run learns to say, of which neighbours become tokens in one pass.
    """

    def __init__(self, encoders: Encoders, *, side: int) -> None:
        self.encoders, self.side = encoders, side
        self.warn: Say = lambda sentence: None
        self.speech: Sequence[Item] = ()
        self._together: dict[bytes, list[Item]] | None = None
        self._codec: AudioCodec | None = None
        # By kind, since one file may be asked for as several media.
        self._unreadable: set[tuple[str, str]] = set()
        self._decoded: set[tuple[str, bytes]] = set()
        self._seconds: dict[bytes, int] = {}
        self._clips: dict[bytes, Tensor] = {}
        # By the content of the first sound of a group, then by content.
        self._tokens: dict[bytes, dict[bytes, Tensor]] = {}

    @property
    def codec(self) -> AudioCodec:
        """What makes tokens of speech. It is set once it has learned; before, a RuntimeError is raised."""
        if self._codec is None:
            raise RuntimeError("codec was read, but the run must learn from speech, and have begun")
        return self._codec

    @codec.setter
    def codec(self, codec: AudioCodec) -> None:
        self._codec = codec

    def clip(self, item: Item) -> Tensor:
        """Return the sound of an item, float32 [T] at 16 kHz, MAX_CLIP_SECONDS at most. Nobody may change it."""
        found = self._clips.pop(item.content, None)
        if found is None:
            found = read_audio(item.medium(), max_seconds=MAX_CLIP_SECONDS)
        # The newest stands last.
        self._clips[item.content] = found
        if len(self._clips) > CLIPS_KEPT:
            del self._clips[next(iter(self._clips))]
        return found

    def feature(self, kind: str, item: Item, seconds: int | None = None) -> Tensor:
        """Return the features of an item, its latent, or its tokens; of a sound that is filled up to some seconds."""
        if kind == "speech":
            return self._spoken(item)
        if kind == "image":
            return self.encoders.features("vision", item.content, lambda: read_image(item.medium()))
        if kind == "video":
            return self.encoders.features(
                "video", item.content, lambda: read_video(item.medium(), max_frames=1).frames, side=self.side
            )
        seconds = seconds or self._seconds_of(item)
        filled = seconds * SAMPLE_RATE
        return self.encoders.features(
            "audio",
            item.content + seconds.to_bytes(4, "little"),
            lambda: whole_seconds(self.clip(item), filled),
        )

    def _spoken(self, item: Item) -> Tensor:
        """Return the tokens of a sound, and keep those of its neighbours in `speech`.

        The neighbours are the same ones whenever the sound is asked for, so that its tokens do not depend on what was drawn before.
        """
        if self._together is None:
            unique = list({each.content: each for each in self.speech}.values())
            groups = [unique[begin : begin + TOGETHER] for begin in range(0, len(unique), TOGETHER)]
            self._together = {each.content: group for group in groups for each in group}
        group = self._together.get(item.content, [item])
        first = group[0].content
        if first not in self._tokens:
            found = [each for each in group if self.is_readable("speech", each)]
            rows = tokens_of(self.codec, [self.clip(each) for each in found])
            if len(self._tokens) == GROUPS_KEPT:
                del self._tokens[next(iter(self._tokens))]
            self._tokens[first] = {
                each.content: row.to(torch.int16) for each, row in zip(found, rows, strict=True)
            }
        return self._tokens[first][item.content].long()

    def _seconds_of(self, item: Item) -> int:
        """Return the whole seconds that a sound fills."""
        if item.content not in self._seconds:
            clip = self.clip(item)
            # Before it is filled up, since silence alone is no sound.
            refuse_clip("a sound", clip)
            self._seconds[item.content] = len(whole_seconds(clip)) // SAMPLE_RATE
        return self._seconds[item.content]

    def of_batch(self, kind: str, items: Sequence[Item]) -> Tensor:
        """Return the features [B, N, F], latents [B, ...] or tokens int64 [B, N] of items that can be decoded.

        Sounds are filled up to the longest of them, and tokens by NO_TOKEN.
        """
        if kind == "speech":
            return padded([self.feature(kind, item) for item in items], NO_TOKEN)
        seconds = max(map(self._seconds_of, items)) if kind == "audio" else None
        return torch.stack([self.feature(kind, item, seconds) for item in items])

    def is_readable(self, kind: str, item: Item) -> bool:
        """Return whether an item can be decoded. Features of what can are made, and kept; a sentence names what cannot.

        Raises:
            TrainingError: the file was changed or is gone.
            MachineError: what decodes it is not installed, or the machine is short of open files, threads or the like.
        """
        decoded, unreadable = (kind, item.content), (kind, str(item))
        if decoded not in self._decoded and unreadable not in self._unreadable:
            try:
                # The codec is trained on what can be decoded, before there are tokens.
                if kind == "speech":
                    refuse_clip("a sound", self.clip(item))
                else:
                    self.feature(kind, item)
                self._decoded.add(decoded)
            except MachineError:
                raise
            except (SidecarError, ValueError) as error:
                # A ValueError is about a medium that was decoded, such as a video of four pixels, and names no file.
                what = f"{str(item)!r}: " if isinstance(error, ValueError) else ""
                self._unreadable.add(unreadable)
                self.warn(f"{what}{error}; the file is left out")
        return unreadable not in self._unreadable
