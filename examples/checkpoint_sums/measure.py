"""What a checkpoint's sums cost: saves and loads of about 2 GB through the trainer, with sums and without.

    python examples/checkpoint_sums/measure.py --folder /data/scratch --processes 1 2 --out results.json

Median seconds of each way (plainly, with sizes, with sums), and the median over the rounds of the difference between a
way and the plain one of the same round; the processors' seconds beside the clock's, which a shared machine disturbs.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

try:
    from megatron_ksa.errors import UsageError, usage_errors_exit
except ModuleNotFoundError as error:
    print(
        f"error: {error.name} is not installed here: run `pip install -e '.[train]'` in the repository", file=sys.stderr
    )
    sys.exit(2)
from megatron_ksa.evaluation.runs import Results, machine
from megatron_ksa.files import check_writable
from megatron_ksa.platform.ports import free_port

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
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port",
        str(free_port()), str(HERE / "measured_pretrain.py"), str(record), str(options.rounds), *MODEL, *size, *flags,
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
            found[f"{way}_more_{unit}_percent"] = round(100 * statistics.median(more) / found[f"plain_{unit}"], 1)
    return found


def measure(options: argparse.Namespace) -> None:
    """Save and load with each number of processes."""
    import xxhash

    for flag, value in (("processes", min(options.processes)), ("rounds", options.rounds)):
        if value < 1:
            raise UsageError(f"--{flag} {value}: at least 1")
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
            print(
                f"{processes} processes, {what} of {row['bytes'] / 1e9:.2f} GB: {row['plain_seconds']:.2f} s plainly; "
                f"sums add {row['sums_more_seconds']:+.3f} s ({row['sums_more_seconds_percent']:+.1f} %), processors "
                f"{row['plain_processor_seconds']:.2f} s {row['sums_more_processor_seconds_percent']:+.1f} %, "
                f"in user mode {row['plain_user_seconds']:.2f} s {row['sums_more_user_seconds_percent']:+.1f} %",
                flush=True,
            )  # fmt: skip
    print(f"measured on {machine(options.commit)}")


def processor() -> str:
    """The processor's name and number of cores."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if line.startswith("model name")
    ]
    return f"{len(names)} x {names[0]}" if names else platform.processor()


def parse_args() -> argparse.Namespace:
    """The script's flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=None, help="where the checkpoints lie meanwhile (about 2 GB)")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="ranks that save and load")
    parser.add_argument("--rounds", type=int, default=9, help="times that each way is measured")
    parser.add_argument("--hidden-size", type=int, default=2048, help="of the model: 2048 makes 2 GB")
    parser.add_argument("--vocab-size", type=int, default=24000, help="of the model")
    parser.add_argument("--out", type=Path, default=HERE / "results.json", help="results, JSON")
    parser.add_argument("--commit", help="of the code, where it is no git checkout")
    return parser.parse_args()


if __name__ == "__main__":
    with usage_errors_exit():
        measure(parse_args())
