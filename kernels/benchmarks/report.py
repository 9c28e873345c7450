"""Table of a record: what each op takes beside KSA at the same shape, the pairs that it sees, and what was skipped.

    python -m megatron_ksa.kernels.benchmarks.report kernels/benchmarks/results/baselines_h200.json docs/results.md

The table of baselines_h200.json goes into the section `kernels_baselines_h200` of the Markdown file.
"""

import json
from pathlib import Path

from megatron_ksa.errors import UsageError
from megatron_ksa.kernels.benchmarks.registry import BOTH, FORWARD
from megatron_ksa.markdown import replace_section, report_command, table

SECTION = "kernels_"
NAMES = {
    "ksa": "KSA", "window": "window alone", "full_attention": "full attention", "nsa": "NSA", "moba": "MoBA",
    "flash_attention_4": "FlashAttention 4", "flex_attention": "FlexAttention",
    "flex_attention_interleaved": "FlexAttention, rows in sequence order",
}  # fmt: skip
COLUMNS = (
    "text tokens", "op", "heads", "visible pairs a head", "forward ms", "/ KSA", "forward + backward ms", "/ KSA",
    "GPU",
)  # fmt: skip


def tables(record: dict) -> str:
    """Markdown: where and how, a row for each op and shape with both times, and a line on what has none."""
    timed = [result for result in record["results"] if {FORWARD, BOTH} <= set(result.get("modes", ()))]
    if not timed:
        return "Not measured yet."
    texts = [_where(record["header"], timed[0]["shape"]), table(COLUMNS, _rows(record, timed))]
    missing = _missing([result for result in record["results"] if "skipped" in result or "error" in result])
    if missing:
        texts.append(f"Not timed: {missing}.")
    varying = _varying(record["checks"])
    if varying:
        texts.append(f"Gradients that are not the same bits in two calls with the same inputs: {', '.join(varying)}.")
    return "\n\n".join(texts)


def _rows(record: dict, timed: list[dict]) -> list[list[str]]:
    """By heads, then length, then op, each in the record's order."""
    heads, lengths, ops = (list(dict.fromkeys(map(key, timed))) for key in (_heads, _length, _op))
    order = sorted(timed, key=lambda r: (heads.index(_heads(r)), lengths.index(_length(r)), ops.index(_op(r))))
    ksa = {(_heads(result), _length(result)): result for result in timed if _op(result) == "ksa"}
    gpu = _gpu(record["header"])
    rows = []
    for result in order:
        base = ksa.get((_heads(result), _length(result)))
        times = []
        for mode in (FORWARD, BOTH):
            ms = result["modes"][mode]["median_ms"]
            over = base is not None and base is not result
            times += [_ms(ms), f"{ms / base['modes'][mode]['median_ms']:.2f}" if over else ""]
        pairs = result.get("visible_pairs")
        seen = "" if pairs is None else f"{pairs:,}"
        rows.append([f"{_length(result):,}", _name(result), _heads(result), seen, *times, gpu])
    return rows


def _op(result: dict) -> str:
    return result["op"]


def _heads(result: dict) -> str:
    return f"{result['shape']['heads']}/{result['shape']['groups']}"


def _length(result: dict) -> int:
    return result["shape"]["n"]


def _ms(ms: float) -> str:
    """Three or four significant digits."""
    return f"{ms:.{3 if ms < 1 else 2 if ms < 100 else 1}f}"


def _name(result: dict) -> str:
    """The op, and what it was run with."""
    name = NAMES.get(result["op"], result["op"])
    if "backend" in result:
        name += f" ({result['backend']})"
    if result["op"] == "nsa" and not result["window_tokens"]:
        name += " without its window"
    return name


def _gpu(header: dict) -> str:
    return header["gpu"] or header["device"]


def _where(header: dict, shape: dict) -> str:
    cudnn = f", cuDNN {header['cudnn']}" if "cudnn" in header else ""
    return (
        f"One {_gpu(header)}, torch {header['torch']}, triton {header['triton']}{cudnn}, "
        f"commit {header['commit'][:9]}, {shape['dtype']}, batch {shape['batch']}, query/KV heads of "
        f"{shape['head_dim']}, {shape['chunk_size']} text tokens and {shape['summary_tokens']} summary a chunk, window "
        f"{shape['window_chunks']} chunks; medians from a cold L2 cache."
    )


def _missing(results: list[dict]) -> str:
    """Ops and shapes without times, each reason once."""
    lengths = {_length(result) for result in results}
    shapes: dict[tuple[str, str], dict[str, list[int]]] = {}
    for result in results:
        reason = result.get("skipped") or result["error"]
        shapes.setdefault((_op(result), reason), {}).setdefault(_heads(result), []).append(_length(result))
    texts = []
    for (op, reason), by_heads in shapes.items():
        places = [
            heads if set(found) == lengths else f"{heads} ({', '.join(f'{n:,}' for n in found)} tokens)"
            for heads, found in by_heads.items()
        ]
        texts.append(f"{NAMES.get(op, op)}, heads {' and '.join(places)}: {reason}")
    return "; ".join(texts)


def _varying(checks: dict) -> list[str]:
    """Ops of which two backward passes with the same inputs gave other bits."""
    return [
        NAMES.get(op, op) for op, cases in checks.items() if any(entries.get("repeat", 0) for entries in cases.values())
    ]


def write_report(results: Path, path: Path) -> None:
    """Put the table of a record into its section of a Markdown file.

    Raises:
        UsageError: the file is no record of the benchmarks.
    """
    try:
        text = tables(json.loads(results.read_text(encoding="utf-8")))
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{results}: no record of the benchmarks ({error!r})") from None
    replace_section(path, SECTION + results.stem, text)


if __name__ == "__main__":
    report_command(__doc__, "python -m megatron_ksa.kernels.benchmarks", write_report)
