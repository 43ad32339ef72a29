"""Casts on CUDA: Triton kernels that write the bits of the references. `launch` is what the dispatch table knows;
Triton itself is imported with the first call.
"""
