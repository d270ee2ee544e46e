"""Ctrl-C while something is imported.

An import takes seconds, and some of what is imported catches everything that is raised meanwhile, so that KeyboardInterrupt would
get lost and the command go on. Nothing that wants an end has begun then, so the process ends at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

IMPORTING = "<frozen importlib"
"""How the file of a function of Python's import system is called."""

SENTENCE = b"arb: stopped by SIGINT.\n"


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGINT end the process while something is imported, and raise KeyboardInterrupt otherwise, until the end of the block.

    Nothing changes outside of the main thread, where signals do not arrive, and where SIGINT has another handler or is ignored.
    """
    handled = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if handled:
        signal.signal(signal.SIGINT, _interrupted)
    try:
        yield
    finally:
        if handled:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupted(number: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code.co_filename.startswith(IMPORTING):
            with contextlib.suppress(OSError):
                os.write(2, SENTENCE)
            os._exit(128 + number)
        frame = frame.f_back
    raise KeyboardInterrupt
