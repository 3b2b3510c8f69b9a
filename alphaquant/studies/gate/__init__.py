"""The last comparison on held-out text, and what may be published."""
