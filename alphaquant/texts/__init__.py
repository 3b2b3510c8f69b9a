"""Text as windows: sources, documents, conversations, tokens, disjointness."""
