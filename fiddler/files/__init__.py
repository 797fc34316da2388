"""Model files: the GGUF container, its tensors as views, and files that appear whole."""
