"""Triton kernels of packed linears."""
