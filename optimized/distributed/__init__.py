"""Many processes that train one model, by torch.distributed: NCCL between GPUs, gloo between CPUs.

The rule is docs/spec/distributed.md.
"""
