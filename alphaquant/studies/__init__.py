"""Composition: from what a user asks for to a study, its report and a checkpoint."""
