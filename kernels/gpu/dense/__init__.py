"""The GPU's dense kernels, in Triton. ``farshore.kernels.gpu.dense.ops`` holds the public functions."""
