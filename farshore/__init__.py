"""Farshore: a long-context LLM serving cluster whose attention runs where the memory is."""

__version__ = "0.1.0"
