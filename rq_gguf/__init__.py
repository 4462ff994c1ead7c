"""Replicate-and-Quantize for GGUF: copies of busy experts and per-expert types under one byte budget."""

__version__ = "0.1.0"
