"""What several ranks gain: steps, exchange and memory, beside float twins under DDP and FSDP2. See `python -m bench.scaling`."""
