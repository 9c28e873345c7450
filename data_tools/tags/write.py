"""The write step: the selection as Megatron indexed datasets, one for each top branch of the tree or each source, and a
blend file.

`blend/blend.txt` is what `--data-args-path` takes: "weight prefix weight prefix ...". With the loss on responses every
dataset has its mask beside it (`indexed.loss_mask_prefix`), which `--response-loss-only` reads.
"""

import re
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from megatron_ksa.data_tools.indexed import IndexedDatasetWriter, loss_mask_prefix
from megatron_ksa.data_tools.tags.blend_check import check_blend
from megatron_ksa.data_tools.tags.canonicalise import EMBEDDINGS
from megatron_ksa.data_tools.tags.chat_template import EncodingSettings, check_encoding, encode_records
from megatron_ksa.data_tools.tags.files import json_line, write_json
from megatron_ksa.data_tools.tags.ground import GROUNDING
from megatron_ksa.data_tools.tags.groups import Group, GroupSettings, check_repeated, groups_of, target_mass, weights_of
from megatron_ksa.data_tools.tags.packing import Packer
from megatron_ksa.data_tools.tags.pool import Pool, load_pool, read_records
from megatron_ksa.data_tools.tags.read import RECORDS
from megatron_ksa.data_tools.tags.selection import SELECTION, budgets_of, read_selection
from megatron_ksa.data_tools.tags.step import Context, Step
from megatron_ksa.data_tools.tags.tree import BRANCH_NAMES, TREE
from megatron_ksa.data_tools.tokenizers import Tokenizer, load_tokenizer
from megatron_ksa.errors import UsageError
from megatron_ksa.files import whole_file

# A folder, and in it what training reads, the summary, what is not written, and what is not written whole.
BLEND, BLEND_FILE, BLEND_SUMMARY = "blend", "blend.txt", "blend.json"
UNWRITTEN, SHORTENED = "unwritten.jsonl", "shortened.jsonl"


@dataclass(frozen=True)
class _Job:
    """What one write does.

    Args:
        work: the work folder.
        pool: the chosen instances.
        settings, encoding, tokenizer: what is written, and how.
        groups: group of each instance.
        branch: int64 [instances], top branch of each, -1 where a tag is the root itself.
        target: float64 [nodes], the target's mass at or below each node, or None where weights do not need it.
        run: as `encode_records` takes it.
    """

    work: Path
    pool: Pool
    settings: GroupSettings
    encoding: EncodingSettings
    tokenizer: Tokenizer
    groups: list[Group]
    branch: np.ndarray
    target: np.ndarray | None
    run: Callable
    show_progress: bool


class _Dataset:
    """The files of one dataset while they are written, packed or not.

    Args:
        prefix: path of the dataset.
        masked: write the loss mask beside it.
    """

    def __init__(self, stack: ExitStack, prefix: str, job: _Job, *, masked: bool) -> None:
        self._tokens = stack.enter_context(IndexedDatasetWriter(prefix, job.tokenizer.vocab_size))
        self._mask = None
        if masked:
            self._mask = stack.enter_context(IndexedDatasetWriter(loss_mask_prefix(prefix), 2, dtype=np.uint8))
        pack = job.encoding.pack
        self._packer = Packer(pack, job.tokenizer.end_of_document) if pack else None
        self.documents = self.written_tokens = 0

    def add(self, ids: np.ndarray, mask: np.ndarray) -> None:
        """Write an instance: a document of its own, or a part of one."""
        self._write([(ids, mask)] if self._packer is None else self._packer.add(ids, mask))

    def finish(self) -> None:
        """Write what still waits to be packed."""
        self._write([] if self._packer is None else self._packer.rest())

    def _write(self, documents: list[tuple[np.ndarray, np.ndarray]]) -> None:
        for ids, mask in documents:
            self._tokens.add_document(ids)
            if self._mask is not None:
                self._mask.add_document(mask)
            self.documents += 1
            self.written_tokens += len(ids)


