"""The parallel layouts that `nccl_check.py` compares with one process, by number of processes."""

from dataclasses import dataclass, replace

# Heads of 32 channels, the smallest that attention kernels are tuned for; 16 x 8 words at every tensor-parallel size.
MODEL = (
    "--hidden-size 128 --ffn-hidden-size 256 --kv-channels 32 --make-vocab-size-divisible-by 16 "
    "--distributed-timeout-minutes 1"
)
SIZE = f"{MODEL} --seq-length 256 --max-position-embeddings 256"
# Heads for TP 8, chunks for CP 8, sequences for as many replicas as there are ranks.
EIGHT = (
    f"{MODEL} --num-attention-heads 8 --num-query-groups 4 --seq-length 512 --max-position-embeddings 512 "
    "--global-batch-size 8"
)
SIZES = {2: SIZE, 4: SIZE, 8: EIGHT}

PACKED = "--reset-position-ids --reset-attention-mask"
BF16 = "--bf16"
EXPERTS = "--num-experts 4 --moe-router-topk 2 --moe-token-dispatcher-type alltoall --moe-aux-loss-coeff 0"
LOCAL, TE = "--transformer-impl local", "--transformer-impl transformer_engine"
FP8 = "--fp8-format hybrid --fp8-recipe delayed"
# Largest relative deviation of a loss or gradient norm: float32; 16-bit weights and activations, in the model of 2 and
# 4 ranks and in that of 8; products whose factors have three bits of mantissa, scaled by what each rank sees.
FLOAT32, SIXTEEN_BITS, SIXTEEN_BITS_OF_EIGHT, EIGHT_BITS = 1e-5, 5e-3, 1e-2, 2e-2
# In bf16 at the first step, where all have the same weights: as far as one process in bf16 is from itself in float32,
# over gloo 1.8e-3 in the model of eight ranks. CP 8 is 1.6e-4 from one process there, and at most 2.7e-4 at steps whose
# weights stand still. After it Adam moves weights by lr * sign(gradient), and rounding decides the signs of the
# smallest gradients: one process in bf16 is then up to 9.4e-3 from float32, CP 8 up to 8.3e-3 from float32 and 6.4e-3
# from one process, which SIXTEEN_BITS_OF_EIGHT allows.
FIRST_STEP = 2e-3


@dataclass(frozen=True)
class Layout:
    """Flags of the ranks alone, flags that the single process needs too, and how far both may be apart in bf16."""

    flags: str
    shared: str = LOCAL
    rounding: float = SIXTEEN_BITS

    @property
    def allowed(self) -> float:
        """Largest relative deviation of a loss or gradient norm."""
        if "--fp8-format" in self.shared:
            return EIGHT_BITS
        return self.rounding if BF16 in self.shared else FLOAT32

    @property
    def allowed_first(self) -> float:
        """The same at the first step."""
        return FIRST_STEP if BF16 in self.shared and "--fp8-format" not in self.shared else self.allowed

    @property
    def needs(self) -> str | None:
        """The package that it needs beside those of every run, or None."""
        return "transformer_engine" if TE in self.shared else None


def _tp(size: int) -> str:
    return f"--tensor-model-parallel-size {size}"


def _cp(size: int) -> str:
    return f"--context-parallel-size {size}"


def _ep(size: int) -> str:
    return f"--expert-model-parallel-size {size}"


