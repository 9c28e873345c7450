"""Does it pay on real text: a small model trained on 5 % of a pool of generated tasks, chosen in several ways.

    python -m megatron_ksa.data_tools.benchmarks.tags_pays_real --work DIR --out results.json [--readme FILE]

The pool is reasoning-b of `tags_pools`: about 50 kinds of tasks as frequent as rank^-1, with drawn scores, tagged by
the offline tagger. Held out are tasks of other seeds: of the pool's every kind equally often (balanced), and of its
five rarest kinds (target). The alignment sees other tasks of those kinds, 20 of each. A model of half a million
parameters learns the answers, the same number of steps of each choice; what is measured is the loss on answers, in nats
a token, and how many answers are right to the last token when each token is the likeliest one (greedy decoding). A seed
draws the scores, the random choices, and the model.
"""

import argparse
import json
import math
import os
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn import functional

from megatron_ksa.data_tools.benchmarks.tags_objective import SHARE, prepare
from megatron_ksa.data_tools.benchmarks.tags_pools import draw_scores, reasoning
from megatron_ksa.data_tools.tags.engine import Engine
from megatron_ksa.data_tools.tags.files import read_jsonl, write_json, write_jsonl
from megatron_ksa.data_tools.tags.pipeline import COMMANDS, TARGET, Pipeline
from megatron_ksa.data_tools.tags.pool import Pool, load_pool
from megatron_ksa.data_tools.tags.sample import SampleSettings, sample
from megatron_ksa.data_tools.tags.step import Context
from megatron_ksa.data_tools.tags.tag import TaggerSettings
from megatron_ksa.errors import usage_errors_exit
from megatron_ksa.markdown import replace_section, table

POOL, TAGGER, PART = "reasoning-b", "keyphrase", 1
RARE_KINDS, FIRST_SEED = 5, 7
# Set: its kinds, tasks of each.
SETS = {"aligned": ("rare", 20), "target": ("rare", 20), "balanced": ("all", 10)}
VOCABULARY, LENGTH, ANSWER = 1024, 96, 32
LAYERS, WIDTH, HEADS = 2, 128, 4
BATCH, STEPS, RATE, WARMUP = 8, 150, 3e-3, 10
CHOICES: dict[str, dict[str, Any] | None] = {
    "TAGS 5 %": {}, "TAGS 5 %, aligned": {}, "MIG 5 %": {"method": "label-graph"},
    "top quality 5 %": {"method": "top-quality"}, "random 5 %": {"method": "random"}, "the whole pool": None,
}  # fmt: skip


@dataclass(frozen=True)
class Tasks:
    """Token ids int64 [tasks, LENGTH], 0 after the end, and bool [tasks, LENGTH] where a token is of an answer."""

    ids: torch.Tensor
    answer: torch.Tensor

    def take(self, rows: np.ndarray) -> "Tasks":
        """Those tasks."""
        return Tasks(self.ids[rows], self.answer[rows])


class Model(nn.Module):
    """A causal transformer with learned positions and tied embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        nn.init.normal_(self.tokens.weight, std=0.02)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, LAYERS, nn.LayerNorm(WIDTH), enable_nested_tensor=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits, float32 [tasks, length, VOCABULARY], of ids, int64 [tasks, length]."""
        length = ids.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        hidden = self.layers(self.tokens(ids) + self.places.weight[:length], mask=mask, is_causal=True)
        return functional.linear(hidden, self.tokens.weight)


def learn_tokens(texts: Iterable[str]) -> Tokenizer:
    """Byte-level pairs; id 0 is the end."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(rows: list[dict], tokenizer: Tokenizer) -> Tasks:
    """Of a question its end, of an answer its beginning and the end mark, as many tokens as fit."""
    ids, answer = torch.zeros(len(rows), LENGTH, dtype=torch.long), torch.zeros(len(rows), LENGTH, dtype=torch.bool)
    for number, row in enumerate(rows):
        question, reply = (tokenizer.encode(message["content"]).ids for message in row["messages"])
        reply = [*reply[: ANSWER - 1], 0]
        question = question[-(LENGTH - len(reply)) :]
        last = len(question) + len(reply)
        ids[number, :last] = torch.tensor(question + reply)
        answer[number, len(question) : last] = True
    return Tasks(ids, answer)


def train(tasks: Tasks, seed: int) -> Model:
    """A model after `STEPS` steps, each of `BATCH` tasks; all tasks once before any twice."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model, order = Model(), torch.empty(0, dtype=torch.long)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(STEPS):
        while len(order) < BATCH:
            order = torch.cat([order, torch.randperm(len(tasks.ids), generator=generator)])
        rows, order = order[:BATCH], order[BATCH:]
        for group in optimizer.param_groups:
            group["lr"] = RATE * min((step + 1) / WARMUP, 0.5 + 0.5 * math.cos(math.pi * step / STEPS))
        ids, answer = tasks.ids[rows], tasks.answer[rows, 1:]
        loss = functional.cross_entropy(model(ids[:, :-1])[answer], ids[:, 1:][answer])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


