"""Shipped contract suites and builders, for tests of code that plugs into AlphaQuant."""
