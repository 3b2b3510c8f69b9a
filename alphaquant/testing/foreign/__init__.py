"""Checkpoints of other tools, for tests."""
