"""The GPU backend: dense weights, KV cache and resident experts in its memory; decode steps as CUDA graphs."""
