"""Composition: policies that are better together, without training."""
