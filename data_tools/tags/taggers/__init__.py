"""Taggers: an LLM behind an OpenAI-compatible endpoint, offline keyphrases, and tags already in the data."""
