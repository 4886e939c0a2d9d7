"""The GPU's kernels, in Triton. ``farshore.kernels.gpu.ops`` holds the public functions.

Named gpu, not triton: inside a folder of that name a stray ``sys.path`` entry would hide the real one.
"""
