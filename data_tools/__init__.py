"""Tokenizers, readers and writers of training data (imported as megatron_ksa.data_tools)."""
