"""The steps from raw data to a blend and its report, each skipped when its last run stands (`manifest.py`)."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_ksa.config.options import option
from megatron_ksa.data_tools.readers import input_files
from megatron_ksa.data_tools.tags import canonicalise, duplicates, ground, read, tag, tree
from megatron_ksa.data_tools.tags.budget import counts_tokens
from megatron_ksa.data_tools.tags.engine import Engine
from megatron_ksa.data_tools.tags.files import copy_whole
from megatron_ksa.data_tools.tags.manifest import Manifest
from megatron_ksa.data_tools.tags.records import RecordSettings
from megatron_ksa.data_tools.tags.report import report_step
from megatron_ksa.data_tools.tags.sample import SampleSettings
from megatron_ksa.data_tools.tags.selection import TokenSettings, sample_step
from megatron_ksa.data_tools.tags.taggers import Tagger
from megatron_ksa.data_tools.tags.taggers.endpoint import EndpointSettings, EndpointTagger
from megatron_ksa.data_tools.tags.taggers.in_data import InDataTagger
from megatron_ksa.data_tools.tags.taggers.keyphrase import KeyphraseTagger
from megatron_ksa.data_tools.tags.write import WriteSettings, write_step
from megatron_ksa.errors import UsageError

TAGGERS = ("keyphrase", "llm", "data")
TARGET = "target"
CACHE = "tag_cache/answers.sqlite"
# What instances need to be put on a tree.
TREE_FILES = (
    canonicalise.VOCABULARY, canonicalise.MERGES, canonicalise.EMBEDDINGS, canonicalise.EMBEDDER, tree.TREE,
)  # fmt: skip


@dataclass(frozen=True)
class TaggerSettings:
    """Where tags come from."""

    kind: str = option(
        "keyphrase",
        "llm: an endpoint. keyphrase: phrases that TF-IDF finds, offline, the weaker choice. data: the records' own.",
        choices=TAGGERS, flag="--tagger",
    )  # fmt: skip
    count: int = option(6, "Tags of a record, at most (keyphrase).", flag="--tags-per-record")
    retry_failed: bool = option(False, "Ask again about records that failed in the last run.", flag="--retry-failed")


@dataclass(frozen=True)
class TreeStepSettings:
    """Settings of the steps that `tree` runs."""

    duplicates: duplicates.DuplicateSettings
    canonical: canonicalise.CanonicalSettings
    tree: tree.TreeSettings
    ground: ground.GroundSettings


class Pipeline:
    """Runs the steps of one work folder.

    Args:
        folder: the work folder.
        engine: where records are handled.
        tell: takes one line for every step.
    """

    def __init__(self, folder: Path, engine: Engine, tell: Callable[[str], None] = print) -> None:
        self.folder, self.engine, self.tell = folder, engine, tell
        self.manifest = Manifest(folder)

    def run(
        self,
        step: str,
        settings: dict,
        inputs: dict[str, Path],
        outputs: list[str],
        action: Callable[[], dict],
        *,
        again: bool = False,
    ) -> None:
        """Do one step if needed, and tell what came of it. Arguments as `Manifest.run` takes them."""
        done = self.manifest.run(step, settings, inputs, outputs, action, again=again)
        counts = self.manifest.steps[step]["counts"]
        self.tell(f"{step}: {'' if done else 'stands; '}{_sentence(counts)}")

    def counts(self, step: str) -> dict:
        """Counts of a step's last run.

        Raises:
            UsageError: it was not run.
        """
        if step not in self.manifest.steps:
            raise UsageError(
                f"--work {self.folder}: the {step} step was not run here; data_tools/tags/README.md has the order"
            )
        return self.manifest.steps[step]["counts"]

    def _own(self, *names: str) -> dict[str, Path]:
        return {name: self.folder / name for name in names}

    def read(self, inputs: list[str], pattern: str, settings: RecordSettings) -> None:
        """Raw files to `records.jsonl`."""
        files = input_files(inputs, pattern)
        named = {f"{number}:{path.name}": path for number, path in enumerate(files)}
        self.run(
            "read", asdict(settings), named, [read.RECORDS, read.REJECTED],
            lambda: read.read(files, self.folder, settings, self.engine),
        )  # fmt: skip

    def tag(self, settings: TaggerSettings, endpoint: EndpointSettings, pool: Path | None = None) -> None:
        """Tags of every record.

        Args:
            pool: work folder whose phrases are used, for a target.
        """
        inputs = self._own(read.RECORDS)
        if pool is not None and settings.kind == "keyphrase":
            inputs["pool"] = pool / read.RECORDS
        tagger = self._tagger(settings, endpoint, inputs.get("pool"))
        again = settings.retry_failed and bool(self.manifest.steps.get("tag", {}).get("counts", {}).get("failed"))
        total = self.counts("read")["records"]
        self.run(
            "tag", tagger.settings(), inputs, [tag.TAGS, tag.FAILED, tag.DROPPED],
            lambda: tag.tag(self.folder, tagger, total), again=again,
        )  # fmt: skip

    def _tagger(self, settings: TaggerSettings, endpoint: EndpointSettings, pool: Path | None) -> Tagger:
        if settings.kind == "llm":
            return EndpointTagger(endpoint, self.folder / CACHE)
        if settings.kind == "data":
            return InDataTagger()
        return KeyphraseTagger(settings.count, self.engine, pool=pool)

    def duplicates(self, settings: duplicates.DuplicateSettings) -> None:
        """Near-duplicate instances."""
        total = self.counts("tag")["tagged"]
        self.run(
            "duplicates", asdict(settings), self._own(read.RECORDS, tag.TAGS), [duplicates.DUPLICATES],
            lambda: duplicates.find_duplicates(self.folder, settings, self.engine, total),
        )  # fmt: skip

    def tree(self, settings: TreeStepSettings) -> None:
        """Duplicates, canonical tags, the tree, and the pool on it."""
        self.duplicates(settings.duplicates)
        pool = self._own(read.RECORDS, tag.TAGS, duplicates.DUPLICATES)
        names = ("VOCABULARY", "MERGES", "CARRIED", "EMBEDDINGS", "EMBEDDER")
        outputs = [getattr(canonicalise, name) for name in names]
        self.run(
            "canonicalise", asdict(settings.canonical), pool, outputs,
            lambda: canonicalise.canonicalise(self.folder, settings.canonical, self.engine),
        )  # fmt: skip
        self.run(
            "tree", asdict(settings.tree),
            self._own(canonicalise.VOCABULARY, canonicalise.CARRIED, canonicalise.EMBEDDINGS), [tree.TREE],
            lambda: tree.tree(self.folder, settings.tree),
        )  # fmt: skip
        self.ground(settings.ground, self.folder)

    def ground(self, settings: ground.GroundSettings, tree_folder: Path) -> None:
        """The folder's instances on a tree, its own or an older one."""
        inputs = self._own(read.RECORDS, tag.TAGS, duplicates.DUPLICATES)
        inputs |= {f"tree/{name}": tree_folder / name for name in TREE_FILES}
        self.run(
            "ground", asdict(settings), inputs, [ground.GROUNDING, ground.PLACED, ground.UNPLACED],
            lambda: ground.ground(self.folder, tree_folder, settings, self.engine),
        )  # fmt: skip

    def sample(self, settings: SampleSettings, tokens: TokenSettings, target: Path | None = None) -> None:
        """The selection; tokens are counted only for a budget in tokens."""
        counted = tokens if counts_tokens(settings.budget) and tokens.tokenizer_model else None
        inputs = self._own(read.RECORDS, ground.GROUNDING, tree.TREE, canonicalise.EMBEDDINGS)
        if target is not None:
            inputs["target"] = target / ground.GROUNDING
        if counted is not None:
            inputs["tokenizer"] = Path(counted.tokenizer_model)

        def action() -> dict:
            summary = sample_step(self.folder, settings, target=target, tokens=counted, run=self.engine.map).summary
            names = ("pool_instances", "instances", "pool_tokens", "tokens", "refused_by_template")
            return {name: summary[name] for name in names if name in summary}

        own = {**asdict(settings), "template": counted.template if counted else None}
        self.run("sample", own, inputs, ["selection.jsonl", "selection.json"], action)

    def write(self, settings: WriteSettings, target: Path | None = None) -> None:
        """The blend that training reads."""
        inputs = self._own(read.RECORDS, ground.GROUNDING, tree.TREE, canonicalise.EMBEDDINGS, "selection.jsonl")
        inputs["tokenizer"] = Path(settings.tokenizer_model)
        if target is not None and settings.weights == "target":
            inputs["target"] = target / ground.GROUNDING

        def action() -> dict:
            summary = write_step(self.folder, settings, target=target, run=self.engine.map)
            names = ("instances", "tokens", "tokens_in_loss", "refused_by_template")
            return {"datasets": len(summary["datasets"]), **{name: summary[name] for name in names}}

        self.run("write", {**asdict(settings), "folder": str(self.folder.absolute())}, inputs, ["blend"], action)

    def report(self, target: Path | None = None) -> None:
        """The report on whatever was done."""
        left_out = (read.REJECTED, tag.FAILED, duplicates.DUPLICATES, ground.UNPLACED, "blend")
        names = (
            read.RECORDS,
            ground.GROUNDING,
            tree.TREE,
            canonicalise.EMBEDDINGS,
            "selection.jsonl",
            "selection.json",
            *left_out,
        )
        inputs = self._own(*names)
        if target is not None:
            inputs["target"] = target / ground.GROUNDING

        def action() -> dict:
            summary = report_step(self.folder, target=target)
            return {"nodes": summary["nodes"], "nodes_shown": summary["nodes_shown"]}

        self.run("report", {}, inputs, ["report"], action)

    def ground_on(self, settings: TreeStepSettings, tree_folder: Path) -> None:
        """Duplicates, then the folder's instances on a tree that was built before."""
        if not (tree_folder / tree.TREE).is_file():
            raise UsageError(f"{tree_folder}: no {tree.TREE} there; run the tree step of that folder first")
        self.duplicates(settings.duplicates)
        self.ground(settings.ground, tree_folder)

    def adopt_tree(self, settings: TreeStepSettings, tree_folder: Path) -> None:
        """`ground_on`, with a copy of the tree in this folder, where the steps that follow look for it."""
        if tree_folder.resolve() == self.folder.resolve():
            raise UsageError(f"--tree {tree_folder}: name another work folder than --work")
        self.ground_on(settings, tree_folder)
        inputs = {f"tree/{name}": tree_folder / name for name in TREE_FILES}

        def action() -> dict:
            for name in TREE_FILES:
                copy_whole(tree_folder / name, self.folder / name)
            return {"nodes": len(tree.load_tree(self.folder / tree.TREE).parent)}

        self.run("tree", {"adopted": True}, inputs, list(TREE_FILES), action)


def _sentence(counts: dict) -> str:
    """Counts in one line, such as `1,000 records, 2 rejected (1 empty, 1 invalid JSON)`."""
    parts = []
    for name, value in sorted(counts.items(), key=lambda item: (isinstance(item[1], dict), item[0])):
        words = name.replace("_", " ")
        if isinstance(value, dict):
            inner = ", ".join(f"{each:,} {key}" for key, each in sorted(value.items())[:8] if each)
            if inner:
                parts.append(f"{words}: {inner}")
        elif isinstance(value, list):
            parts.append(f"{words}: {' '.join(f'{each:,}' for each in value)}")
        else:
            parts.append(f"{value:,} {words}")
    return "; ".join(parts)
