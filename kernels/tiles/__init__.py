"""Tile shapes of the Triton kernels: the table, what the compiler makes of its rows, and how to measure new ones."""
