"""Rotary position embedding: RoPE with one base for each KV group (HARPE)."""
