"""Checkpoints: identity of the model settings, Hugging Face import, optimizer state."""
