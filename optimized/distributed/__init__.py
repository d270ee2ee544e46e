"""Many processes that train one model, by torch.distributed: NCCL between GPUs, gloo between CPUs. Rule: docs/spec/distributed.md."""
