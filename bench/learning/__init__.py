"""Which rule learns: one architecture, one order of bytes, several rules. `python -m bench.learning --help`."""
