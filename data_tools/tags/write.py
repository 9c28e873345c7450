"""The write step: the selection as Megatron indexed datasets, one for each top branch of the tree or each source, and a
blend file.

`blend/blend.txt` is what `--data-args-path` takes: "weight prefix weight prefix ...". With the loss on responses every
dataset has its mask beside it (`indexed.loss_mask_prefix`), which `--response-loss-only` reads.
"""

import re
import shutil
import unicodedata
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from megatron_ksa.config.options import option
from megatron_ksa.data_tools.indexed import IndexedDatasetWriter, loss_mask_prefix
from megatron_ksa.data_tools.tags.blend_check import check_blend
from megatron_ksa.data_tools.tags.branches import branch_of
from megatron_ksa.data_tools.tags.canonicalise import EMBEDDINGS
from megatron_ksa.data_tools.tags.chat_template import EncodingSettings, encode_records
from megatron_ksa.data_tools.tags.files import json_line, read_jsonl, write_json
from megatron_ksa.data_tools.tags.ground import GROUNDING
from megatron_ksa.data_tools.tags.objective import ancestors
from megatron_ksa.data_tools.tags.pool import Pool, load_pool, read_records
from megatron_ksa.data_tools.tags.read import RECORDS
from megatron_ksa.data_tools.tags.selection import SELECTION, read_selection
from megatron_ksa.data_tools.tags.step import Context, Step
from megatron_ksa.data_tools.tags.tree import TREE
from megatron_ksa.data_tools.tokenizers import Tokenizer, load_tokenizer
from megatron_ksa.errors import UsageError
from megatron_ksa.files import whole_file

GROUPS = ("branch", "source")
WEIGHTS = ("tokens", "equal", "target")
LOSSES = ("all", "responses")
# Every dataset keeps up to four files open while it is written.
MAX_DATASETS = 100
REST = "rest"
# A folder, and in it what training reads, the summary, and what the template refuses.
BLEND, BLEND_FILE, BLEND_SUMMARY, UNWRITTEN = "blend", "blend.txt", "blend.json", "unwritten.jsonl"


@dataclass(frozen=True)
class WriteSettings:
    """What the write step does.

    Args:
        loss_on: one of `LOSSES`; `responses` writes masks.
        group_by: one of `GROUPS`, what makes a dataset.
        weights: one of `WEIGHTS`: a dataset counts by its tokens, like every other, or by the target's share of its
            branch.
        min_instances: smaller groups are joined into one named `rest`, as are those beyond the largest hundred.
    """

    loss_on: str = option(
        "all", "Tokens that the loss counts; responses writes masks.", choices=LOSSES, flag="--loss-on"
    )
    group_by: str = option(
        "branch", "What makes a dataset: a top branch or a source.", choices=GROUPS, flag="--group-by"
    )
    weights: str = option(
        "tokens", "Weight of a dataset: its tokens, the same for all, or the target's share of its branch.",
        choices=WEIGHTS, flag="--weights",
    )  # fmt: skip
    min_instances: int = option(1, "Smaller datasets are joined into one named rest.", flag="--min-instances")

    def __post_init__(self) -> None:
        for name, choices in (("loss_on", LOSSES), ("group_by", GROUPS), ("weights", WEIGHTS)):
            if getattr(self, name) not in choices:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: not one of {', '.join(choices)}")
        if self.weights == "target" and self.group_by != "branch":
            raise UsageError("--weights target goes with --group-by branch")
        if self.min_instances < 1:
            raise UsageError(f"--min-instances {self.min_instances}: at least 1")


def slug(name: str) -> str:
    """A name as part of a file name: lower case ASCII letters, digits and hyphens, at most 40 of them."""
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", ascii_name).strip("-")[:40].strip("-") or "unnamed"


@dataclass
class Group:
    """One dataset: its name and file prefix, the top branches in it, and what was written."""

    name: str
    prefix: str
    nodes: set[int] = field(default_factory=set)
    instances: int = 0
    tokens: int = 0
    tokens_in_loss: int = 0

    def add(self, node: int, mask: np.ndarray) -> None:
        """Count a document, uint8 [tokens], that belongs to a branch."""
        self.nodes.add(node)
        self.instances += 1
        self.tokens += len(mask)
        self.tokens_in_loss += int(mask.sum())