PP, SP = "--pipeline-model-parallel-size 2", "--sequence-parallel"
OVERLAP = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
TWO = {
    "TP 2": Layout(_tp(2)),
    "TP 2 + SP, chunked loss": Layout(f"{_tp(2)} {SP} --loss-chunk-rows 96"),
    "CP 2, halos and summaries": Layout(_cp(2)),
    "CP 2, halos and summaries, documents": Layout(f"{_cp(2)} {RECOMPUTE}", f"{LOCAL} {PACKED}"),
    "CP 2, all-to-all": Layout(f"{_cp(2)} --cp-comm-type a2a"),
    "PP 2": Layout(PP),
    "PP 2, interleaved": Layout(f"{PP} --num-virtual-stages-per-pipeline-rank 2"),
    "DP 2, distributed optimizer": Layout(OVERLAP),
    "CP 2, distributed optimizer, bf16": Layout(f"{_cp(2)} {OVERLAP}", f"{LOCAL} {BF16}"),
    "TP 2 + SP, bf16": Layout(f"{_tp(2)} {SP}", f"{LOCAL} {BF16}"),
}
FOUR = {
    "CP 4, halos and summaries, documents": Layout(f"{_cp(4)} {RECOMPUTE}", f"{LOCAL} {PACKED}"),
    "TP 2 x CP 2": Layout(f"{_tp(2)} {SP} {_cp(2)}"),
    "CP 4, distributed optimizer, bf16": Layout(f"{_cp(4)} {OVERLAP} {RECOMPUTE}", f"{LOCAL} {BF16}"),
    "PP 2 x CP 2": Layout(f"{PP} {_cp(2)}"),
    "TP 4 + SP, chunked loss": Layout(f"{_tp(4)} {SP} --loss-chunk-rows 96"),
    "DP 2 x CP 2, distributed optimizer": Layout(f"{_cp(2)} {OVERLAP}"),
    "CP 4, all-to-all": Layout(f"{_cp(4)} --cp-comm-type a2a"),
    "EP 2 x TP 2": Layout(f"{_tp(2)} {SP} {_ep(2)}", f"{LOCAL} {EXPERTS}"),
    "EP 2, DP 4": Layout(_ep(2), f"{LOCAL} {EXPERTS}"),
    "EP 4": Layout(_ep(4), f"{LOCAL} {EXPERTS}"),
}
EIGHTS = {
    "CP 8, halos and summaries, documents": Layout(f"{_cp(8)} {RECOMPUTE}", f"{LOCAL} {PACKED}"),
    "TP 2 x CP 4": Layout(f"{_tp(2)} {SP} {_cp(4)}"),
    "TP 4 x CP 2": Layout(f"{_tp(4)} {SP} {_cp(2)}"),
    "TP 2 x PP 2 x CP 2": Layout(f"{_tp(2)} {SP} {PP} {_cp(2)}"),
    "TP 8 + SP, chunked loss": Layout(f"{_tp(8)} {SP} --loss-chunk-rows 96"),
    "CP 8, all-to-all": Layout(f"{_cp(8)} --cp-comm-type a2a"),
    "CP 8, distributed optimizer, bf16": Layout(f"{_cp(8)} {OVERLAP} {RECOMPUTE}", f"{LOCAL} {BF16}"),
    "EP 4 x TP 2": Layout(f"{_tp(2)} {SP} {_ep(4)}", f"{LOCAL} {EXPERTS}"),
    "EP 4, DP 8": Layout(_ep(4), f"{LOCAL} {EXPERTS}"),
}


def _with_transformer_engine(layouts: dict[str, Layout]) -> dict[str, Layout]:
    """Its layers in bf16 and in FP8, for layouts of a dense model: in float32 its products are TF32's."""
    return {
        f"{name}, Transformer Engine, {kind}": Layout(layouts[name].flags, f"{TE} {BF16} {more}".strip())
        for kind, more in (("bf16", ""), ("FP8", FP8))
        for name in layouts
    }


def _of_eight(layouts: dict[str, Layout]) -> dict[str, Layout]:
    return {name: replace(layout, rounding=SIXTEEN_BITS_OF_EIGHT) for name, layout in layouts.items()}


LAYOUTS = {
    2: TWO | _with_transformer_engine({name: TWO[name] for name in ("TP 2 + SP, chunked loss", "CP 2, all-to-all")}
                                      | {"CP 2": TWO["CP 2, halos and summaries"]}),
    4: FOUR | _with_transformer_engine({"TP 2 x CP 2": FOUR["TP 2 x CP 2"], "CP 4": Layout(_cp(4)),
                                        "TP 4 + SP": Layout(f"{_tp(4)} {SP}")}),
    8: _of_eight(EIGHTS | _with_transformer_engine({"TP 2 x CP 4": EIGHTS["TP 2 x CP 4"], "CP 8": Layout(_cp(8))})),
}  # fmt: skip
