"""Rotating the residual stream of a model, offline: the same function with other weights."""
