"""Incremental decoding with a cache of keys and values."""
