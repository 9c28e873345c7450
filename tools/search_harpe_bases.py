"""Choose the RoPE base of each KV group for `pretrain_gpt.py --harpe-bases`: peak-valley search or the uniform set.

Writes a JSON file with the bases and how well they cover the target length, and a chart beside it.
"""

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import IO

import numpy as np

try:
    from megatron_ksa.config.harpe import PRESETS, HarpeConfig
except ModuleNotFoundError as error:
    print(
        f"error: {error.name} is not installed here: run `pip install -e '.[train]'` in the repository", file=sys.stderr
    )
    sys.exit(2)
from megatron_ksa.charts import chart
from megatron_ksa.errors import UsageError, usage_errors_exit
from megatron_ksa.files import whole_file
from megatron_ksa.locks import exclusive
from megatron_ksa.rotary import base_search

# Flag, least and most: a waveform of 2^24 positions takes a few hundred MB.
LIMITS = (("groups", 1, 4096), ("head_dim", 2, 4096), ("length", 16, 1 << 24), ("extrema", 2, 1 << 16))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--groups", type=int, default=32, help="bases to choose: KV groups of the model (heads, without GQA)"
    )
    parser.add_argument("--head-dim", type=int, default=128, help="rotated channels of a head")
    parser.add_argument("--base-min", type=float, default=1e6, help="smallest base")
    parser.add_argument("--base-max", type=float, default=5e6, help="largest base")
    parser.add_argument("--stride", type=float, default=3e4, help="distance of neighbouring candidates of the search")
    parser.add_argument("--length", type=int, default=131072, help="target length, tokens")
    parser.add_argument(
        "--extrema", type=int, default=32, help="peaks and valleys of a waveform that count, most prominent first"
    )
    parser.add_argument(
        "--method", choices=("peak-valley", "uniform", *PRESETS), default="peak-valley", help="how to choose"
    )
    parser.add_argument(
        "--order", choices=("ascending", "descending"), default="ascending", help="order over the KV groups"
    )
    parser.add_argument(
        "--output", default="harpe_bases.json", help="JSON file to write; the chart gets its name with .png"
    )
    return parser.parse_args()


def choose(args: argparse.Namespace) -> tuple[float, ...]:
    """The bases, in the order asked for."""
    if args.method == "peak-valley":
        values = base_search.candidates(args.base_min, args.base_max, args.stride)
        found = base_search.extrema(values, args.head_dim, args.length, args.extrema)
        bases = values[base_search.choose_peak_valley(found, args.groups)]
    elif args.method == "uniform":
        bases = HarpeConfig(base_min=args.base_min, base_max=args.base_max).resolve(args.groups)
    else:
        bases = HarpeConfig(bases=args.method).resolve(args.groups)
    return tuple(float(base) for base in sorted(bases, reverse=args.order == "descending"))


def plot(bases: tuple[float, ...], heights: dict[str, np.ndarray], args: argparse.Namespace, stream: IO) -> None:
    """Write the chart as PNG: waveforms of the bases with peaks and valleys, and the best head at every position."""
    from matplotlib import colormaps

    with chart(stream, rows=2, figsize=(10, 8), sharex=True) as (figure, (waves, best)):
        colours = colormaps["viridis"](np.linspace(0, 0.9, len(bases)))
        found = base_search.extrema(np.array(bases), args.head_dim, args.length, args.extrema)
        block = max(args.length // 512, 1)
        positions = np.arange(args.length // block) * block
        for base, colour, peaks, valleys in zip(bases, colours, found.peaks, found.valleys, strict=True):
            wave = base_search.waveform(base, args.head_dim, args.length)
            # Block means show the shape; the markers are the exact extrema.
            means = wave[: len(positions) * block].reshape(-1, block).mean(1)
            waves.plot(positions, means, color=colour, linewidth=0.6)
            waves.plot(peaks, wave[peaks], "^", color=colour, markersize=3)
            waves.plot(valleys, wave[valleys], "v", color=colour, markersize=3)
        title = f"{len(bases)} bases, {min(bases):g} to {max(bases):g}: peaks (▲) and valleys (▼)"
        waves.set(ylabel="waveform f(m)", title=title)
        for name, height in heights.items():
            best.plot(positions, height[: len(positions) * block].reshape(-1, block).min(1), linewidth=1, label=name)
        best.set(xlabel="relative distance m (tokens)", ylabel="best head's waveform, lowest in a block")
        best.legend(frameon=False)
        best.grid(alpha=0.25)
        figure.tight_layout()


def main() -> None:
    """Run; bad input costs one line and exit code 2."""
    with usage_errors_exit():
        args = parse_arguments()
        for flag, least, most in LIMITS:
            if not least <= getattr(args, flag) <= most:
                raise UsageError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: from {least:,} to {most:,}")
        if args.head_dim % 2:
            raise UsageError(f"--head-dim {args.head_dim}: an even number of channels")
        output = Path(args.output)
        if output.suffix != ".json" or not os.access(output.parent, os.W_OK):
            raise UsageError(f"--output {output}: a .json file in a folder that exists and can be written to")
        bases = choose(args)
        sets = {
            args.method: bases,
            "uniform": HarpeConfig(base_min=args.base_min, base_max=args.base_max).resolve(args.groups),
            f"single base {args.base_max:g}": (args.base_max,),
        }
        heights = {name: base_search.best_head(members, args.head_dim, args.length) for name, members in sets.items()}
        covered = {name: base_search.coverage(height) for name, height in heights.items()}
        settings = {name: value for name, value in vars(args).items() if name != "output"}
        result = {
            "bases": bases,
            "settings": settings,
            "coverage": {name: dataclasses.asdict(values) for name, values in covered.items()},
        }
        # The chart first: where there is a list, there is its chart.
        with exclusive(output, "tools/search_harpe_bases.py"), whole_file(output) as stream:
            stream.write(json.dumps(result, indent=1) + "\n")
            with whole_file(output.with_suffix(".png"), "wb") as chart:
                plot(bases, heights, args, chart)
        print(f"{'best head over ' + str(args.length) + ' positions':<36} {'mean':>8} {'lowest':>8}")
        for name, values in covered.items():
            print(f"{name:<36} {values.mean:>8.3f} {values.minimum:>8.3f}")
        print(
            f"{output}, {output.with_suffix('.png')}; train with --position-embedding-type harpe --harpe-bases {output}"
        )


if __name__ == "__main__":
    main()
