"""Products of weight rows with groups of tokens: tiles, blocks, packing and the grouped kernel."""
