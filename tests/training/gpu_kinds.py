"""The kinds of runs that `gpu_check.py` trains on GPUs, and what each is compared with."""

from dataclasses import dataclass

from nccl_layouts import EXPERTS

STEPS = 8
# Heads of 128 channels have the warp-specialised kernels on Hopper; a window ends within the sequence.
SIZE = (
    "--hidden-size 256 --ffn-hidden-size 512 --kv-channels 128 --seq-length 1024 --max-position-embeddings 1024 "
    "--ksa-window-chunks 16"
)
COMMON = f"--train-iters {STEPS} --no-check-for-nan-in-loss-and-grad {SIZE}"
LOCAL, TE = "--transformer-impl local", "--transformer-impl transformer_engine"
GRAPH = "--cuda-graph-impl full_iteration --cuda-graph-warmup-steps 3"
LAYER_GRAPHS = "--cuda-graph-impl local --cuda-graph-warmup-steps 3"
# At a = 1 a run without graphs does not blend, and rounds elsewhere than a graph, which always does.
FROM_1 = "--ksa-anneal-start 1 --ksa-anneal-end 7"
ANNEAL = f"{FROM_1} --ksa-initial-coefficient 0.9"
APART = f"{LOCAL} --kernels-apart norm activation residual optimizer gradients embedding checks --loss-kept-logits 0"
RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
FUSER = "--use-transformer-engine-op-fuser"
NORMS_AGAIN = "--recompute-granularity selective --recompute-modules layernorm"
# Rows that the kernel of norms takes: Transformer Engine's layers have their norms beside the products then.
WIDE = "--hidden-size 512 --ffn-hidden-size 1024"
# Fused modules of norm and product, FusedAdam's own steps, zeroed gradients: what these layers were before.
AS_BEFORE = "--kernels-apart norm optimizer gradients"
DISTRIBUTED = "--use-distributed-optimizer"
BUCKETS = f"{DISTRIBUTED} --overlap-grad-reduce --ddp-bucket-size 1 --dist-ckpt-optim-fully-reshardable"
SHARED = "--no-ksa-independent-projections"
# PyTorch's own norm, which saves its input in C++.
LAYER_NORM = "--normalization LayerNorm"
# A model without summaries, for distillation to begin with.
DENSE = f"{LOCAL} --no-ksa --train-iters 1 --init-method-std 0.2"
DISTIL = "--ksa-distill --init-method-std 0.2"
CP, TP = "--context-parallel-size 2", "--tensor-model-parallel-size 2"
A2A = f"{CP} --cp-comm-type a2a"
# FP8's products round to 2 and 3 bits. Of the 1.9B model's first gradient norm tensorwise was 0.2 % and blockwise 1.2 %
# from 16 bits; delayed was 82 % below while its scales began at 1.
FIRST_GRADIENT = 5e-2


def fp8(recipe: str) -> str:
    return f"{TE} --fp8-format hybrid --fp8-recipe {recipe}"


@dataclass(frozen=True)
class Kind:
    """A run and what it is compared with.

    Attributes:
        flags: of the trainer.
        like: the kind whose losses it must have; None for a run that others are compared with alone.
        limit: largest relative deviation. Kernels and PyTorch round 16-bit numbers elsewhere; FP8 rounds to 3 bits.
        norms: gradient norms are compared too.
        gradient: largest relative deviation of the gradient norm of this run's own first step.
        first: flags of a run that is saved halfway, from where this one goes on.
        start: flags of a run whose weights this one begins with.
        ranks: GPUs.
        precision: of parameters and activations.
    """

    flags: str
    like: str | None = "kernels"
    limit: float = 1e-3
    norms: bool = False
    gradient: float | None = None
    first: str | None = None
    start: str | None = None
    ranks: int = 1
    precision: str = "--bf16"

    @property
    def uses_te(self) -> bool:
        return TE in self.flags or TE in (self.first or "")


