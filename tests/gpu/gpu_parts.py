"""What is checked and measured on GPUs, in order of importance: the parts of `run_parts.py` with their commands.

Seconds are limits; what a part usually takes on an H100 stands in its `takes`. Words of a command: OUT is the folder of
the results, LEFT the seconds that the part has, COMMIT the commit of the code, GPUS their number.
"""

from dataclasses import dataclass, replace

TRAINING, THROUGHPUT = "tests/training", "examples/throughput_1b9"
UNCHECKED = ("--", "--kernels-unchecked")
# Tests that a GPU runs on kernels in their final form; those that it compiles for a stand-in of an H100 are slow.
KERNEL_TESTS = (
    "tests/kernels/softmax_merge", "tests/kernels/swiglu", "tests/kernels/adam", "tests/kernels/test_column_sums.py",
    "tests/upstream/test_embedding_gradient.py::test_rows_are_added_to_their_words", "tests/kernels/norm",
    "tests/kernels/ksa_attention/test_gluon.py", "tests/kernels/ksa_attention/test_on_gpu.py",
    "tests/kernels/ksa_attention/test_passes.py",
    "tests/kernels/ksa_decode", "tests/kernels/cross_entropy", "tests/kernels/distillation", "tests/kernels/rotation",
    "tests/huggingface/test_exported_batches.py::test_kernels_on_a_gpu", "tests/inference/test_captured_steps.py",
    "tests/upstream/test_optimizer_kernels.py", "tests/upstream/test_weight_gradients.py",
)  # fmt: skip
# Of one GPU in `gpu_check.py`: kernels apart and together, graphs, Transformer Engine, FP8, runs that go on.
FIRST_CHECKS = (
    "reference", "apart", "float32_apart", "full_iteration", "te", "te_full_iteration", "te_fp8_delayed",
    "te_fp8_tensorwise", "te_fp8_blockwise", "te_fp8_delayed_full_iteration", "te_fuser", "te_fp8_fuser", "te_resumed",
    "te_fp8_delayed_resumed", "te_to_local", "local_to_te", "te_optimizer_apart", "te_wide", "te_wide_as_before",
    "te_wide_distributed_from_before", "te_wide_full_iteration", "te_fp8_shared_recompute",
)  # fmt: skip
CHECKS_OF_TWO = (
    "cp2", "cp2_full_iteration", "cp2_local", "cp2_a2a", "cp2_a2a_full_iteration", "tp2", "tp2_full_iteration",
    "tp2_local", "te_cp2", "te_cp2_full_iteration", "te_cp2_local", "te_tp2", "te_tp2_full_iteration", "te_fp8_cp2",
    "te_fp8_cp2_full_iteration", "te_fp8_tp2", "te_fp8_blockwise_local", "te_fp8_anneal_full_iteration",
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A command and its limit.

    Attributes:
        name: on the command line, and of its log.
        what: what it shows.
        takes: seconds that it usually takes.
        limit: seconds after which it is ended.
        command: a Python script with its arguments, or a module after -m.
        te: it needs Transformer Engine; None: it is measured as a machine without it, which has other optimizers.
        together: it measures no times, and runs beside its neighbours that measure none.
        own_gpu: it needs one of several GPUs, and runs beside its neighbours of that kind, which have one each.
        gpus: the least number.
    """

    name: str
    what: str
    takes: int
    limit: int
    command: tuple[str, ...]
    te: bool | None = None
    together: bool = False
    own_gpu: bool = False
    gpus: int = 1


def _throughput(out: str, *words: str) -> tuple[str, ...]:
    return (f"{THROUGHPUT}/run.py", "--out", f"OUT/{out}", "--seconds", "LEFT", "--commit", "COMMIT", *words)


def _checks(out: str, *names: str) -> tuple[str, ...]:
    only = ("--only", *names) if names else ()
    return (f"{TRAINING}/gpu_check.py", "--out", f"OUT/{out}", "--seconds", "LEFT", "--commit", "COMMIT", *only)


def _parts(*words: str) -> tuple[str, ...]:
    script = (f"{THROUGHPUT}/step_parts.py", "--out", "OUT/step_parts.json", "--commit", "COMMIT")
    return (*script, "--limit", "LEFT", *words)


ONE_GPU = (
    # With the tests' names: a run that is cut says which have failed.
    Part("kernels", "every kernel against its reference, in its final form", 300, 400,
         ("-m", "pytest", *KERNEL_TESTS, "-m", "(gpu or not slow) and not long", "-n", "6", "-vv", "-p",
          "no:cacheprovider"), together=True),
    Part("checks", "the trainer with each kind of layers trains to the same losses", 290, 400,
         _checks("gpu_check.json", *FIRST_CHECKS), te=True, together=True),
    Part("fp8_curve", "FP8 over 200 steps beside 16 bits from the same three starts, and resumed", 350, 480,
         ("examples/fp8/run.py", "--out", "OUT/fp8.json", "--at-once", "7", "--limit", "240"), te=True, together=True),
    Part("local_8k", "8k: MFU of KSA, KSA / full attention", 110, 200,
         _throughput("results_h100.json", "--lengths", "8192", "--kinds", "local", *UNCHECKED)),
    Part("te_8k", "8k: Transformer Engine / local, FP8 / 16 bits", 240, 400,
         _throughput("results_kinds_h100.json", "--models", "ksa", "--lengths", "8192", "--kinds", "local", "te",
                     "fp8_delayed", "fp8_tensorwise", "fp8_blockwise", "te_fuser", *UNCHECKED), te=True),
    Part("fp8_8b", "8 layers of the 8B shape: FP8 / 16 bits", 120, 200,
         _throughput("results_8b_h100.json", "--shape", "8b_8layers", "--models", "ksa", "--lengths", "8192", "--kinds",
                     "te+graph", "fp8_delayed+graph", *UNCHECKED), te=True),
    Part("memory", "recompute to fit / full recompute at 32k, peaks beside the predicted ones", 90, 200,
         ("examples/memory_1b9/run.py", "--out", "OUT/memory_h100.json", "--commit", "COMMIT", "--limit", "LEFT",
          "--iterations", "4", "--cases", "32768:full", "8192:none", "131072:full", "32768:fit", "131072:fit",
          *UNCHECKED)),
    Part("parts_8k", "parts of a step at 8k, what each change brings", 70, 150,
         _parts("--lengths", "8192", "--models", "ksa", "full")),
    Part("graphs_8k", "8k in CUDA graphs: Transformer Engine / local, KSA / full attention", 190, 280,
         _throughput("results_kinds_graphs_h100.json", "--lengths", "8192", "--kinds", "local+graph", "te+graph",
                     *UNCHECKED), te=True),
    Part("fp8_graphs_8k", "8k in CUDA graphs: FP8 / 16 bits, KSA / full attention in FP8", 200, 280,
         _throughput("results_fp8_graphs_h100.json", "--lengths", "8192", "--kinds", "fp8_delayed+graph", "te+graph",
                     *UNCHECKED), te=True),
    Part("parts_32k", "parts of a step at 32k and 128k", 200, 320,
         _parts("--lengths", "32768", "131072", "--models", "ksa", "--variants", "before", "all")),
    Part("local_long", "32k and 128k: KSA / full attention", 190, 300,
         _throughput("results_h100.json", "--lengths", "32768", "131072", "--kinds", "local", *UNCHECKED)),
    Part("baselines", "KSA beside NSA, MoBA, FlashAttention 4 and cuDNN", 330, 460,
         ("-m", "megatron_ksa.kernels.benchmarks", "--out", "OUT/baselines", "--commit", "COMMIT", "--limit", "LEFT",
          "--without-features", "--heads", "32/2", "32/8",
          "--op", "ksa", "full_attention", "nsa", "window", "moba", "flash_attention_4")),
    Part("other_checks", "the other kinds of the trainer", 280, 480, _checks("gpu_check.json"), te=True, together=True),
    Part("attention", "the plain Triton kernels of attention, with every feature", 120, 300,
         ("-m", "pytest", "tests/kernels/ksa_attention/test_triton.py", "tests/kernels/ksa_attention/test_features.py",
          "tests/kernels/ksa_attention/test_window.py", "-n", "6", "-v", "-p", "no:cacheprovider"), together=True),
)  # fmt: skip


def _ranks(*words: str, flags: tuple[str, ...] = UNCHECKED) -> tuple[str, ...]:
    return _throughput("results_ranks.json", "--kinds", "local", *words, *flags)


# Those that take longest first.
ON_ONE_OF_SEVERAL = (
    "checks", "other_checks", "parts_32k", "local_long", "fp8_curve", "kernels", "baselines", "graphs_8k",
    "fp8_graphs_8k", "fp8_8b", "memory", "parts_8k",
)  # fmt: skip


def _of_one_gpu(*names: str) -> list[Part]:
    """Parts of one GPU, each on one of several."""
    return [replace(part, own_gpu=True, together=False) for name in names for part in ONE_GPU if part.name == name]


def several_gpus(gpus: int) -> tuple[Part, ...]:
    """The parts for so many GPUs of one host: a power of 2.

    Those of one GPU stand last and are run where they are named: on several GPUs they take the time of one of them.
    """
    every, half = f"cp{gpus}", gpus // 2
    fewer = [f"cp{size}" for size in (4, 2) if size < gpus]
    other = [f"{every}-a2a", *([f"tp2-cp{half}"] if half > 1 else [])]
    nccl = (f"{TRAINING}/nccl_check.py", "--processes", "GPUS", "--out", f"OUT/nccl_{gpus}.json", "--seconds", "LEFT",
            "--commit", "COMMIT")  # fmt: skip
    long = ("--lengths", "131072", "--limit", "120")
    # One micro-batch adds nothing up, so that gradients may have 16 bits; few rows of the output layer at a time.
    million = ("--models", "ksa", "--lengths", "1048576", "--loss-rows", "1024", "--limit", "150")
    short = (*UNCHECKED, "--grad-reduce-in-bf16")
    parts = [
        # Full attention comes last: a step takes it three times as long. Each set of ranks compiles for half a minute.
        Part("speed", "128k: CP on all GPUs and fewer, against one GPU and full attention", 270 + 65 * len(fewer),
             min(480, 390 + 70 * len(fewer)),
             _ranks("--layouts", every, *fewer, "one", "--full-layouts", every, *long)),
        Part("speed_fit", "128k: CP on all GPUs against one GPU, each with the recompute that fits 80 GB", 170, 260,
             _ranks("--layouts", f"{every}-fit", "one-fit", "--models", "ksa", *long)),
        Part("million", "a step of 1,048,576 tokens, context parallelism alone", 120, 180,
             _ranks("--layouts", every, *million, flags=short), gpus=4),
        Part("nccl", "losses and gradient norms of each layout as one process", 110, 240,
             (*nccl, "--without", "transformer_engine", "fp8"), together=True),
        Part("other_speed", "128k: all-to-all, tensor with context parallelism", 70, 150,
             _ranks("--layouts", *other, "--models", "ksa", *long)),
        Part("million_tp", "a step of 1,048,576 tokens with tensor parallelism, which leaves more room", 120, 180,
             _ranks("--layouts", f"tp2-cp{half}", *million, flags=short), gpus=4),
        Part("nccl_te", "the same with Transformer Engine and FP8", 140, 240, (*nccl, "--without", "local"), te=True),
        Part("graphs", "CUDA graphs with context and tensor parallelism train to the same losses", 150, 300,
             _checks("gpu_check_ranks.json", *CHECKS_OF_TWO), te=True),
        Part("memory_2", "peaks of two GPUs beside the predicted ones", 70, 150,
             ("examples/memory_1b9/run.py", "--out", "OUT/memory_h100.json", "--commit", "COMMIT", "--limit", "LEFT",
              "--ranks", "2", "--cases", "8192:none", "32768:full", "32768:fit", "131072:full", *UNCHECKED)),
    ]  # fmt: skip
    one = Part("one", "128k on one GPU", 75, 150, _ranks("--layouts", "one", "--models", "ksa", *long), own_gpu=True)
    parts += [*_of_one_gpu(*ON_ONE_OF_SEVERAL), one]
    if gpus == 8:
        parts.insert(1, Part(
            "speed_8b", "128k: the 8B model with tensor and context parallelism", 150, 300,
            _ranks("--shape", "8b", "--layouts", "tp2-cp4", "tp4-cp2", "--lengths", "131072", "--limit", "100"),
        ))  # fmt: skip
    return tuple(part for part in parts if part.gpus <= gpus)


def tiny(part: Part) -> Part | None:
    """The part's trial without GPUs, where it has one: a model of the same kind that a CPU trains in seconds."""
    script, *words = part.command
    if script == "-m" or script.endswith("gpu_check.py"):
        return None
    words = [{"8192": "64", "32768": "128", "131072": "256", "1048576": "512"}.get(word, word) for word in words]
    if script.endswith("memory_1b9/run.py"):
        words = [*words[: words.index("--cases")], "--tiny", "--lengths", "64", "--cases", "64:none", "64:fit"]
    elif script.endswith("fp8/run.py"):
        words = ["--tiny", "--steps", "4", *words]
    elif script.startswith(THROUGHPUT):
        words = ["--tiny", *(["--iterations", "1"] if script.endswith("/run.py") else []), *words]
    return replace(part, command=(script, *words), gpus=1)
