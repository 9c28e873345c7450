"""Generation with a cache of keys and values: `Generator` for requests, `DecodingState` for a loop of one's own."""

from megatron_ksa.config.sampling import SamplingSettings
from megatron_ksa.inference.generator import Completion, Generator, Request
from megatron_ksa.inference.state import DecodingState

__all__ = ["Completion", "DecodingState", "Generator", "Request", "SamplingSettings"]
