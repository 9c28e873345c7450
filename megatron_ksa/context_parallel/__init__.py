"""Context parallelism of KSA: halos of text K/V and gathered summary K/V, or an all-to-all over heads."""
