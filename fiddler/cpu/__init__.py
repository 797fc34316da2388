"""The CPU backend: reads weights from the mapped file, runs steps through our kernels."""
