"""From a model to numbers: texts, divergence, perplexity, costs of formats."""
