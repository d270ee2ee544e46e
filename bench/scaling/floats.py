"""Steps of a float twin on several ranks, as a user of PyTorch takes them: DDP that compresses gradients to bfloat16, and FSDP2.

DDP reads the annotations of a hook, and wants classes there: so they are no strings in this file.
"""

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from bench import machine
from bench.peers.twin import TrunkTwin

BYTES_A_WEIGHT: Mapping[str, float] = {"DDP": 4.0, "FSDP2": 6.0}
"""Bytes that a rank of N receives for a weight in a step, over (N - 1) / N, in bfloat16, by the way of training.

DDP reduces gradients in a ring, and gathers the sums: 2 + 2. FSDP2 receives weights for the forward pass, weights for the backward
pass, and gradients: 2 + 2 + 2.
"""


def compressed(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    """Reduce a bucket of gradients in bfloat16, as torch's `bf16_compress_hook` does, which refuses gloo."""
    buffer = bucket.buffer()
    halves = buffer.to(torch.bfloat16).div_(dist.get_world_size())
    work = dist.all_reduce(halves, async_op=True)
    assert work is not None
    return work.get_future().then(lambda done: buffer.copy_(done.value()[0]))


def step_of(way: str, twin: TrunkTwin, ids_BT: Tensor, *, compiled: bool) -> Callable[[], float]:
    """Return what takes a step of a twin and returns the loss of this rank.

    Args:
        way: a key of `BYTES_A_WEIGHT`.
        twin: on the device of the ids, the same on every rank.
        ids_BT: the windows of this rank.
        compiled: whether `torch.compile` makes the kernels: of the whole model under DDP, of each layer under FSDP2. A CPU has its
            front end trace them, and makes none.
    """
    model: nn.Module
    backend = machine.compiler_of(ids_BT.device.type)
    if way == "DDP":
        model = ddp = DistributedDataParallel(twin)
        ddp.register_comm_hook(None, compressed)
        if compiled:
            ddp.compile(backend=backend)
    else:
        model = twin
        mesh = init_device_mesh(ids_BT.device.type, (dist.get_world_size(),))
        # Angles of positions are an input of a layer, and stay in float32.
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16, cast_forward_inputs=False)
        for layer in twin.layers:
            if compiled:
                layer.compile(backend=backend)
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(twin, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss: Tensor = model(ids_BT)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step
