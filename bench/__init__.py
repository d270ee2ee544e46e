"""Benchmarks: every op of the table and one train step, against the reference and against peers. See docs/benchmarks.md."""
