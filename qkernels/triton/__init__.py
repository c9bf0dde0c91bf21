"""Triton kernels for CUDA tensors, one file an op family; `qkernels.backends` imports them at the first launch.

With TRITON_INTERPRET=1 set before the import they also run, slowly, on CPU tensors.
"""
