"""Model files: the GGUF container, its tensors as views, and atomic writes."""
