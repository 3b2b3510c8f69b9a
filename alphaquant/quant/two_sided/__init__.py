"""Rounding that knows what errors of outputs cost."""
