"""Figures of a report: the front, trials, stages, and where the bits went."""
