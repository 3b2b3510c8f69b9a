"""Weights that stay in files and come into memory layer by layer."""
