"""Architectures, one file each. Knows torch and shapes; not where experts or linears run.

`config.py` needs neither torch nor numpy, so importing this room is cheap.
"""