KINDS = {
    "kernels": Kind(LOCAL, like=None),
    "reference": Kind(f"{LOCAL} --kernels-reference"),
    # In bf16 both round elsewhere: gradient norms were 1.4e-3 and 1.6e-3 apart on two H100, those of PyTorch alone
    # 2.4e-3. Whether the numbers are the same shows in float32: there they were 1.7e-6 apart.
    "apart": Kind(APART),
    "float32": Kind(LOCAL, like=None, precision=""),
    "float32_apart": Kind(APART, like="float32", limit=1e-5, norms=True, precision=""),
    "full_iteration": Kind(f"{LOCAL} {GRAPH}", norms=True),
    "local": Kind(f"{LOCAL} {LAYER_GRAPHS}", norms=True),
    "anneal": Kind(f"{LOCAL} {ANNEAL}", like=None),
    "anneal_full_iteration": Kind(f"{LOCAL} {ANNEAL} {GRAPH}", like="anneal", norms=True),
    "anneal_local": Kind(f"{LOCAL} {ANNEAL} {LAYER_GRAPHS}", like="anneal", norms=True),
    "anneal_from_1": Kind(f"{LOCAL} {FROM_1}", like=None),
    "anneal_from_1_full_iteration": Kind(f"{LOCAL} {FROM_1} {GRAPH}", like="anneal_from_1"),
    "wide_local": Kind(f"{LOCAL} {WIDE} {LAYER_GRAPHS}", like="wide", norms=True),
    "layer_norm": Kind(f"{LOCAL} {LAYER_NORM}", like=None),
    "layer_norm_local": Kind(f"{LOCAL} {LAYER_NORM} {LAYER_GRAPHS}", like="layer_norm", norms=True),
    "distil": Kind(f"{LOCAL} {DISTIL}", like=None, start=DENSE),
    "te": Kind(TE),
    "te_full_iteration": Kind(f"{TE} {GRAPH}", like="te", norms=True),
    "te_local": Kind(f"{TE} {LAYER_GRAPHS}", like="te", norms=True),
    "te_anneal": Kind(f"{TE} {ANNEAL}", like="anneal"),
    "te_anneal_full_iteration": Kind(f"{TE} {ANNEAL} {GRAPH}", like="te_anneal", norms=True),
    "te_independent_norms": Kind(
        f"{TE} --ksa-independent-layernorm --ksa-independent-qk-norm", like="independent_norms"
    ),
    "independent_norms": Kind(f"{LOCAL} --ksa-independent-layernorm --ksa-independent-qk-norm", like=None),
    "te_distil": Kind(f"{TE} {DISTIL}", like="distil", gradient=5e-3, start=DENSE),
    "te_fuser": Kind(f"{TE} {FUSER}", like="te"),
    "te_fuser_full_iteration": Kind(f"{TE} {FUSER} {GRAPH}", like="te_fuser", norms=True),
    "te_fp8_fuser": Kind(f"{fp8('tensorwise')} {FUSER}", like="te", limit=1e-2),
    "te_fp8_fuser_resumed": Kind(
        f"{fp8('tensorwise')} {FUSER}",
        like="te_fp8_fuser",
        first=f"{fp8('tensorwise')} {FUSER}",
        limit=1e-6,
        norms=True,
    ),
    "te_fp8_blockwise_fuser": Kind(f"{fp8('blockwise')} {FUSER}", like="te", limit=1e-2),
    "te_recompute": Kind(f"{TE} {RECOMPUTE}", like="te", norms=True),
    # Other roundings, in 16 bits: losses were 6.5e-6 to 7.5e-5 apart on an H100, gradient norms up to 3.1e-3 after some
    # steps, where those of Transformer Engine's layers are 2.4e-3 from those of local ones.
    "te_optimizer_apart": Kind(f"{TE} --kernels-apart optimizer", like="te", gradient=1e-3),
    "te_distributed": Kind(f"{TE} {DISTRIBUTED}", like="te", norms=True),
    "te_distributed_resumed": Kind(
        f"{TE} {DISTRIBUTED}", like="te_distributed", first=f"{TE} {DISTRIBUTED}", limit=1e-6, norms=True
    ),
    # Buckets of one parameter are padded: their states were saved shifted.
    "small_buckets": Kind(f"{LOCAL} {BUCKETS}", norms=True),
    "small_buckets_resumed": Kind(
        f"{LOCAL} {BUCKETS}", like="small_buckets", first=f"{LOCAL} {BUCKETS}", limit=1e-6, norms=True
    ),
    "wide": Kind(f"{LOCAL} {WIDE}", like=None),
    "te_wide": Kind(f"{TE} {WIDE}", like="wide"),
    "te_wide_as_before": Kind(f"{TE} {WIDE} {AS_BEFORE}", like="te_wide", gradient=1e-3),
    "te_wide_from_before": Kind(f"{TE} {WIDE}", like="te_wide", first=f"{TE} {WIDE} {AS_BEFORE}", gradient=5e-3),
    "te_wide_distributed_from_before": Kind(
        f"{TE} {WIDE} {DISTRIBUTED}", like="te_wide", first=f"{TE} {WIDE} {DISTRIBUTED} {AS_BEFORE}", gradient=5e-3
    ),
    "te_wide_resumed": Kind(f"{TE} {WIDE}", like="te_wide", first=f"{TE} {WIDE}", limit=1e-6, norms=True),
    "te_wide_norms_again": Kind(f"{TE} {WIDE} {NORMS_AGAIN}", like="te_wide", gradient=1e-3),
    "te_wide_full_iteration": Kind(f"{TE} {WIDE} {GRAPH}", like="te_wide", norms=True),
    "te_wide_to_fp8": Kind(f"{fp8('delayed')} {WIDE}", like="te_wide", first=f"{TE} {WIDE}", limit=1e-2),
    "te_wide_from_fp8": Kind(f"{TE} {WIDE}", like="te_wide", first=f"{fp8('delayed')} {WIDE}", limit=1e-2),
    # A projection of text and of summary rows is called twice in a micro-batch.
    "shared": Kind(f"{LOCAL} {SHARED}", like=None),
    "te_shared": Kind(f"{TE} {SHARED}", like="shared", limit=1e-2, norms=True),
    "te_fp8_shared": Kind(f"{fp8('delayed')} {SHARED}", like="te_shared", limit=1e-2),
    # Scales see the rows of a second forward pass too: norms were 5.8e-3 apart on an H100.
    "te_fp8_shared_recompute": Kind(f"{fp8('delayed')} {SHARED} {RECOMPUTE}", like="te_fp8_shared", gradient=1e-2),
    **{
        f"te_fp8_{recipe}": Kind(fp8(recipe), like="te", limit=1e-2, gradient=FIRST_GRADIENT)
        for recipe in ("delayed", "tensorwise", "blockwise")
    },
    "te_fp8_ends_bf16": Kind(f"{fp8('tensorwise')} --first-last-layers-bf16", like="te", limit=1e-2),
    "te_fp8_history": Kind(
        f"{fp8('delayed')} --fp8-amax-history-len 16 --fp8-amax-compute-algo max",
        like="te",
        limit=1e-2,
        gradient=FIRST_GRADIENT,
    ),
    "te_fp8_recompute": Kind(f"{fp8('delayed')} {RECOMPUTE}", like="te_fp8_delayed", norms=True),
    "te_fp8_tensorwise_recompute": Kind(f"{fp8('tensorwise')} {RECOMPUTE}", like="te_fp8_tensorwise", norms=True),
    "te_fp8_anneal": Kind(f"{fp8('delayed')} {ANNEAL}", like="te_anneal", limit=1e-2, gradient=FIRST_GRADIENT),
    # A token near the middle between two experts goes to either: losses of some tokens differ by more than rounding.
    "experts": Kind(f"{LOCAL} {EXPERTS}", like=None),
    "te_experts": Kind(f"{TE} {EXPERTS}", like="experts", limit=5e-3),
    **{
        f"te_fp8_{recipe}_experts": Kind(
            f"{fp8(recipe)} {EXPERTS}", like="te_experts", limit=1e-2, gradient=FIRST_GRADIENT
        )
        for recipe in ("delayed", "tensorwise", "blockwise")
    },
    "te_fp8_distil": Kind(
        f"{fp8('delayed')} {DISTIL}", like="te_distil", limit=1e-2, gradient=FIRST_GRADIENT, start=DENSE
    ),
    "te_fp8_tensorwise_distil": Kind(
        f"{fp8('tensorwise')} {DISTIL}", like="te_distil", limit=1e-2, gradient=FIRST_GRADIENT, start=DENSE
    ),
    **{
        f"te_fp8_{recipe}_full_iteration": Kind(f"{fp8(recipe)} {GRAPH}", like=f"te_fp8_{recipe}", norms=True)
        for recipe in ("delayed", "tensorwise", "blockwise")
    },
    "te_fp8_delayed_local": Kind(f"{fp8('delayed')} {LAYER_GRAPHS}", like="te_fp8_delayed", norms=True),
    "te_fp8_tensorwise_local": Kind(f"{fp8('tensorwise')} {LAYER_GRAPHS}", like="te_fp8_tensorwise", norms=True),
    "te_fp8_blockwise_local": Kind(f"{fp8('blockwise')} {LAYER_GRAPHS}", like="te_fp8_blockwise", norms=True),
    "te_fp8_anneal_full_iteration": Kind(f"{fp8('delayed')} {ANNEAL} {GRAPH}", like="te_fp8_anneal", norms=True),
    "te_resumed": Kind(TE, like="te", first=TE, limit=1e-6, norms=True),
    "te_to_local": Kind(LOCAL, like="te", first=TE),
    "local_to_te": Kind(TE, like="kernels", first=LOCAL),
    **{
        f"te_fp8_{recipe}_resumed": Kind(
            fp8(recipe), like=f"te_fp8_{recipe}", first=fp8(recipe), limit=1e-6, norms=True
        )
        for recipe in ("delayed", "tensorwise", "blockwise")
    },
    "te_to_fp8": Kind(fp8("delayed"), like="te", first=TE, limit=1e-2, gradient=FIRST_GRADIENT),
    "fp8_to_local": Kind(LOCAL, like="te", first=fp8("delayed"), limit=1e-2),
    "cp2": Kind(f"{LOCAL} {CP}", ranks=2),
    "cp2_full_iteration": Kind(f"{LOCAL} {CP} {GRAPH}", like="cp2", norms=True, ranks=2),
    "cp2_local": Kind(f"{LOCAL} {CP} {LAYER_GRAPHS}", like="cp2", norms=True, ranks=2),
    "cp2_a2a": Kind(f"{LOCAL} {A2A}", ranks=2),
    "cp2_a2a_full_iteration": Kind(f"{LOCAL} {A2A} {GRAPH}", like="cp2_a2a", norms=True, ranks=2),
    "tp2": Kind(f"{LOCAL} {TP} --sequence-parallel", ranks=2),
    "tp2_full_iteration": Kind(f"{LOCAL} {TP} --sequence-parallel {GRAPH}", like="tp2", norms=True, ranks=2),
    "tp2_local": Kind(f"{LOCAL} {TP} --sequence-parallel {LAYER_GRAPHS}", like="tp2", norms=True, ranks=2),
    "te_tp2": Kind(f"{TE} {TP} --sequence-parallel", like="tp2", ranks=2),
    "te_tp2_full_iteration": Kind(f"{TE} {TP} --sequence-parallel {GRAPH}", like="te_tp2", norms=True, ranks=2),
    "te_cp2": Kind(f"{TE} {CP}", like="cp2", ranks=2),
    "te_cp2_full_iteration": Kind(f"{TE} {CP} {GRAPH}", like="te_cp2", norms=True, ranks=2),
    "te_cp2_local": Kind(f"{TE} {CP} {LAYER_GRAPHS}", like="te_cp2", norms=True, ranks=2),
    "te_fp8_tp2": Kind(
        f"{fp8('delayed')} {TP} --sequence-parallel", like="te_tp2", limit=1e-2, gradient=FIRST_GRADIENT, ranks=2
    ),
    "te_fp8_cp2": Kind(f"{fp8('delayed')} {CP}", like="te_cp2", limit=1e-2, gradient=FIRST_GRADIENT, ranks=2),
    "te_fp8_cp2_full_iteration": Kind(f"{fp8('delayed')} {CP} {GRAPH}", like="te_fp8_cp2", norms=True, ranks=2),
}