@torch.no_grad()
def evaluate(model: Model, tasks: Tasks) -> dict[str, float]:
    """Loss on answers, nats a token, and the share of answers that are right to the last token."""
    loss, tokens, right = 0.0, 0, 0
    for first in range(0, len(tasks.ids), 64):
        ids, answer = tasks.ids[first : first + 64], tasks.answer[first : first + 64, 1:]
        logits = model(ids[:, :-1])
        loss += float(functional.cross_entropy(logits[answer], ids[:, 1:][answer], reduction="sum"))
        tokens += int(answer.sum())
        right += int(((logits.argmax(-1) == ids[:, 1:]) | ~answer).all(1).sum())
    return {"loss": loss / tokens, "accuracy": right / len(tasks.ids)}


def held_out(work: Path, labels: Counter) -> dict[str, list[dict]]:
    """Tasks of other seeds by set: `target` and `balanced` to evaluate on, `aligned` for the alignment."""
    rare, found = {label for label, _ in labels.most_common()[-RARE_KINDS:]}, {}
    for number, (name, (kinds, count)) in enumerate(SETS.items()):
        path = work / f"{name}.jsonl"
        if not path.exists():
            rows = reasoning(PART, count, FIRST_SEED + number, rare if kinds == "rare" else set(labels))
            write_jsonl(path, ({"id": n, **row} for n, row in enumerate(rows)))
        found[name] = list(read_jsonl(path))
    return found


def ground_target(work: Path, rows: list[dict]) -> np.ndarray:
    """Leaf shares of the target, float64 [nodes]."""
    pool, path = work / POOL / TAGGER, work / "target.jsonl"
    write_jsonl(path, ({key: row[key] for key in ("id", "messages")} for row in rows))
    steps = [*COMMANDS["tag"].target_steps, *COMMANDS["tree"].target_steps]
    settings = {config: config() for step in steps for config in step.settings.values()}
    settings |= {TaggerSettings: TaggerSettings(kind=TAGGER)}
    Pipeline(Context(pool / TARGET, Engine(), (path,), pool=pool), settings, lambda line: None).run(steps)
    return load_pool(pool / TARGET, tree=pool).shares.sum(axis=0)


def choose(pool: Pool, name: str, target: np.ndarray, seed: int) -> np.ndarray:
    """int64 [chosen], rows of the pool."""
    changes = CHOICES[name]
    if changes is None:
        return np.arange(pool.instances)
    settings = replace(SampleSettings(str(round(SHARE * pool.instances)), seed=seed), **changes)
    return sample(pool, settings, target if "aligned" in name else None).chosen


def section(results: dict[str, dict[str, dict]]) -> str:
    """The table as Markdown."""
    rows = []
    for name in CHOICES:
        found = [seed[name] for seed in results.values()]
        row = [name, f"{found[0]['instances']:,}", f"{np.mean([each['labels'] for each in found]):.1f}"]
        for kind in ("balanced", "target"):
            loss, right = ([each[kind][key] for each in found] for key in ("loss", "accuracy"))
            row.append(f"{np.mean(loss):.3f} ({' '.join(f'{each:.3f}' for each in loss)})")
            row.append(f"{100 * np.mean(right):.1f} % ({' '.join(f'{100 * each:.1f}' for each in right)})")
        rows.append(row)
    heads = ("loss, balanced", "right, balanced", "loss, target", "right, target")
    return table(["trained on", "instances", "kinds", *heads], rows)


def main() -> None:
    """Run and write the numbers; bad input costs one line and exit code 2. What is in the JSON file stays."""
    with usage_errors_exit():
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--work", type=Path, required=True, help="folder of pools and held-out tasks")
        parser.add_argument("--out", type=Path, required=True, help="JSON file to write; a rerun goes on")
        parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
        parser.add_argument("--readme", type=Path, help="file with a section tags_pays_real that takes the table")
        args = parser.parse_args()
        results = json.loads(args.out.read_text(encoding="utf-8"))["seeds"] if args.out.exists() else {}
        pool, labels = prepare(args.work, POOL, TAGGER)
        records = list(read_jsonl(args.work / POOL / TAGGER / "records.jsonl"))
        records = [records[line] for line in pool.record]
        sets = held_out(args.work, Counter(row["label"] for row in read_jsonl(args.work / POOL / "pool.jsonl")))
        target = ground_target(args.work, sets["aligned"])
        tokenizer = learn_tokens(message["content"] for record in records for message in record["messages"])
        encoded = encode(records, tokenizer)
        tests = {name: encode(sets[name], tokenizer) for name in ("balanced", "target")}
        for seed in args.seeds:
            drawn = replace(pool, quality=draw_scores(labels, np.random.default_rng(seed)))
            row = results.setdefault(str(seed), {})
            for name in CHOICES:
                if name in row:
                    continue
                start, chosen = time.monotonic(), choose(drawn, name, target, seed)
                model = train(encoded.take(chosen), seed)
                row[name] = {"instances": len(chosen), "labels": len(set(labels[chosen].tolist()))}
                row[name] |= {kind: evaluate(model, tasks) for kind, tasks in tests.items()}
                parameters = sum(each.numel() for each in model.parameters())
                write_json(args.out, {
                    "steps": STEPS, "batch": BATCH, "parameters": parameters, "cpus": len(os.sched_getaffinity(0)),
                    "tasks": {kind: len(tasks.ids) for kind, tasks in tests.items()}, "seeds": results,
                })  # fmt: skip
                print(f"seed {seed}: {name}: {row[name]}, {time.monotonic() - start:.0f} s", flush=True)
        text = section({str(seed): results[str(seed)] for seed in args.seeds})
        print(text)
        if args.readme:
            replace_section(args.readme, "tags_pays_real", text)


if __name__ == "__main__":
    main()
