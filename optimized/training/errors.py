"""The one exception of the trainer that a user is meant to read."""

from __future__ import annotations


class TrainingError(RuntimeError):
    """Something the user can act on, told in one sentence; the command line prints it and exits with 1."""
