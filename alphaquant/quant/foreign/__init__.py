"""Weights that other tools quantized, taken as they are.

`exact_formats` puts one into a packed format of ours where that holds it exactly, `candidates`
fills a bank from whole checkpoints.
"""
