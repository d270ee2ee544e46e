"""Models on this machine and on a hub: read, fetched and sent. `arbitor.optimized.training.model_folder` has their files."""

from __future__ import annotations

import re
import warnings
from os import PathLike
from pathlib import Path
from types import ModuleType

from arbitor.optimized.training.checkpoint import Checkpoint
from arbitor.optimized.training.model_folder import CONFIG_FILE, WEIGHTS_FILE, read_model
from arbitor.reference.config import ArbConfig
from arbitor.sidecars import SidecarError
from arbitor.sidecars.libraries import library

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
"""What a model on a hub is called: OWNER/NAME."""


def read_source(source: str | PathLike[str], revision: str | None = None) -> tuple[ArbConfig, Checkpoint]:
    """Return configuration and checkpoint of a folder, a run, a checkpoint file, or a model on a hub; both were verified.

    Args:
        source: see `ArbModel.from_pretrained`.
        revision: of a model on a hub.

    Raises:
        FileNotFoundError: there is no such file or folder, nor a model on the hub, or the folder holds no model.
        CheckpointError: what is there cannot be trusted.
        ImportError: the source is on a hub, and huggingface_hub is not installed.
        ValueError: a revision of what is here.
    """
    path = Path(source)
    if path.exists():
        if revision is not None:
            raise ValueError(
                f"revision is {revision!r}, but must be None for {str(source)!r}, which is not on a hub"
            )
    elif isinstance(source, str) and HUB_ID.fullmatch(source):
        path = _fetched(source, revision)
    else:
        raise FileNotFoundError(
            f"there is no folder or file {str(source)!r}, and a model on a hub is called OWNER/NAME"
        )
    return read_model(path, lambda refusal: warnings.warn(refusal, stacklevel=5))


def send_folder(folder: Path, name: str, *, private: bool | None, message: str) -> str:
    """Create a model on the hub, unless it is there, upload a folder to it, and return the address of the commit."""
    if not isinstance(name, str):
        raise TypeError(f"name is a {type(name).__name__}, but must be OWNER/NAME")
    if not HUB_ID.fullmatch(name):
        raise ValueError(f"name is {name!r}, but must be OWNER/NAME")
    api = _hub().HfApi()
    api.create_repo(name, private=private, exist_ok=True)
    commit = api.upload_folder(repo_id=name, folder_path=str(folder), commit_message=message)
    return str(commit.commit_url)


def _fetched(name: str, revision: str | None) -> Path:
    """Return the folder on this machine of a model on a hub: its two files, and nothing else of it."""
    hub = _hub(f"there is no folder {name!r} here, and ")
    try:
        return Path(
            hub.snapshot_download(name, revision=revision, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE])
        )
    # Whatever it is (network, rights, names), the library's first line says it best.
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise FileNotFoundError(
            f"there is no folder {name!r} here, and no such model could be fetched from the hub: {reason}"
        ) from error


def _hub(why: str = "") -> ModuleType:
    """Return huggingface_hub; raise ImportError with the command that installs it."""
    try:
        return library("huggingface_hub")
    except SidecarError as error:
        raise ImportError(
            f"{why}the hub needs the package 'huggingface_hub', which is not installed: pip install 'arbitor[hub]'"
        ) from error
