"""One step of a model over sequences, and their KV caches."""
