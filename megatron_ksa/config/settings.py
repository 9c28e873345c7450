"""What the flags of this project say, as one object that is handed down from the entry point."""

from dataclasses import dataclass, field

from megatron_ksa.config.checkpoint import CheckpointConfig
from megatron_ksa.config.data import DataConfig
from megatron_ksa.config.distill import DistillConfig
from megatron_ksa.config.fit import FitConfig
from megatron_ksa.config.kernels import KernelConfig
from megatron_ksa.config.ksa import KSAConfig
from megatron_ksa.config.loss import LossConfig
from megatron_ksa.config.stage import StageConfig
from megatron_ksa.config.watch import WatchConfig


@dataclass(frozen=True)
class RunSettings:
    """What the flags say beyond Megatron's own settings.

    Attributes:
        ksa: KSA settings.
        bases: HARPE bases, one for each KV group, or None without `--position-embedding-type harpe`.
        override_bases: a checkpoint may have been written with other bases.
        loss: how the loss is computed, for Megatron's own model too.
        data: which tokens of the datasets count in the loss.
        kernels: which implementation attention and rotation take.
        distill: distillation of the summary parameters.
        stage: what the run trains and logs.
        checkpoint: what is trusted of checkpoints and how their files are checked.
        watch: how ranks watch each other.
        fit: recompute that is chosen by the memory model.
    """

    ksa: KSAConfig
    bases: tuple[float, ...] | None
    override_bases: bool = False
    loss: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    kernels: KernelConfig = field(default_factory=KernelConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    stage: StageConfig = field(default_factory=StageConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    fit: FitConfig = field(default_factory=FitConfig)

    @property
    def train(self) -> str:
        """Which parameters train, `summary` or `all`."""
        return self.stage.train or ("summary" if self.distill.enabled else "all")

    @property
    def is_megatron(self) -> bool:
        """Neither KSA nor HARPE is on: the model is Megatron's own."""
        return not self.ksa.enabled and self.bases is None
