"""Plan a run: feasible parallel layouts of a model on a cluster, KSA against full attention, and the best one's flags.

    python tools/plan_cluster.py --model slurm/models/ksa_70b.args --gpus 512 --write slurm/layouts/ksa_70b.args

Memory counts parameters, gradients, optimizer state and the fullest moment of an iteration, and leaves a tenth of the
GPU free. Each pipeline stage recomputes the least that fits, as `--recompute-to-fit` does in a run.
"""

import argparse
import contextlib
import copy
import dataclasses
import io
import sys
from pathlib import Path

try:
    from megatron_ksa.errors import UsageError, usage_errors_exit
except ModuleNotFoundError as error:
    print(
        f"error: {error.name} is not installed here: run `pip install -e '.[train]'` in the repository", file=sys.stderr
    )
    sys.exit(2)
from megatron_ksa.cost.cluster_plan import Cluster
from megatron_ksa.files import SMALL_FILE_BYTES, read_small, whole_file
from megatron_ksa.platform import prepare_platform


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    assumed = Cluster.of_h100(8)
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    about = f"file of flags, as slurm/models has them (at most {SMALL_FILE_BYTES:,} bytes)"
    parser.add_argument("--model", type=Path, required=True, help=about)
    parser.add_argument("--seq-length", type=int, help="text tokens, instead of the model file's")
    parser.add_argument("--global-batch-size", type=int, help="sequences in a step, instead of the model file's")
    parser.add_argument("--gpus", type=int, required=True, help="GPUs of all nodes")
    parser.add_argument("--gpus-per-node", type=int, default=assumed.gpus_per_node, help="GPUs of a node")
    parser.add_argument("--memory", type=float, default=assumed.memory / 1e9, help="GB of a GPU")
    parser.add_argument("--flops", type=float, default=assumed.flops / 1e12, help="peak TFLOP/s of a GPU")
    parser.add_argument(
        "--efficiency", type=float, default=assumed.efficiency,
        help="share of the peak that arithmetic reaches (default: as the 1.9B model did on H100)",
    )  # fmt: skip
    parser.add_argument(
        "--node-bandwidth", type=float, default=assumed.node_bandwidth / 1e9,
        help="GB/s that a GPU sends within its node",
    )  # fmt: skip
    parser.add_argument(
        "--network-bandwidth", type=float, default=assumed.network_bandwidth / 1e9,
        help="GB/s that a GPU sends to other nodes",
    )  # fmt: skip
    parser.add_argument("--show", type=int, default=8, help="layouts to print, fastest first")
    parser.add_argument("--write", type=Path, help="file for the flags of the best KSA layout")
    return parser.parse_args()


def model_flags(path: Path) -> list[str]:
    """The words of a file of flags."""
    try:
        lines = read_small(path, "--model").splitlines()
    except UsageError as error:
        known = ", ".join(sorted(str(file) for file in Path("slurm/models").glob("*.args")))
        raise UsageError(f"{error}; use one of {known}") from None
    return [word for line in lines for word in line.split("#")[0].split()]


def read_model(flags: list[str], options: argparse.Namespace) -> argparse.Namespace:
    """Megatron's parse of the model's flags, with the sizes that its validation would derive."""
    from megatron.training.arguments import parse_args

    sys.argv = ["plan_cluster.py", *flags]
    args = parse_args()
    args.seq_length = options.seq_length or args.seq_length
    args.global_batch_size = options.global_batch_size or args.global_batch_size
    for name in ("num_layers", "hidden_size", "num_attention_heads", "seq_length", "vocab_size", "micro_batch_size",
                 "global_batch_size"):  # fmt: skip
        if not getattr(args, name) or getattr(args, name) < 1:
            raise UsageError(f"--model {options.model} needs --{name.replace('_', '-')}, at least 1")
    args.kv_channels = args.kv_channels or args.hidden_size // args.num_attention_heads
    args.ffn_hidden_size = args.ffn_hidden_size or 4 * args.hidden_size
    multiple = args.make_vocab_size_divisible_by
    args.padded_vocab_size = -(-args.vocab_size // multiple) * multiple
    return args


def table(plans: list, show: int, title: str) -> str:
    """Layouts with their memory, bytes and seconds, fastest first."""
    lines = [
        f"{title}: {len(plans)} layouts fit",
        "  tp  cp  pp   dp  GB/GPU  sent GB: tensor  context pipeline     data   s/step  recomputed",
    ]
    for each in plans[:show]:
        lay, sent = each.layout, [number / 1e9 for number in each.sent.values()]
        lines.append(
            f"{lay.tensor_parallel:4}{lay.context_parallel:4}{lay.pipeline_parallel:4}{lay.data_parallel:5}"
            f"{each.memory.total / 1e9:8.1f}         {sent[0]:8.2f} {sent[1]:8.3f} {sent[2]:8.2f}"
            f" {sent[3]:8.2f} {each.seconds:8.2f}  {each.slowest.recompute}"
        )
    return "\n".join(lines)


def main() -> None:
    """Plan; bad input costs one line and exit code 2."""
    with usage_errors_exit():
        options = parse_arguments()
        flags = model_flags(options.model)
        with contextlib.redirect_stdout(io.StringIO()):  # what it says of this machine is not about the cluster
            defaults = prepare_platform(flags)
        from megatron.training import training

        from megatron_ksa.cost import cluster_plan
        from megatron_ksa.cost.flops import ksa_flops
        from megatron_ksa.cost.run_report import model_shape
        from megatron_ksa.cost.shapes import TrainingLayout
        from megatron_ksa.training.arguments import install_arguments, settings_from_args

        cluster = cluster_plan.Cluster(
            options.gpus, options.gpus_per_node, options.memory * 1e9, options.flops * 1e12, options.efficiency,
            options.node_bandwidth * 1e9, options.network_bandwidth * 1e9,
        )  # fmt: skip
        sys.argv = ["plan_cluster.py", *flags]
        with install_arguments(defaults):
            args = read_model(flags, options)
        settings = settings_from_args(copy.copy(args))
        shape = model_shape(args, settings)
        base = TrainingLayout(
            args.seq_length, micro_batch=args.micro_batch_size, parameter_bytes=2 if args.bf16 or args.fp16 else 4,
            fused_rotation=True, fused_gradient=True,
        )  # fmt: skip
        dense = training.num_floating_point_operations
        models = [
            ("full attention", dataclasses.replace(shape, ksa=dataclasses.replace(shape.ksa, enabled=False)), dense)
        ]
        if settings.ksa.enabled:
            models.insert(0, ("KSA", shape, ksa_flops(dense, settings.ksa)))
        print(" ".join((cluster_plan.__doc__ or "").split("\n\n", 1)[1].split()))
        best = None
        for title, model, count in models:
            flops = count(args, args.global_batch_size)
            try:
                plans = cluster_plan.plan(model, base, args.global_batch_size, flops, cluster)
            except UsageError as error:
                if best is None:
                    raise
                print(f"\n{title}: {error}")
                continue
            print(f"\n{table(plans, options.show, title)}")
            best = best or plans[0]
        if options.write:
            heading = f"# {options.gpus} GPUs, {args.seq_length} tokens; written by tools/plan_cluster.py"
            if not options.write.parent.is_dir():
                raise UsageError(f"--write {options.write}: no such folder; use a folder that exists")
            with whole_file(options.write) as stream:
                stream.write("\n".join([heading, *cluster_plan.layout_flags(best, cluster), ""]))
            print(f"\nflags of the fastest layout: {options.write}")


if __name__ == "__main__":
    main()
