"""Weight formats: how each is stored and how a vector of it is decoded. One file a format."""
