"""Kernels tested without a GPU: interpreted quickly, or counted."""
