"""Experts that do not fit the GPU: residents, copies, plans, and their computation on CPU and GPU."""
