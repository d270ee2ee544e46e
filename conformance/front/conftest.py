"""What the tests of `arbitor` itself share with those of the trainer: one thread, the preset ``nano``, and a text."""

from conformance.training.conftest import nano_preset, one_thread, pictures, text, wide_programs

__all__ = ["nano_preset", "one_thread", "pictures", "text", "wide_programs"]
