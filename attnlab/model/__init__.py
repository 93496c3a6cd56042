"""A LLaMA with G key/value heads: cache, layers, model, generation, checkpoints."""
