"""A small model of tasks: their tokens, training for a number of steps, loss and right answers on other tasks."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn import functional

VOCABULARY, LENGTH, ANSWER = 1024, 96, 32
LAYERS, WIDTH, HEADS = 2, 128, 4
BATCH, RATE, WARMUP = 8, 3e-3, 10


@dataclass(frozen=True)
class Tasks:
    """Token ids int64 [tasks, LENGTH], 0 after the end, and bool [tasks, LENGTH] where a token is of an answer."""

    ids: torch.Tensor
    answer: torch.Tensor

    def take(self, rows: np.ndarray | torch.Tensor) -> "Tasks":
        """Those tasks."""
        return Tasks(self.ids[rows], self.answer[rows])

    def inputs_and_labels(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ids and where an answer's token follows, [tasks, length - 1], and these tokens; no columns of padding."""
        last = int(self.answer.any(0).nonzero()[-1]) + 1
        where = self.answer[:, 1:last]
        return self.ids[:, : last - 1], where, self.ids[:, 1:last][where]


class Model(nn.Module):
    """A causal transformer with learned positions and tied embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        nn.init.normal_(self.tokens.weight, std=0.02)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, LAYERS, nn.LayerNorm(WIDTH), enable_nested_tensor=False)

    def forward(self, ids: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        """Logits, float32 [positions, VOCABULARY], of ids, int64 [tasks, length], at `where`, bool [tasks, length]."""
        length = ids.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        hidden = self.layers(self.tokens(ids) + self.places.weight[:length], mask=mask, is_causal=True)
        return functional.linear(hidden[where], self.tokens.weight)


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


def train(tasks: Tasks, seed: int, steps: int) -> Model:
    """A model after `steps` steps, each of `BATCH` tasks; all tasks once before any twice."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model, order = Model(), torch.empty(0, dtype=torch.long)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(steps):
        while len(order) < BATCH:
            order = torch.cat([order, torch.randperm(len(tasks.ids), generator=generator)])
        rows, order = order[:BATCH], order[BATCH:]
        for group in optimizer.param_groups:
            group["lr"] = RATE * min((step + 1) / WARMUP, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        ids, where, labels = tasks.take(rows).inputs_and_labels()
        loss = functional.cross_entropy(model(ids, where), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


@torch.no_grad()
def evaluate(model: Model, tasks: Tasks) -> tuple[np.ndarray, np.ndarray]:
    """Of each task the loss on its answer, nats a token, float64, and whether the answer is right to the last token."""
    losses, right = np.zeros(len(tasks.ids)), np.zeros(len(tasks.ids), bool)
    for rows in np.array_split(np.arange(len(tasks.ids)), -(-len(tasks.ids) // 64)):
        ids, where, labels = tasks.take(rows).inputs_and_labels()
        logits, task = model(ids, where), where.nonzero()[:, 0].numpy()
        loss = functional.cross_entropy(logits, labels, reduction="none").numpy().astype(np.float64)
        tokens = np.bincount(task, minlength=len(rows))
        losses[rows] = np.bincount(task, loss, len(rows)) / tokens
        right[rows] = np.bincount(task, (logits.argmax(-1) == labels).numpy(), len(rows)) == tokens
    return losses, right
