"""Serving engines as models to measure: what they answer, beside the original."""
