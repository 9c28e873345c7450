"""How the next token of a text is chosen, and where the text ends."""

import sys
from dataclasses import dataclass

from megatron_ksa.config.options import option
from megatron_ksa.errors import UsageError


@dataclass(frozen=True)
class SamplingSettings:
    """How a text goes on.

    Raises:
        UsageError: a value out of range.
    """

    temperature: float = option(0.0, "Logits are divided by it; 0 takes the most likely token.", flag="--temperature")
    top_k: int = option(0, "Choose among so many of the most likely tokens; 0 for all.", flag="--top-k")
    top_p: float = option(
        1.0, "Choose among the fewest most likely tokens that have this probability together.", flag="--top-p"
    )
    seed: int = option(
        0, "Of the random numbers. A prompt has the same text with the same seed, whatever else runs.", flag="--seed"
    )
    stop: tuple[str, ...] = option((), "Strings that end a text; they are no part of it.", flag="--stop")
    max_new_tokens: int = option(128, "Tokens of a text at most.", flag="--max-new-tokens")

    def __post_init__(self) -> None:
        def refuse(name: str, rule: str) -> None:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)!r}: {rule}")

        for name in ("temperature", "top_p"):
            value = getattr(self, name)
            # No float64: infinite, no number, or an integer of hundreds of digits.
            if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
                refuse(name, "a number is needed")
        for name in ("top_k", "seed", "max_new_tokens"):
            if isinstance(getattr(self, name), bool) or not isinstance(getattr(self, name), int):
                refuse(name, "an integer is needed")
        if self.temperature < 0:
            refuse("temperature", "0 (the most likely token) or more")
        if self.top_k < 0:
            refuse("top_k", "0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            refuse("top_p", "above 0, at most 1")
        if not 0 <= self.seed < 2**63:
            refuse("seed", "from 0 to 2^63 - 1")
        if self.max_new_tokens < 1:
            refuse("max_new_tokens", "at least 1")
        if not isinstance(self.stop, tuple) or not all(isinstance(text, str) and text for text in self.stop):
            refuse("stop", "strings that are not empty")

    @property
    def is_greedy(self) -> bool:
        """No random number is used."""
        return self.temperature == 0

    @property
    def filters(self) -> bool:
        """Some tokens are left out."""
        return self.top_k > 0 or self.top_p < 1
