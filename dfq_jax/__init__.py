"""Data-free quantization in JAX."""
