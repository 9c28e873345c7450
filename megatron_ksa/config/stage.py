"""What a run trains and logs of a KSA model: settings of one stage on the way from a dense model."""

from dataclasses import dataclass

from megatron_ksa.config.options import option

TRAIN = ("summary", "all")


@dataclass(frozen=True)
class StageConfig:
    """One stage of training."""

    train: str | None = option(
        None, "Which parameters train: summary (the summary embedding and the projections and norms of summary rows; "
        "the others are frozen) or all. Unset: summary with --ksa-distill, else all.", choices=TRAIN
    )  # fmt: skip
    log_attention_share: bool = option(
        False, "Log the share of attention that text queries give to summaries in the k layers, mean over heads and "
        "text. It costs another forward pass of their attention."
    )  # fmt: skip