def make_groups(keys: list, names: dict, min_instances: int) -> list[Group]:
    """Group of each instance; the largest comes first, and keys that few instances have share the group `rest`.

    Args:
        keys: what tells an instance's group from the others.
        names: the name of each key.
    """
    sizes = sorted(Counter(keys).items(), key=lambda item: (-item[1], names[item[0]], item[0]))
    kept = [key for key, size in sizes if size >= min_instances]
    if len(kept) > MAX_DATASETS:
        kept = kept[: MAX_DATASETS - 1]
    groups = {key: Group(names[key], f"{i:02d}-{slug(names[key])}_document") for i, key in enumerate(kept)}
    rest = Group(REST, f"{len(kept):02d}-{REST}_document")
    return [groups.get(key, rest) for key in keys]


def _groups_of(work: Path, pool: Pool, settings: WriteSettings) -> tuple[list[Group], np.ndarray]:
    """Group and top branch of each instance; the branch is int64 [instances], -1 where a tag is the root itself."""
    branch = branch_of(pool, np.flatnonzero(pool.depth == 1))
    if settings.group_by == "branch":
        keys, names = branch.tolist(), {node: REST if node < 0 else str(pool.names[node]) for node in branch.tolist()}
    else:
        keys = [record["source"] for record in read_records(work, pool.record)]
        names = {key: key for key in keys}
    return make_groups(keys, names, settings.min_instances), branch


@dataclass(frozen=True)
class _Job:
    """What one write does.

    Args:
        work: the work folder.
        pool: the chosen instances.
        groups: group of each instance.
        branch: int64 [instances], top branch of each, -1 where a tag is the root itself.
        target: float64 [nodes], the target's mass at or below each node, or None where weights do not need it.
        run: as `encode_records` takes it.
    """

    work: Path
    pool: Pool
    settings: WriteSettings
    encoding: EncodingSettings
    tokenizer: Tokenizer
    groups: list[Group]
    branch: np.ndarray
    target: np.ndarray | None
    run: Callable
    show_progress: bool


def _write_datasets(job: _Job, folder: Path) -> int:
    """Write every instance into its group's dataset; returns how many the template refuses (`unwritten.jsonl`)."""
    settings, pool, vocab_size = job.settings, job.pool, job.tokenizer.vocab_size
    refused = 0
    every = {group.prefix: group for group in job.groups}
    with ExitStack() as stack:
        unwritten = stack.enter_context(whole_file(folder / UNWRITTEN))
        writers = {name: stack.enter_context(IndexedDatasetWriter(str(folder / name), vocab_size)) for name in every}
        masks = {
            name: stack.enter_context(IndexedDatasetWriter(loss_mask_prefix(str(folder / name)), 2, dtype=np.uint8))
            for name in every if settings.loss_on == "responses"
        }  # fmt: skip
        records = read_records(job.work, pool.record)
        encoded = encode_records(records, job.encoding, job.run)
        rows = zip(read_records(job.work, pool.record), encoded, job.groups, job.branch.tolist(), strict=True)
        for record, result, group, node in tqdm(
            rows, total=pool.instances, desc="write", unit=" instances", mininterval=1.0, disable=not job.show_progress
        ):
            if isinstance(result, str):
                unwritten.write(json_line({"id": record["id"], "reason": result}))
                refused += 1
                continue
            ids, mask = result
            writers[group.prefix].add_document(ids)
            if masks:
                masks[group.prefix].add_document(mask)
            group.add(node, mask if masks else np.ones(len(ids), np.uint8))
    for name, group in every.items():
        if not group.instances:
            for path in folder.glob(f"{name}*"):
                path.unlink()
    return refused


def _weights(groups: list[Group], kind: str, target: np.ndarray | None) -> list[float]:
    """Weight of each dataset.

    Args:
        target: float64 [nodes], the target's mass at or below each node, for `kind` "target".
    """
    if kind == "tokens":
        return [group.tokens for group in groups]
    if kind == "equal":
        return [1] * len(groups)
    weights = [float(sum(target[node] for node in group.nodes if node >= 0)) for group in groups]
    left_out = [group.name for group, weight in zip(groups, weights, strict=True) if weight <= 0]
    if left_out:
        raise UsageError(
            f"--weights target: the target has nothing under {', '.join(left_out)}: raise --align-weight, "
            "or use --weights tokens"
        )
    return weights


