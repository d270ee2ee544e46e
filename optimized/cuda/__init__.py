"""CUDA C++ kernels, compiled at first use, for the calls where Triton's layouts stand in the way. `ops/paths.py` picks them."""
