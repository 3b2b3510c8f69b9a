"""Packed models that run: modules, kernels' use, checkpoints, the plug-in of transformers."""
