"""Settings of the training data beyond Megatron's own data flags."""

from dataclasses import dataclass

from megatron_ksa.config.options import option


@dataclass(frozen=True)
class DataConfig:
    """Which tokens of the datasets count in the loss, and what is checked of them."""

    response_loss_only: bool = option(
        False, "Count the loss only on the tokens that a dataset's loss mask (PREFIX_loss_mask.bin, .idx) allows, the "
        "responses of instructions. A dataset without one counts everywhere.", flag="--response-loss-only"
    )  # fmt: skip
    check_token_ids: bool = option(
        False, "Read all tokens of the datasets at start and refuse an id that the model has no row for. Without it "
        "such an id ends the run when its sample is read.", flag="--check-token-ids"
    )  # fmt: skip
