"""Requests and results as JSON, for batch files and servers. Prints nothing."""
