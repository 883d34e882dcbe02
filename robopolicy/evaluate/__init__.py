"""Evaluation as statistics."""
