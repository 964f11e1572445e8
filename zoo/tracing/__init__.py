"""Tracing: the verified channel groups of a network, from an example input."""
