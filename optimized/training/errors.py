"""The exceptions of the trainer that a user is meant to read."""

from __future__ import annotations


class TrainingError(RuntimeError):
    """Something the user can act on, told in one sentence; the command line prints it and exits with 1."""


class NoModelError(TrainingError, FileNotFoundError):
    """A folder that holds no model. From Python it is a file that is not there, as other libraries say it."""
