"""Servers of studies, and what a storage must keep to."""
