"""Measurements, each a program of its own: ``python benchmarks/NAME.py --help``."""
