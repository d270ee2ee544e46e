"""Small random checkpoints, saved by the real libraries, and real ones where a cache holds them."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from conformance.sidecars.media_runs import register, render
from conformance.sidecars.small_checkpoints import write_checkpoints
from conformance.training.nano import without_pictures

LIBRARIES = ("transformers", "diffusers", "optimum.quanto", "PIL", "av")
"""What these tests need."""

REAL = {"vision": "facebook/dinov2-small", "audio": "UsefulSensors/moonshine-base"}
"""Repositories of real checkpoints."""


# Before fixtures, which need the libraries too. Not while tests are collected: the imports take four seconds of every process
# that collects these files.
@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leave a test out where a library is missing, and say which. A file that needs fewer names them in `LIBRARIES`."""
    needed = getattr(getattr(item, "module", None), "LIBRARIES", LIBRARIES)
    if lacking := [said for name in needed if (said := missing(name))]:
        pytest.skip(f"sidecars need {', '.join(lacking)}: pip install 'arbitor[sidecars,media]'")


@functools.cache
def missing(name: str) -> str:
    """Return the name of a library and why it cannot be imported, "" if it can."""
    try:
        importlib.import_module(name)
    except ImportError as error:
        return f"{name} ({error})"
    return ""


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `dinov2/`, `moonshine/`, `vae/config.json` and `vae/pig_vae.safetensors`, small and random."""
    folder = tmp_path_factory.mktemp("sidecars")
    write_checkpoints(folder)
    return folder


@pytest.fixture(scope="session")
def real_checkpoint() -> object:
    """Return a function from `vision` or `audio` to the folder of a real checkpoint; it skips and says where it looked."""

    def find(kind: str) -> Path:
        from huggingface_hub import constants, snapshot_download

        try:
            return Path(snapshot_download(REAL[kind], local_files_only=True))
        except Exception:
            where = os.environ.get("HF_HUB_CACHE", constants.HF_HUB_CACHE)
            pytest.skip(f"no {REAL[kind]} in the cache of the hub, HF_HUB_CACHE ({where})")

    return find


@pytest.fixture(scope="module")
def short() -> Iterator[pytest.MonkeyPatch]:
    """Let the tests of a file take short runs on one thread, without pictures at their end."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        without_pictures(patch)
        register(patch)
        patch.delenv("ARB_BACKEND", raising=False)
        yield patch
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory, checkpoints: Path) -> Path:
    """Return a folder with rendered media of every kind."""
    return render(tmp_path_factory.mktemp("media") / "data", checkpoints)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a folder of features that the tests of a file share."""
    return str(tmp_path_factory.mktemp("features"))
