"""What a checkpoint's sums cost: saves and loads of about 2 GB through the trainer, with sums and without.

    python examples/checkpoint_sums/measure.py --folder /data/scratch --processes 1 2 --out results.json

Median seconds of each way (plainly, with sizes, with sums), and the median over the rounds of the difference between a
way and the plain one of the same round, with the quartiles of these differences; the processors' seconds beside the
clock's, which a shared machine disturbs. "Plainly" is Megatron's and torch's own save and load. The ways follow one
another within a round, and each is first equally often. It ends within --seconds and one more round.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
import installed  # noqa: F401

from megatron_ksa.errors import UsageError, usage_errors_exit
from megatron_ksa.files import check_writable
from megatron_ksa.platform.ports import free_port
from megatron_ksa.results import Results, machine, processor

HERE = Path(__file__).parent
WAYS = ("plain", "sizes", "sums")
MODEL = (
    "--num-layers 1 --ffn-hidden-size 2048 --num-attention-heads 16 --seq-length 32 --max-position-embeddings 32 "
    "--normalization RMSNorm --disable-bias-linear --hidden-dropout 0 --untie-embeddings-and-output-weights --ksa "
    "--ksa-window-chunks 1 --position-embedding-type rope --micro-batch-size 1 --global-batch-size 2 --train-iters 1 "
    "--mock-data --split 100,0,0 --tokenizer-type NullTokenizer --lr 1e-4 --lr-decay-style constant --eval-iters 0 "
    "--log-interval 1 --ckpt-format torch_dist --use-distributed-optimizer"
).split()


def run(options: argparse.Namespace, processes: int, folder: Path, *flags: str) -> dict:
    """One run of the trainer; what it measured."""
    record, log = folder / "record.json", folder / "log.txt"
    size = ["--hidden-size", str(options.hidden_size), "--vocab-size", str(options.vocab_size)]
    seconds = options.seconds / (2 * len(options.processes))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port",
        str(free_port()), str(HERE / "measured_pretrain.py"), str(record), str(options.rounds), str(seconds),
        *MODEL, *size, *flags,
    ]  # fmt: skip
    threads = str(max((os.cpu_count() or 1) // processes, 1))
    with open(log, "w", encoding="utf-8") as out:
        done = subprocess.run(
            command, stdout=out, stderr=out, env={"OMP_NUM_THREADS": threads, **os.environ}, check=False
        )
    if done.returncode or not record.exists():
        tail = log.read_text(encoding="utf-8", errors="replace")[-1500:]
        raise UsageError(f"the trainer ended with exit code {done.returncode}: {tail}")
    return json.loads(record.read_text(encoding="utf-8"))


def summary(times: list[dict], what: str) -> dict:
    """Medians of one operation, by way; the extra against the plain one of the same round."""
    rounds = sorted({each["round"] for each in times})
    by = {(each["round"], each["way"]): each for each in times if each["what"] == what}
    found: dict[str, object] = {"rounds": len(rounds)}
    for unit in ("seconds", "processor_seconds", "user_seconds"):
        for way in WAYS:
            values = [by[turn, way][unit] for turn in rounds]
            found[f"{way}_{unit}"] = round(statistics.median(values), 3)
            found[f"{way}_{unit}_all"] = [round(value, 3) for value in values]
        for way in WAYS[1:]:
            more = [by[turn, way][unit] - by[turn, "plain"][unit] for turn in rounds]
            found[f"{way}_more_{unit}"] = round(statistics.median(more), 3)
            plain = statistics.median(by[turn, "plain"][unit] for turn in rounds)
            found[f"{way}_more_{unit}_percent"] = _percent(statistics.median(more), plain)
            found[f"{way}_more_{unit}_quartiles_percent"] = [_percent(value, plain) for value in _quartiles(more)]
    for way in WAYS:
        found[f"{way}_bytes_from_disk"] = statistics.median(by[turn, way].get("bytes_from_disk", 0) for turn in rounds)
    return found


def _percent(part: float, whole: float) -> float:
    return round(100 * part / whole, 1)


def _quartiles(values: list[float]) -> tuple[float, float]:
    """The first and the third; of fewer than two values, the value itself."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def measure(options: argparse.Namespace) -> None:
    """Save and load with each number of processes."""
    import xxhash

    sizes = {"processes": min(options.processes), "rounds": options.rounds}
    for flag, value in (sizes | {"hidden-size": options.hidden_size, "vocab-size": options.vocab_size}).items():
        if value < 1:
            raise UsageError(f"--{flag} {value}: at least 1")
    if not 0 < options.seconds < math.inf:
        raise UsageError(f"--seconds {options.seconds:g}: a number above 0")
    for folder in (options.folder, options.out.parent):
        if folder is not None:
            check_writable(folder)
    settings = {"hidden_size": options.hidden_size, "vocab_size": options.vocab_size}
    settings |= {"xxhash": xxhash.VERSION, "cpu": processor(), "load_average": os.getloadavg()[0]}
    results = Results(options.out, settings, ("processes", "what"), options.commit)
    for processes in options.processes:
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            folder, saved = Path(name), str(Path(name) / "save")
            found = run(options, processes, folder, "--save", saved, "--save-interval", "1")
            parts = [("save", found)]
            found = run(options, processes, folder, "--load", saved)
            parts += [(what, found) for what in ("load from cache", "load from disk")]
        for what, found in parts:
            row = {"processes": processes, "what": what, "bytes": found["bytes"], **summary(found["times"], what)}
            results.add(row)
            print(told(row), flush=True)
    print(f"measured on {machine(options.commit)}")


def told(row: dict) -> str:
    """A row in one line: clock and processors, the middle half of the rounds, and whether a load came from the disk."""
    parts = []
    for unit, name in (("seconds", "clock"), ("processor_seconds", "processors")):
        low, high = row[f"sums_more_{unit}_quartiles_percent"]
        parts.append(
            f"{name} {row[f'plain_{unit}']:.2f} s plainly, {row[f'sums_{unit}']:.2f} s with sums: "
            f"{row[f'sums_more_{unit}_percent']:+.1f} % (half of the rounds {low:+.1f} to {high:+.1f} %)"
        )
    line = f"{row['processes']} processes, {row['what']} of {row['bytes'] / 1e9:.2f} GB, {row['rounds']} rounds: "
    line += "; ".join(parts)
    if row["what"] == "load from disk":
        shares = [row[f"{way}_bytes_from_disk"] / row["bytes"] for way in ("plain", "sums")]
        line += f"; {shares[0]:.0%} and {shares[1]:.0%} of the bytes came from the disk"
    return line


def parse_args() -> argparse.Namespace:
    """The script's flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=None, help="where the checkpoints lie meanwhile (about 2 GB)")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="ranks that save and load")
    parser.add_argument("--rounds", type=int, default=9, help="times that each way is measured, at most")
    parser.add_argument("--seconds", type=float, default=240, help="after which no round begins (240)")
    parser.add_argument("--hidden-size", type=int, default=2048, help="of the model: 2048 makes 2 GB")
    parser.add_argument("--vocab-size", type=int, default=24000, help="of the model")
    parser.add_argument("--out", type=Path, default=HERE / "results.json", help="results, JSON")
    parser.add_argument("--commit", help="of the code, where it is no git checkout")
    return parser.parse_args()


if __name__ == "__main__":
    with usage_errors_exit():
        measure(parse_args())