def _writes_masks(encoding: EncodingSettings) -> bool:
    # What fills a packed document is outside the loss.
    return encoding.loss_on == "responses" or encoding.pack > 0


def _write_datasets(job: _Job, folder: Path) -> dict:
    """Write every instance into its group's dataset; returns how many are not written, and how many not whole."""
    pool = job.pool
    reasons: Counter[str] = Counter()
    shortened_ones = 0
    every = {group.prefix: group for group in job.groups}
    with ExitStack() as stack:
        unwritten, shortened = (stack.enter_context(whole_file(folder / name)) for name in (UNWRITTEN, SHORTENED))
        datasets = {
            name: _Dataset(stack, str(folder / name), job, masked=_writes_masks(job.encoding)) for name in every
        }
        records = read_records(job.work, pool.record)
        encoded = encode_records(records, job.encoding, job.run)
        rows = zip(read_records(job.work, pool.record), encoded, job.groups, job.branch.tolist(), strict=True)
        for record, result, group, node in tqdm(
            rows, total=pool.instances, desc="write", unit=" instances", mininterval=1.0, disable=not job.show_progress
        ):
            if isinstance(result, str):
                unwritten.write(json_line({"id": record["id"], "reason": result}))
                reasons[result] += 1
                continue
            if result.cut or result.truncated:
                row = {"after_last_response": result.cut, "beyond_length": result.truncated}
                shortened.write(json_line({"id": record["id"], **row}))
                shortened_ones += 1
            datasets[group.prefix].add(result.ids, result.mask)
            group.add(node, result.mask)
        for name, group in every.items():
            datasets[name].finish()
            group.documents, group.written_tokens = datasets[name].documents, datasets[name].written_tokens
    for name, group in every.items():
        if not group.instances:
            for path in folder.glob(f"{name}*"):
                path.unlink()
    return {"unwritten": reasons.total(), "reasons": dict(reasons.most_common()), "shortened": shortened_ones}


def _write_blend(job: _Job, folder: Path, final: Path) -> dict:
    """Fill `folder`, which will be called `final`, and return the summary."""
    tokenizer = job.tokenizer
    counts = _write_datasets(job, folder)
    written = sorted(
        {group.prefix: group for group in job.groups if group.instances}.values(), key=lambda group: group.prefix
    )
    if not written:
        said = "; ".join(f"{count:,} {reason}" for reason, count in list(counts["reasons"].items())[:3])
        raise UsageError(f"no instance can be written: {said} (--template, --max-length, --pack)")
    weights = weights_of(written, job.settings, job.target)
    flags = [tokenizer.training_flags] + ["--response-loss-only"] * _writes_masks(job.encoding)
    fields = ("name", "prefix", "instances", "documents", "tokens", "tokens_in_loss", "written_tokens")
    datasets = [
        {**{name: getattr(group, name) for name in fields}, "weight": weight}
        for group, weight in zip(written, weights, strict=True)
    ]
    summary = {
        "settings": asdict(job.encoding) | asdict(job.settings),
        **{name: sum(getattr(group, name) for group in written) for name in fields[2:]},
        **counts,
        "training_flags": " ".join(flags),
        "datasets": datasets,
    }
    # Megatron takes no dataset of weight 0.
    in_blend = [dataset for dataset in datasets if dataset["weight"] > 0]
    check_blend(folder, in_blend, tokenizer.end_of_document, tokenizer.vocab_size)
    write_json(folder / BLEND_SUMMARY, summary)
    with whole_file(folder / BLEND_FILE) as stream:
        stream.writelines(f"{dataset['weight']:.8g} {final / dataset['prefix']}\n" for dataset in in_blend)
    return summary


