"""Evaluation: how far a file is from its base model, and how evenly it loads its experts, both as llama.cpp runs it.

quality drives llama-perplexity, balance reads the counts of the patched llama.cpp, text mixes files. tasks compares accuracies: items
reads questions, scorer (a program of its own) answers them with libllama. evaluate puts them together.
"""
