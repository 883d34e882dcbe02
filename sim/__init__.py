"""Simulated tasks; imports robopolicy, never the other way round."""
