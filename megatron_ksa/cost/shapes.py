"""A model's sizes and a run's layout, of which every cost is a function."""

from dataclasses import dataclass
from functools import lru_cache

from megatron_ksa.config.ksa import KSAConfig, KSALayer, LayerKind
from megatron_ksa.config.loss import LossConfig
from megatron_ksa.config.recompute import NONE, Recompute


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model.

    Attributes:
        ksa: KSA settings; with `ksa.enabled` off every layer is full attention.
        vocabulary: padded words.
        gated: the MLP has a gate (SwiGLU).
        tied: the output layer's weight is the embedding's.
        norm_vectors: parameter vectors of a norm, 1 for RMSNorm and 2 for LayerNorm.
        angles_per_head: rotary angles differ between heads (HARPE).
    """

    ksa: KSAConfig
    num_layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    gated: bool = True
    tied: bool = False
    qk_norm: bool = False
    bias: bool = False
    qkv_bias: bool = False
    norm_vectors: int = 1
    angles_per_head: bool = False

    @property
    def query(self) -> int:
        """Width of the queries of all heads."""
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        """Width of the keys of all heads; the values' too."""
        return self.kv_heads * self.head_dim

    def layers(self, text_length: int) -> tuple[KSALayer, ...]:
        """Kind and window of every layer."""
        return _layers(self.ksa, self.num_layers, text_length)


@lru_cache(256)
def _layers(ksa: KSAConfig, num_layers: int, text_length: int) -> tuple[KSALayer, ...]:
    if ksa.enabled:
        return ksa.layers(num_layers, text_length)
    return (KSALayer(LayerKind.FULL, 0),) * num_layers


@dataclass(frozen=True)
class TrainingLayout:
    """How a model is trained: parallel sizes, batch, precision, recompute.

    Attributes:
        text_length: n, text tokens in a sequence.
        micro_batch: sequences in a micro-batch; `num_micro_batches` of them in a step of one data-parallel rank.
        virtual_stages: model chunks of a pipeline rank (interleaved schedule), 1 without.
        parameter_bytes: 2 for bfloat16 and float16, 4 for float32.
        gradient_bytes: of an element of the gradient buffers, 4 unless gradients are reduced in 16 bits.
        recompute: what each model chunk computes again in the backward pass.
        context_comm: `--cp-comm-type`, of all layers or one a layer: p2p or a2a.
        fused_norm: the norm saves its input only, as torch's does on a GPU; otherwise also its normalised rows.
        fused_swiglu: the gated activation saves its input only (`--bias-swiglu-fusion`).
        fused_attention: KSA attention runs in its kernels; in plain PyTorch text and summary queries have outputs of
            their own, and summary queries gather their keys.
        fused_rotation: Q/K norm and rotation run in one kernel that saves the projected heads only.
        fused_gradient: the output layer's gradient goes straight to the buffer (gradient accumulation fusion).
        train: `summary` where all but the summary parameters are frozen, whose inputs are then not saved.
        distills: the model is its own teacher.
        compares_attention: distillation compares the attention outputs of KSA layers.
        teacher_on_host: the teacher's outputs wait for layers that are recomputed whole in host memory
            (`--ksa-distill-offload`).
        resets_documents: documents of a sequence do not see each other.
    """

    text_length: int
    micro_batch: int = 1
    num_micro_batches: int = 1
    tensor_parallel: int = 1
    context_parallel: int = 1
    pipeline_parallel: int = 1
    data_parallel: int = 1
    virtual_stages: int = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = True
    parameter_bytes: int = 2
    gradient_bytes: int = 4
    recompute: Recompute = NONE
    context_comm: tuple[str, ...] = ("p2p",)
    loss: LossConfig = LossConfig()
    fused_norm: bool = True
    fused_swiglu: bool = True
    fused_attention: bool = True
    fused_rotation: bool = False
    fused_gradient: bool = False
    train: str = "all"
    distills: bool = False
    compares_attention: bool = True
    teacher_on_host: bool = False
    resets_documents: bool = False

    @property
    def rank_text(self) -> int:
        """Text tokens of a micro-batch on one rank, before sequence parallelism divides them."""
        return self.text_length * self.micro_batch // self.context_parallel

    @property
    def row_shards(self) -> int:
        """Ranks among which rows outside attention and MLP are divided."""
        return self.tensor_parallel if self.sequence_parallel else 1

    def comm(self, number: int) -> str:
        """The kind of context parallelism of a layer, by its number in the model."""
        return self.context_comm[number % len(self.context_comm)]
