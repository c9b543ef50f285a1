"""Native Hybrid Attention language models in JAX: train, evaluate, serve."""
