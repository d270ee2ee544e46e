"""The trainer: corpora, baselines, schedule, checkpoints, monitoring, the loop, and generation."""
