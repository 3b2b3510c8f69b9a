"""From weights to packed weights: models, Hessians, GPTQ, the bank, packed checkpoints."""
