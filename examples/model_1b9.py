"""Flags by which examples train the KSA report's 1.9B model, or a tiny one of its kind, on generated tokens."""

from pathlib import Path

MODEL = Path(__file__).parents[1] / "slurm" / "models" / "ksa_1b9.args"
LAYERS, HEADS = 24, 16
TINY_LAYERS, TINY_HEADS = 4, 4
TINY = (
    f"--num-layers {TINY_LAYERS} --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads {TINY_HEADS} "
    "--kv-channels 8 --vocab-size 127 --make-vocab-size-divisible-by 64"
).split()
# What the model's file says about its data, its attention and its schedule.
REPLACED = {
    "--ksa", "--ksa-window-chunks", "--position-embedding-type", "--tokenizer-type", "--vocab-size", "--lr-decay-style",
    "--lr-wsd-decay-style", "--lr-wsd-decay-iters", "--lr-warmup-iters", "--seq-length", "--max-position-embeddings",
    "--global-batch-size", "--train-iters",
}  # fmt: skip


def training_flags(
    attention: str,
    length: int,
    iterations: int,
    more: list[str],
    *,
    tiny: bool,
    layers: int = LAYERS,
    kv_heads: int = HEADS,
) -> list[str]:
    """Flags of `pretrain_gpt.py`.

    Args:
        attention: "full" or KSA, whatever it is called.
        length: text tokens of a sequence, of which a step takes one.
        iterations: to train.
        more: flags that come after the model's; a tiny model's come after these.
        tiny: a model of the same kind in place of it that a CPU trains in seconds.
        layers, kv_heads: of the model that `more` makes of it.
    """
    lines = [line.split("#")[0].split() for line in MODEL.read_text(encoding="utf-8").splitlines()]
    dropped = REPLACED | ({"--bf16"} if tiny else set())
    kept = [word for line in lines if line and line[0] not in dropped for word in line]
    if attention == "full":
        # Without Transformer Engine, dense layers get fused attention and rotation from this project's model, which
        # HARPE asks for; equal bases are plain RoPE.
        bases = ",".join(["10000"] * (TINY_HEADS if tiny else kv_heads))
        kept += ["--position-embedding-type", "harpe", "--harpe-bases", bases]
    else:
        windows = "([2]*3+[8])" if tiny else f"([128]*3+[1024])*{layers // 4}"
        kept += ["--ksa", "--ksa-window-chunks", windows, "--position-embedding-type", "rope"]
    run = (
        f"--seq-length {length} --max-position-embeddings {length} --global-batch-size 1 --train-iters {iterations} "
        "--mock-data --split 100,0,0 --tokenizer-type NullTokenizer --vocab-size 151935 --lr-decay-style constant "
        "--eval-iters 0 --log-interval 1"
    )
    return [*kept, *run.split(), *more, *(TINY if tiny else [])]