def check_write(work: Path, settings: GroupSettings, encoding: EncodingSettings, target: Path | None) -> None:
    """Check what can be told before there is a selection.

    Raises:
        UsageError: no tokenizer or chat template, a path with white space, weights of a target that is not there.
    """
    if encoding.tokenizer_model is None:
        raise UsageError("--tokenizer-model is needed: tools/train_tokenizer.py makes one")
    check_encoding(encoding)
    if re.search(r"\s", str((work / BLEND).absolute())):
        raise UsageError(f"--work {work}: Megatron splits blend files at white space; choose a path without")
    if settings.weights == "target" and target is None:
        raise UsageError("--weights target needs --target")


def write_step(
    work: Path,
    settings: GroupSettings,
    encoding: EncodingSettings,
    *,
    target: Path | None = None,
    run: Callable = map,
    show_progress: bool = True,
) -> dict:
    """Write `blend/` of a work folder, have Megatron read it, and only then give it its name.

    With `every_budget` the blend of each smaller budget is a folder in it, and all of them appear together.

    Args:
        target: the target's folder, for `weights="target"`.
        run: as `encode_records` takes it.

    Returns:
        The summary, also in `blend/blend.json`.

    Raises:
        UsageError: nothing to write, a tokenizer or template that does not work, a path with white space.
    """
    check_write(work, settings, encoding, target)
    final, partial = (work / BLEND).absolute(), (work / f"{BLEND}.partial").absolute()
    mass = target_mass(work, target, settings)
    tokenizer = load_tokenizer(encoding.tokenizer_model)
    whole = load_pool(work, vectors=True)

    def write(budget: int, name: str) -> dict:
        pool = whole.take(np.sort(read_selection(work, budget)))
        if not pool.instances:
            raise UsageError(f"{work / SELECTION}: nothing is chosen; run the sample step again")
        groups = groups_of(work, pool, settings)
        if name == "":
            check_repeated(groups[0], settings)
        job = _Job(work, pool, settings, encoding, tokenizer, *groups, mass, run, show_progress)
        (partial / name).mkdir(parents=True)
        return _write_blend(job, partial / name, final / name)

    shutil.rmtree(partial, ignore_errors=True)
    try:
        summary = write(settings.of_budget, "")
        smaller = (settings.of_budget or budgets_of(work)) - 1 if settings.every_budget else 0
        for budget in range(1, smaller + 1):
            write(budget, f"budget-{budget}")
        summary["smaller_blends"] = smaller
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    return summary


def _check(context: Context, settings: GroupSettings, encoding: EncodingSettings) -> None:
    check_write(context.folder, settings, encoding, context.target)


def _run(context: Context, settings: GroupSettings, encoding: EncodingSettings) -> dict:
    summary = write_step(context.folder, settings, encoding, target=context.target, run=context.engine.map)
    names = ("instances", "tokens", "tokens_in_loss", "unwritten", "reasons", "shortened")
    outside = {dataset["name"]: dataset["instances"] for dataset in summary["datasets"] if not dataset["weight"]}
    return {
        "datasets": len(summary["datasets"]),
        **{name: summary[name] for name in names},
        **({"outside_the_blend": outside} if outside else {}),
        **({"smaller_blends": summary["smaller_blends"]} if summary["smaller_blends"] else {}),
    }


def _tokenizer_and_target(context: Context, settings: GroupSettings, encoding: EncodingSettings) -> dict[str, Path]:
    files = {"tokenizer:": Path(encoding.tokenizer_model)}
    if settings.weights == "target":
        files |= context.files(context.target, "target", GROUNDING)
    return files


def _decides(context: Context, settings: GroupSettings, encoding: EncodingSettings) -> dict:
    # The blend file and the flags for training name places.
    return asdict(settings) | asdict(encoding) | {"folder": str(context.folder.absolute())}


STEP = Step(
    "write", {"writing": GroupSettings, "encoding": EncodingSettings},
    reads=(RECORDS, GROUNDING, TREE, BRANCH_NAMES, EMBEDDINGS, SELECTION), writes=(BLEND,),
    run=_run, also_reads=_tokenizer_and_target, decides=_decides, check=_check,
)  # fmt: skip
