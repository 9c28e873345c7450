"""The KSA GPT model: layer specs, self-attention with summary projections, norm, builder."""
