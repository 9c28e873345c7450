"""Long-context pretraining on Megatron-Core: Kwai Summary Attention (KSA), HARPE and TAGS."""

__version__ = "0.1.0"
