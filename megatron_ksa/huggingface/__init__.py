"""Conversion of checkpoints between the Hugging Face layout and Megatron's distributed format."""
