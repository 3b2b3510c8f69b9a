"""Triton kernels of routed experts in any mix of formats."""
