"""Triton kernels, one op family a file. Each file's functions only launch; arguments are checked in `optimized/ops`."""
