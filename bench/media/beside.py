"""A second process that makes features of media beside a run, which finds them in a cache that both share.

A feature depends on its file and its sidecar alone, so a run ends with the same bits whoever made it. What the second process has
not made yet, the run makes itself.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from arbitor.optimized.training.media import encoders_of
from arbitor.optimized.training.media_files import load_media
from arbitor.optimized.training.media_reader import MediaReader
from arbitor.sidecars import FeatureCache


@contextmanager
def features_beside(
    folders: Mapping[str, str], sidecars: Mapping[str, str], *, cache: str, side: int
) -> Iterator[None]:
    """Make features of folders of media in another process within the block, which ends it.

    Args:
        folders: by kind: `image`, `audio` or `video`.
        sidecars: settings of the trainer that name them.
        cache: folder of the features.
        side: rows of the latent of a frame.
    """
    # Forked, it would have copies of locks that threads of torch hold.
    process = multiprocessing.get_context("spawn").Process(
        target=make_features, args=(dict(folders), dict(sidecars), cache, side), daemon=True
    )
    process.start()
    try:
        yield
    finally:
        process.terminate()
        process.join()


def make_features(folders: dict[str, str], sidecars: dict[str, str], cache: str, side: int) -> None:
    """Make the features of every file of some folders, on one thread."""
    # The number of threads is part of what a feature is kept under.
    torch.set_num_threads(1)
    encoders = encoders_of(sidecars, device="cpu")
    encoders.cache = FeatureCache(cache)
    reader = MediaReader(encoders, side=side)
    for kind, source in folders.items():
        folder = load_media(kind, source)
        for item in (*folder.train, *folder.validation):
            reader.is_readable(kind, item)
