"""The CPU backend: loads weights from the mapping, runs steps through our kernels."""
