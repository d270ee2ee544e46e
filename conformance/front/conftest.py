"""What the tests of `arbitor` itself share with those of the trainer: one thread, the preset ``nano``, and a text."""

from conformance.training.conftest import few_programs, nano_preset, one_thread, pictures, text

__all__ = ["few_programs", "nano_preset", "one_thread", "pictures", "text"]
