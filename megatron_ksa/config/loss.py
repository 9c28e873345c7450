"""Settings of the language-model loss."""

from dataclasses import dataclass

from megatron_ksa.config.options import option
from megatron_ksa.errors import UsageError

# Bytes of the float32 logits that may exist at a time where --loss-chunk-rows does not say.
LOGITS_LIMIT = 2**30
# GiB of a micro-batch's logits that are kept for the backward pass where no flag says.
KEPT_LOGITS = 3.0


@dataclass(frozen=True)
class LossConfig:
    """How much of the logits exists at a time.

    Raises:
        UsageError: a negative number of rows or GiB.
    """

    chunk_rows: int | None = option(
        None, "Compute output layer and cross-entropy in chunks of this many tokens, forward and backward, so that the "
        "logits of a whole sequence never exist; 0: all tokens at once. Unset: chunks of up to 1 GiB of float32 logits "
        "a rank where the micro-batch's logits are larger than that."
    )  # fmt: skip

    kept_logits: float | None = option(
        None, "Keep a micro-batch's logits from the forward to the backward pass, in place of computing them again, "
        "where they take at most this many GiB in the parameters' precision; they are computed in one chunk. Unset: "
        f"{KEPT_LOGITS:g} where --loss-chunk-rows is unset too, else 0."
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.kept_logits is not None and not 0 <= self.kept_logits < float("inf"):
            raise UsageError(f"--loss-kept-logits is {self.kept_logits}: use a number of GiB, or 0 for none")
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

    def keeps_logits(self, tokens: int, vocabulary: int, itemsize: int) -> bool:
        """Whether logits that do not exist at once as float32 are kept in the parameters' precision.

        Args:
            tokens, vocabulary: as in `rows_at_a_time`.
            itemsize: bytes of a parameter.
        """
        limit = self.kept_logits
        if limit is None:
            limit = KEPT_LOGITS if self.chunk_rows is None else 0.0
        return self.rows_at_a_time(tokens, vocabulary) < tokens and itemsize * tokens * vocabulary <= limit * 2**30
