"""Packed checkpoints in stock vLLM: a plug-in that is found by its entry point."""
