"""The CPU: its instruction sets, threads and workspaces."""
