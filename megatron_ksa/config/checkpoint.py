"""Settings of checkpoints beyond Megatron's own."""

from dataclasses import dataclass

from megatron_ksa.config.options import option


@dataclass(frozen=True)
class CheckpointConfig:
    """What is trusted of a checkpoint, and how its files are checked."""

    trust: bool = option(
        False, "Load objects of any class from checkpoints. A checkpoint that somebody else wrote can then run any "
        "code.", flag="--trust-checkpoint"
    )  # fmt: skip
    content_sums: bool = option(
        True, "Store a checksum of every file of a checkpoint when it is saved, and compare it when it is loaded; "
        "sizes are compared in any case.", flag="--checkpoint-sums"
    )  # fmt: skip
