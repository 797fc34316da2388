"""How weights are stored, and how a vector of them is decoded. One file a format."""
