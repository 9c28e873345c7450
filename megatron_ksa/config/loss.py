"""Settings of the language-model loss."""

from dataclasses import dataclass

from megatron_ksa.config.options import option
from megatron_ksa.errors import UsageError

# Bytes of the float32 logits that may exist at a time where --loss-chunk-rows does not say.
LOGITS_LIMIT = 2**30


@dataclass(frozen=True)
class LossConfig:
    """How much of the logits exists at a time.

    Raises:
        UsageError: a negative number of rows.
    """

    chunk_rows: int | None = option(
        None, "Compute output layer and cross-entropy in chunks of this many tokens, forward and backward, so that the "
        "logits of a whole sequence never exist; 0: all tokens at once. Unset: chunks of up to 1 GiB of float32 logits "
        "a rank where the micro-batch's logits are larger than that."
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.chunk_rows is not None and self.chunk_rows < 0:
            raise UsageError(f"--loss-chunk-rows is {self.chunk_rows}: use a number of tokens, or 0 for no chunks")

    def rows_at_a_time(self, tokens: int, vocabulary: int) -> int:
        """Tokens whose logits exist at a time.

        Args:
            tokens: of a micro-batch on this rank, before sequence parallelism divides them.
            vocabulary: padded words of this tensor-parallel rank.

        Returns:
            `tokens` where they are computed at once; otherwise fewer, a power of two where the flag is unset.
        """
        if self.chunk_rows is not None:
            return min(self.chunk_rows or tokens, tokens)
        if 4 * tokens * vocabulary <= LOGITS_LIMIT:
            return tokens
        fit = max(LOGITS_LIMIT // (4 * vocabulary), 1)
        return min(1 << (fit.bit_length() - 1), tokens)
