"""Every replacement of something in Megatron or torch, one file a cause."""
