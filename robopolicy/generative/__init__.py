"""Gaussian paths, the one update rule, samplers and losses."""
