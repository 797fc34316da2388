"""From a request to text: scheduling, decoding loops, beam search, stop strings."""
