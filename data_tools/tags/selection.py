"""The sample step: from `grounding.npz` and `tree.npz` of a work folder to `selection.jsonl` and `selection.json`."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from megatron_ksa.data_tools.tags.branches import branch_of
from megatron_ksa.data_tools.tags.budget import Budget, counts_tokens, parse_budget, parse_forms
from megatron_ksa.data_tools.tags.canonicalise import EMBEDDINGS
from megatron_ksa.data_tools.tags.chat_template import (
    NO_RESPONSE,
    EncodingSettings,
    check_encoding,
    encode_records,
    has_form,
    has_response,
)
from megatron_ksa.data_tools.tags.constraints import SHOWN, ConstraintSettings, Limit, Rules
from megatron_ksa.data_tools.tags.decontaminate import CONTAMINATED, contaminated_lines
from megatron_ksa.data_tools.tags.files import read_jsonl, row_of, write_json, write_jsonl
from megatron_ksa.data_tools.tags.ground import GROUNDING, UNPLACED
from megatron_ksa.data_tools.tags.pool import Pool, load_pool, read_records, record_lines
from megatron_ksa.data_tools.tags.read import RECORDS
from megatron_ksa.data_tools.tags.sample import PARTS_ALONE, Sample, SampleSettings, sample
from megatron_ksa.data_tools.tags.step import Context, Step
from megatron_ksa.data_tools.tags.tag import FAILED
from megatron_ksa.data_tools.tags.tagged import DUPLICATES
from megatron_ksa.data_tools.tags.tree import TREE
from megatron_ksa.errors import UsageError
from megatron_ksa.files import LIST_BYTES, read_small

SELECTION, SUMMARY, UNWRITABLE = "selection.jsonl", "selection.json", "unwritable.jsonl"
NO_FORM = "the template has no form for tools, tool calls and thoughts; use --template tokenizer"
FORMLESS = (b'"tools"', b'"tool_calls"', b'"reasoning_content"')
# Names of sources or branches that a message lists.
NAMES = 10


def count_tokens(
    work: Path, pool: Pool, settings: EncodingSettings, run: Callable = map
) -> tuple[np.ndarray, dict[int, str]]:
    """int64 [instances], tokens of each instance as the write step will write it, and why some have none, by row."""
    records = read_records(work, pool.record)
    encoded = encode_records(records, settings, run)
    tokens, refused = np.zeros(pool.instances, np.int64), {}
    bar = tqdm(encoded, total=pool.instances, desc="count tokens", unit=" instances", mininterval=1.0)
    for row, result in enumerate(bar):
        if isinstance(result, str):
            refused[row] = result
        else:
            tokens[row] = len(result.ids)
    return tokens, refused


def _make_rules(
    work: Path, pool: Pool, constraints: ConstraintSettings, budget: Budget, first: np.ndarray, ids: list[str] | None
) -> Rules:
    """The constraints of one budget on the rows of a pool.

    Args:
        first: int64 [rows], chosen before any other.
        ids: of every row, where constraints need them.
    """
    if ids is not None:
        row_of = {name: row for row, name in enumerate(ids)}
        unknown = [name for name in constraints.always_ids() if name not in row_of]
        if unknown:
            first_one = f"{unknown[0][:SHOWN]!r} ({_why_not(work, unknown[0])})"
            raise UsageError(f"--always: {len(unknown):,} of its records cannot be chosen here, such as {first_one}")
        always = np.array([row_of[name] for name in constraints.always_ids()], np.int64)
        first = np.concatenate([first, always[~np.isin(always, first)]])
    cost = pool.tokens if budget.in_tokens else np.ones(pool.instances)
    keys = {kind: _keys(work, pool, kind) for kind in {bound.kind for bound in constraints.bounds}}
    limits: dict[tuple[str, str], Limit] = {}
    for bound in constraints.bounds:
        member = keys[bound.kind] == bound.name
        amount = bound.of(budget.amount)
        if not member.any():
            known = Counter(keys[bound.kind].tolist()).most_common()
            names = ", ".join(name for name, _ in known[:NAMES]) + (
                f" and {len(known) - NAMES:,} smaller ones" if len(known) > NAMES else ""
            )
            raise UsageError(f"{bound.flag} {bound.kind}:{bound.name[:SHOWN]}: the pool has none; it has {names}")
        limit = limits.get((bound.kind, bound.name), Limit(member, name=f"{bound.kind} {bound.name[:SHOWN]}"))
        told, held = f"--floor {bound.kind}:{bound.name}", cost[member].sum()
        if bound.flag == "--floor" and amount > held:
            raise UsageError(f"{told}: the pool has {held:,.0f}, less than {amount:,.0f}")
        limit = replace(limit, least=amount) if bound.flag == "--floor" else replace(limit, most=amount)
        if limit.least > limit.most:
            raise UsageError(f"{told}: {limit.least:,.0f} is more than its --quota {limit.most:,.0f}")
        limits[bound.kind, bound.name] = limit
    return Rules(first, tuple(limits.values()))


def _why_not(work: Path, name: str) -> str:
    """Why the record of an id is none to choose from."""
    for file in (DUPLICATES, CONTAMINATED, FAILED, UNPLACED):
        rows = read_jsonl(work / file) if (work / file).exists() else iter(())
        found = next((row for row in rows if row["id"] == name and row.get("left_out", True)), None)
        if found is not None:
            return f"{file} has it" + (f", {found['kept'][:SHOWN]!r} stands for it" if "kept" in found else "")
    if any(record["id"] == name for record in read_jsonl(work / RECORDS)):
        return "it has no response, or the template refuses it"
    return f"no such id in {RECORDS}"


def _keys(work: Path, pool: Pool, kind: str) -> np.ndarray:
    """str [instances], the source or the top branch of each."""
    if kind == "source":
        return np.array([record["source"] for record in read_records(work, pool.record)])
    branch = branch_of(pool, np.flatnonzero(pool.depth == 1))
    return np.where(branch < 0, "", np.asarray(pool.names).astype(str)[branch])


def _nested(
    work: Path,
    pool: Pool,
    settings: SampleSettings,
    constraints: ConstraintSettings,
    target: np.ndarray | None,
    show: bool,
) -> list[Sample]:
    """A selection for each budget, each with the one before in it."""
    found: list[Sample] = []
    ids = [record["id"] for record in read_records(work, pool.record)] if constraints.always else None
    for text in settings.budget.split(","):
        budget = parse_budget(text.strip(), pool.instances, pool.tokens)
        if found and (budget.in_tokens != found[-1].budget.in_tokens or budget.amount <= found[-1].budget.amount):
            raise UsageError(f"--budget {settings.budget}: several budgets rise, all in tokens or all in instances")
        first = found[-1].chosen if found else np.empty(0, np.int64)
        rules = _make_rules(work, pool, constraints, budget, first, ids)
        found.append(sample(pool, replace(settings, budget=text.strip()), target, rules=rules, show_progress=show))
    return found


def sample_step(
    work: Path,
    settings: SampleSettings,
    constraints: ConstraintSettings | None = None,
    *,
    target: Path | None = None,
    tokens: EncodingSettings | None = None,
    responses: bool = False,
    without_tools: bool = False,
    run: Callable = map,
    show_progress: bool = True,
) -> Sample:
    """Choose from the pool of a work folder and write the selection.

    Args:
        target: the folder of a target that is grounded on this pool's tree, or None.
        tokens: needed for a budget in tokens only.
        responses: leave out what the write step would leave out for want of a response.
        without_tools: leave out what it would leave out since its template has no form for tools, calls and thoughts.
        run: as `encode_records` takes it.

    Returns:
        The selection of the largest budget.

    Raises:
        UsageError: from `sample`, or a file that is missing.
    """
    constraints = constraints or ConstraintSettings()
    by_branch = any(bound.kind == "branch" for bound in constraints.bounds)
    whole = pool = load_pool(work, vectors=by_branch or settings.method in ("label-graph", "cluster-balanced"))
    rows = np.flatnonzero(~np.isin(pool.record, contaminated_lines(work)))
    reasons: dict[int, str] = {}
    if len(rows) < pool.instances:
        if not len(rows):
            raise UsageError(
                f"{work}: every instance holds a question of the evaluation data, as {CONTAMINATED} lists; "
                "--keep-contaminated keeps them, --no-decontaminate-target those of the target"
            )
        pool = pool.take(rows)
    if (responses or without_tools) and pool.instances:
        for row, line in zip(rows, record_lines(work, pool.record), strict=True):
            # Most lines need not be parsed to tell that there is nothing without a form.
            if not responses and not any(name in line for name in FORMLESS):
                continue
            record = row_of(line, RECORDS)
            if responses and not has_response(record):
                reasons[int(row)] = NO_RESPONSE
            elif without_tools and not has_form(record):
                reasons[int(row)] = NO_FORM
        if reasons:
            rows = _without(rows, reasons)
            pool = whole.take(rows)
    if tokens is not None and pool.instances:
        lengths, refused = count_tokens(work, pool, tokens, run)
        reasons |= {int(rows[place]): reason for place, reason in refused.items()}
        pool, rows = replace(pool, tokens=lengths).take(np.flatnonzero(lengths)), _without(rows, reasons)
    if reasons and not len(rows):
        said = "; ".join(f"{count:,} {reason}" for reason, count in Counter(reasons.values()).most_common(3))
        raise UsageError(f"{work}: no instance can be written: {said} (--template, --loss-on, --max-length)")
    no_response = sum(reason == NO_RESPONSE for reason in reasons.values())
    counts = {
        "refused_by_template": len(reasons) - no_response, "without_response": no_response,
        "contaminated": whole.instances - len(rows) - len(reasons),
    }  # fmt: skip
    wanted = None if target is None else load_pool(target, tree=work).shares.sum(axis=0)
    nested = [
        replace(found, chosen=rows[found.chosen], summary={**found.summary, **counts})
        for found in _nested(work, pool, settings, constraints, wanted, show_progress)
    ]
    _write(work, nested, whole.record, reasons)
    return nested[-1]


def _without(rows: np.ndarray, reasons: dict[int, str]) -> np.ndarray:
    return rows[~np.isin(rows, np.fromiter(reasons, np.int64, len(reasons)))]


def _write(work: Path, nested: list[Sample], record: np.ndarray, reasons: dict[int, str]) -> None:
    found = nested[-1]
    named = np.array(sorted({*found.chosen.tolist(), *reasons}), np.int64)
    ids = dict(zip(named.tolist(), (each["id"] for each in read_records(work, record[named])), strict=True))
    write_jsonl(work / UNWRITABLE, ({"id": ids[row], "reason": reasons[row]} for row in sorted(reasons)))
    budgets = {row: number for number, each in reversed(list(enumerate(nested, 1))) for row in each.chosen.tolist()}
    write_jsonl(work / SELECTION, (
        {"row": row, "id": ids[row], "gain": None if np.isnan(gain) else gain, "budget": budgets[row]}
        for row, gain in zip(found.chosen.tolist(), found.gains.tolist(), strict=True)
    ))  # fmt: skip
    smaller = [each.summary for each in nested[:-1]]
    write_json(work / SUMMARY, found.summary | ({"smaller_budgets": smaller} if smaller else {}))


def budgets_of(work: Path) -> int:
    """How many budgets the selection was made for."""
    return max((row.get("budget", 1) for row in read_jsonl(work / SELECTION)), default=1)


def selected_rows(work: Path, of_budget: int = 0) -> list[dict]:
    """Rows of `selection.jsonl` in order of choice.

    Args:
        of_budget: of several budgets which, counted from 1; 0 is the largest.

    Raises:
        UsageError: there is no such budget.
    """
    rows = list(read_jsonl(work / SELECTION))
    budgets = max((row.get("budget", 1) for row in rows), default=1)
    if of_budget > budgets:
        raise UsageError(f"--of-budget {of_budget}: the selection has {budgets}; run the sample step with more of them")
    return [row for row in rows if row.get("budget", 1) <= (of_budget or budgets)]


def read_selection(work: Path, of_budget: int = 0) -> np.ndarray:
    """int64 [chosen], rows of `grounding.npz` in order of choice; `of_budget` as `selected_rows` takes it."""
    return np.array([row["row"] for row in selected_rows(work, of_budget)], np.int64)


def read_summary(path: Path) -> dict:
    """A step's summary.

    Raises:
        UsageError: the file is missing or is not JSON.
    """
    try:
        if not path.exists():
            raise UsageError(f"{path} does not exist: run the step that writes it first (data_tools/tags/README.md)")
        return json.loads(read_small(path, limit=LIST_BYTES))
    except ValueError as error:
        raise UsageError(f"{path}: {error}; delete it and run its step again") from None


def _counted(settings: SampleSettings, encoding: EncodingSettings) -> EncodingSettings | None:
    """How tokens are counted, where the budget is in tokens and there is a tokenizer."""
    in_tokens = any(counts_tokens(budget) for budget in settings.budget.split(","))
    return encoding if in_tokens and encoding.tokenizer_model else None


def _without_tools(encoding: EncodingSettings) -> bool:
    """Whether it is known that a template without a form for tools will write the selection."""
    return encoding.tokenizer_model is not None and encoding.template != "tokenizer"


def _run(
    context: Context, settings: SampleSettings, constraints: ConstraintSettings, encoding: EncodingSettings
) -> dict:
    tokens, responses = _counted(settings, encoding), encoding.loss_on == "responses"
    summary = sample_step(
        context.folder, settings, constraints, target=context.target, tokens=tokens, responses=responses,
        without_tools=_without_tools(encoding), run=context.engine.map,
    ).summary  # fmt: skip
    names = (
        "pool_instances", "instances", "short_of_budget", "pool_tokens", "tokens", "refused_by_template",
        "without_response", "contaminated",
    )  # fmt: skip
    return {name: summary[name] for name in names if name in summary}


def _other_files(
    context: Context, settings: SampleSettings, constraints: ConstraintSettings, encoding: EncodingSettings
) -> dict[str, Path]:
    files = {} if context.target is None else context.files(context.target, "target", GROUNDING)
    if _counted(settings, encoding) is not None:
        files["tokenizer:"] = Path(encoding.tokenizer_model)
    if constraints.always is not None:
        files["always:"] = Path(constraints.always)
    return files


def _decides(
    context: Context, settings: SampleSettings, constraints: ConstraintSettings, encoding: EncodingSettings
) -> dict:
    bounds = {"quota": constraints.quota, "floor": constraints.floor}
    unwritable = {"loss_on": encoding.loss_on, "without_tools": _without_tools(encoding)}
    return asdict(settings) | bounds | unwritable | (encoding.decides() if _counted(settings, encoding) else {})


def _check(
    context: Context, settings: SampleSettings, constraints: ConstraintSettings, encoding: EncodingSettings
) -> None:
    budgets = parse_forms(settings.budget)
    in_tokens = any(asked.unit == "tokens" for asked in budgets)
    if encoding.tokenizer_model is None and in_tokens:
        raise UsageError(f"--budget {settings.budget}: tokens can be counted only with --tokenizer-model")
    if settings.parts > 1 and (constraints.bounds or constraints.always is not None or len(budgets) > 1):
        raise UsageError(PARTS_ALONE)
    constraints.always_ids()
    if in_tokens:
        check_encoding(encoding)


def check_of_budget(settings: SampleSettings, of_budget: int) -> None:
    """Check which of several budgets is asked for before there is a selection.

    Raises:
        UsageError: there are not so many.
    """
    budgets = len(parse_forms(settings.budget))
    if of_budget > budgets:
        raise UsageError(f"--of-budget {of_budget}: --budget {settings.budget[:SHOWN]} has {budgets}")


STEP = Step(
    "sample", {"sampling": SampleSettings, "constraints": ConstraintSettings, "encoding": EncodingSettings},
    reads=(RECORDS, GROUNDING, TREE, EMBEDDINGS, CONTAMINATED), writes=(SELECTION, SUMMARY, UNWRITABLE),
    run=_run, also_reads=_other_files, decides=_decides, check=_check,
)  # fmt: skip
