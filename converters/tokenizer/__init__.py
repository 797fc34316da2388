"""The tokenizer of a Hugging Face folder, as GGUF keys."""
