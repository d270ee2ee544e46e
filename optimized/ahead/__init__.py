"""Kernels compiled ahead of the first pass. Triton alone would compile them one after the other, where they are launched.

Another process walks through the pass (`__main__`). Its tensors have no memory, and its launches are noted and not made
(`absent_gpu`). Processes that it has forked, as many as there are CPU cores, compile what it notes. Kernels go to the caches on
disk that every process reads. Meanwhile the process that trains builds its model, and begins its first pass. A launch whose kernel
is not in the caches yet waits until it is, or until the other process has ended (`start`).

What the walk does not come to is compiled at its first launch, as everything is without it. No fault of the other process changes
anything but the time that the first pass takes.
"""
