"""The GPU backend: dense weights, KV cache and resident experts in its memory; steps as CUDA graphs."""
