"""The sample step: from `grounding.npz` and `tree.npz` of a work folder to `selection.jsonl` and `selection.json`."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from megatron_ksa.data_tools.tags.budget import counts_tokens
from megatron_ksa.data_tools.tags.canonicalise import EMBEDDINGS
from megatron_ksa.data_tools.tags.chat_template import EncodingSettings, encode_records
from megatron_ksa.data_tools.tags.files import read_jsonl, write_json, write_jsonl
from megatron_ksa.data_tools.tags.ground import GROUNDING
from megatron_ksa.data_tools.tags.pool import Pool, load_pool, read_records
from megatron_ksa.data_tools.tags.read import RECORDS
from megatron_ksa.data_tools.tags.sample import Sample, SampleSettings, sample
from megatron_ksa.data_tools.tags.step import Context, Step
from megatron_ksa.data_tools.tags.tree import TREE
from megatron_ksa.errors import UsageError

SELECTION, SUMMARY = "selection.jsonl", "selection.json"


def count_tokens(work: Path, pool: Pool, settings: EncodingSettings, run: Callable = map) -> np.ndarray:
    """int64 [instances], tokens of each instance as the write step will write it; 0 where the template refuses it."""
    records = read_records(work, pool.record)
    encoded = encode_records(records, settings, run)
    bar = tqdm(encoded, total=pool.instances, desc="count tokens", unit=" instances", mininterval=1.0)
    return np.array([0 if isinstance(result, str) else len(result.ids) for result in bar], np.int64)


def sample_step(
    work: Path,
    settings: SampleSettings,
    *,
    target: Path | None = None,
    tokens: EncodingSettings | None = None,
    run: Callable = map,
    show_progress: bool = True,
) -> Sample:
    """Choose from the pool of a work folder and write the selection.

    Args:
        target: the folder of a target that is grounded on this pool's tree, or None.
        tokens: needed for a budget in tokens only.
        run: as `encode_records` takes it.

    Raises:
        UsageError: from `sample`, or a file that is missing.
    """
    pool = load_pool(work, vectors=settings.method in ("label-graph", "cluster-balanced"))
    rows, refused = np.arange(pool.instances), 0
    if tokens is not None and pool.instances:
        pool = replace(pool, tokens=count_tokens(work, pool, tokens, run))
        rows = np.flatnonzero(pool.tokens)
        refused = pool.instances - len(rows)
        pool = pool.take(rows)
    wanted = None if target is None else load_pool(target, tree=work).shares.sum(axis=0)
    found = sample(pool, settings, wanted, show_progress=show_progress)
    found = replace(found, chosen=rows[found.chosen], summary={**found.summary, "refused_by_template": refused})
    _write(work, found, load_pool(work).record if refused else pool.record)
    return found


def _write(work: Path, found: Sample, record: np.ndarray) -> None:
    order = np.argsort(found.chosen)
    chosen = found.chosen[order]
    ids = {
        row: found_record["id"]
        for row, found_record in zip(chosen.tolist(), read_records(work, record[chosen]), strict=True)
    }
    write_jsonl(work / SELECTION, (
        {"row": row, "id": ids[row], "gain": None if np.isnan(gain) else gain}
        for row, gain in zip(found.chosen.tolist(), found.gains.tolist(), strict=True)
    ))  # fmt: skip
    write_json(work / SUMMARY, found.summary)


def read_selection(work: Path) -> np.ndarray:
    """int64 [chosen], rows of `grounding.npz` in order of choice."""
    return np.array([row["row"] for row in read_jsonl(work / SELECTION)], np.int64)


def read_summary(path: Path) -> dict:
    """A step's summary.

    Raises:
        UsageError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(
            f"{path} does not exist: run the step that writes it first (data_tools/tags/README.md)"
        ) from None
    except ValueError as error:
        raise UsageError(f"{path}: {error}; delete it and run its step again") from None


def _counted(settings: SampleSettings, encoding: EncodingSettings) -> EncodingSettings | None:
    """How tokens are counted, where the budget is in tokens and there is a tokenizer."""
    return encoding if counts_tokens(settings.budget) and encoding.tokenizer_model else None


def _run(context: Context, settings: SampleSettings, encoding: EncodingSettings) -> dict:
    tokens = _counted(settings, encoding)
    summary = sample_step(
        context.folder, settings, target=context.target, tokens=tokens, run=context.engine.map
    ).summary
    names = ("pool_instances", "instances", "pool_tokens", "tokens", "refused_by_template")
    return {name: summary[name] for name in names if name in summary}


def _target_and_tokenizer(context: Context, settings: SampleSettings, encoding: EncodingSettings) -> dict[str, Path]:
    files = {} if context.target is None else context.files(context.target, "target", GROUNDING)
    if _counted(settings, encoding) is not None:
        files["tokenizer:"] = Path(encoding.tokenizer_model)
    return files


def _decides(context: Context, settings: SampleSettings, encoding: EncodingSettings) -> dict:
    return asdict(settings) | (encoding.decides() if _counted(settings, encoding) else {})


STEP = Step(
    "sample", {"sampling": SampleSettings, "encoding": EncodingSettings},
    reads=(RECORDS, GROUNDING, TREE, EMBEDDINGS), writes=(SELECTION, SUMMARY),
    run=_run, also_reads=_target_and_tokenizer, decides=_decides,
)  # fmt: skip
