"""Demonstrations: zarr episodes, windows, normalisers, rotations."""