def _write_blend(job: _Job, folder: Path, final: Path) -> dict:
    """Fill `folder`, which will be called `final`, and return the summary."""
    settings, tokenizer = job.settings, job.tokenizer
    refused = _write_datasets(job, folder)
    written = sorted(
        {group.prefix: group for group in job.groups if group.instances}.values(), key=lambda group: group.prefix
    )
    if not written:
        reason = next(read_jsonl(folder / UNWRITTEN))["reason"]
        raise UsageError(f"--template {job.encoding.template} refuses every instance, the first because {reason}")
    weights = _weights(written, settings.weights, job.target)
    flags = [tokenizer.training_flags] + ["--response-loss-only"] * (settings.loss_on == "responses")
    summary = {
        "settings": asdict(job.encoding) | asdict(settings),
        "instances": sum(group.instances for group in written),
        "tokens": sum(group.tokens for group in written),
        "tokens_in_loss": sum(group.tokens_in_loss for group in written),
        "refused_by_template": refused,
        "training_flags": " ".join(flags),
        "datasets": [
            {
                "name": group.name, "prefix": group.prefix, "weight": weight, "instances": group.instances,
                "tokens": group.tokens, "tokens_in_loss": group.tokens_in_loss,
            }
            for group, weight in zip(written, weights, strict=True)
        ],
    }  # fmt: skip
    check_blend(folder, summary["datasets"], tokenizer.end_of_document, tokenizer.vocab_size)
    write_json(folder / BLEND_SUMMARY, summary)
    with whole_file(folder / BLEND_FILE) as stream:
        stream.writelines(
            f"{weight:.8g} {final / group.prefix}\n" for group, weight in zip(written, weights, strict=True)
        )
    return summary


def check_write(work: Path, settings: WriteSettings, encoding: EncodingSettings, target: Path | None) -> None:
    """Check what can be told before there is a selection.

    Raises:
        UsageError: no tokenizer, a path with white space, weights of a target that is not there.
    """
    if encoding.tokenizer_model is None:
        raise UsageError("--tokenizer-model is needed: tools/train_tokenizer.py makes one")
    if re.search(r"\s", str((work / BLEND).absolute())):
        raise UsageError(f"--work {work}: Megatron splits blend files at white space; choose a path without")
    if settings.weights == "target" and target is None:
        raise UsageError("--weights target needs --target")


def write_step(
    work: Path,
    settings: WriteSettings,
    encoding: EncodingSettings,
    *,
    target: Path | None = None,
    run: Callable = map,
    show_progress: bool = True,
) -> dict:
    """Write `blend/` of a work folder, have Megatron read it, and only then give it its name.

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
    mass = None
    if settings.weights == "target":
        grounded = load_pool(target, tree=work)
        mass = grounded.shares.sum(axis=0) @ ancestors(grounded.parent)
    tokenizer = load_tokenizer(encoding.tokenizer_model)
    pool = load_pool(work, vectors=True)
    pool = pool.take(np.sort(read_selection(work)))
    if not pool.instances:
        raise UsageError(f"{work / SELECTION}: nothing is chosen; run the sample step again")
    job = _Job(work, pool, settings, encoding, tokenizer, *_groups_of(work, pool, settings), mass, run, show_progress)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        summary = _write_blend(job, partial, final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    return summary


def _check(context: Context, settings: WriteSettings, encoding: EncodingSettings) -> None:
    check_write(context.folder, settings, encoding, context.target)


def _run(context: Context, settings: WriteSettings, encoding: EncodingSettings) -> dict:
    summary = write_step(context.folder, settings, encoding, target=context.target, run=context.engine.map)
    names = ("instances", "tokens", "tokens_in_loss", "refused_by_template")
    return {"datasets": len(summary["datasets"]), **{name: summary[name] for name in names}}


def _tokenizer_and_target(context: Context, settings: WriteSettings, encoding: EncodingSettings) -> dict[str, Path]:
    files = {"tokenizer:": Path(encoding.tokenizer_model)}
    if settings.weights == "target":
        files |= context.files(context.target, "target", GROUNDING)
    return files


def _decides(context: Context, settings: WriteSettings, encoding: EncodingSettings) -> dict:
    # The blend file and the flags for training name places.
    return asdict(settings) | asdict(encoding) | {"folder": str(context.folder.absolute())}


STEP = Step(
    "write", {"writing": WriteSettings, "encoding": EncodingSettings},
    reads=(RECORDS, GROUNDING, TREE, EMBEDDINGS, SELECTION), writes=(BLEND,),
    run=_run, also_reads=_tokenizer_and_target, decides=_decides, check=_check,
)  # fmt: skip
