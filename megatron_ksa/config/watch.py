"""Settings of how ranks watch each other."""

import math
from dataclasses import dataclass

from megatron_ksa.config.options import option
from megatron_ksa.errors import UsageError


@dataclass(frozen=True)
class WatchConfig:
    """Ranks that stand still are named.

    Raises:
        UsageError: a time that is no number above 0.
    """

    seconds: float = option(
        120.0, "Name the ranks that the others wait for when a rank has not moved for so many seconds; the run goes "
        "on. --distributed-timeout-minutes ends it.", flag="--name-missing-ranks-after"
    )  # fmt: skip

    def __post_init__(self) -> None:
        if not 0 < self.seconds < math.inf:
            raise UsageError(f"--name-missing-ranks-after is {self.seconds:g}: it must be a number of seconds above 0")
