"""Evaluation of long contexts: sliding-window perplexity and RULER's needle tests."""
