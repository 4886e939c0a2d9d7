"""The GPU kernels, in Triton. ``farshore.kernels.gpu.ops`` holds the public functions.

The folder is named gpu because one named triton, if it came onto ``sys.path``, would hide the real package.
"""
