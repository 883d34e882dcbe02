"""Latency that can be trusted: distributions, of the whole way from observation to action, with the state of the machine."""
