"""Loss on responses only: the right labels count, training follows, and masks that do not fit are refused."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from warm import run_script

from megatron_ksa.data_tools.indexed import IndexedDatasetWriter, loss_mask_prefix
from megatron_ksa.data_tools.loss_masks import ResponseLossDataset, masked_prefixes
from megatron_ksa.errors import UsageError
from megatron_ksa.platform import trainer_defaults
from megatron_ksa.training.arguments import install_arguments
from megatron_ksa.training.configure import parse_flags, read_settings

END_OF_DOCUMENT = 126
RECORDER = Path(__file__).with_name("recorded_pretrain.py")
FLAGS = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32 --swiglu "
    "--position-embedding-type rope --micro-batch-size 4 --global-batch-size 8 --split 100,0,0 "
    "--tokenizer-type NullTokenizer --vocab-size 127 "
    "--lr 1e-2 --lr-decay-style constant --log-interval 1 --eval-iters 0 --train-iters 20"
).split()


def write_documents(prefix: Path, response=None, *, mask: bool = True) -> None:
    """Documents of even prompt tokens and odd response tokens (or the given one), with the mask beside them."""
    random = np.random.default_rng(0)
    with (
        IndexedDatasetWriter(str(prefix), 127) as tokens_writer,
        IndexedDatasetWriter(loss_mask_prefix(str(prefix)), 2, dtype=np.uint8) as mask_writer,
    ):
        for length in random.integers(2, 40, 300):
            answers = random.random(length) < 0.4
            tokens = 2 * random.integers(0, 60, length)
            tokens[answers] = tokens[answers] + 1 if response is None else response
            tokens_writer.add_document(np.append(tokens, END_OF_DOCUMENT))
            mask_writer.add_document(np.append(answers, False).astype(np.uint8))
    if not mask:
        for suffix in (".bin", ".idx"):
            Path(loss_mask_prefix(str(prefix)) + suffix).unlink()


def build(kind: type[GPTDataset], prefixes: list[Path], split: str = "90,10,0"):
    tokenizer = SimpleNamespace(eod=END_OF_DOCUMENT, vocab_size=127, unique_identifiers={"class": "test"})
    config = GPTDatasetConfig(
        random_seed=1, sequence_length=16, blend=([str(prefix) for prefix in prefixes], None), split=split,
        tokenizer=tokenizer,
        reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
        path_to_cache=str(prefixes[0].parent / "cache"),
    )  # fmt: skip
    return BlendedMegatronDatasetBuilder(kind, [400, 20, 0], lambda: True, config).build()


def test_labels_of_responses_count_and_tokens_are_megatrons(tmp_path):
    write_documents(tmp_path / "a")
    write_documents(tmp_path / "b", mask=False)
    masked, plain = (build(kind, [tmp_path / "a"]) for kind in (ResponseLossDataset, GPTDataset))
    for ours, megatrons in zip(masked[:2], plain[:2], strict=True):
        counted = 0
        for i in range(len(megatrons)):
            sample, expected = ours[i], megatrons[i]
            for name in ("tokens", "labels", "position_ids"):
                np.testing.assert_array_equal(sample[name], expected[name])
            np.testing.assert_array_equal(sample["loss_mask"], sample["labels"] % 2 * expected["loss_mask"])
            counted += int(sample["loss_mask"].sum())
        assert 0 < counted < 0.6 * 16 * len(megatrons)
        np.testing.assert_array_equal(ours[0]["loss_mask"], ours[0]["loss_mask"])
        assert ours[None]["loss_mask"].sum() == 0
    unmasked = build(ResponseLossDataset, [tmp_path / "b"])[0]
    assert all(unmasked[i]["loss_mask"].all() for i in range(20))


def test_masks_that_do_not_fit_are_refused(tmp_path):
    prefix = str(tmp_path / "a")
    write_documents(tmp_path / "a")
    assert masked_prefixes([prefix, "plain"]) == [prefix]
    with pytest.raises(UsageError, match="no dataset has a loss mask"):
        masked_prefixes(["plain"])
    with IndexedDatasetWriter(loss_mask_prefix(prefix), 2, overwrite=True, dtype=np.uint8) as writer:
        writer.add_document(np.ones(3))
    with pytest.raises(UsageError, match="their documents differ in length"):
        masked_prefixes([prefix])
    Path(f"{prefix}_loss_mask.bin").write_bytes(b"")
    with pytest.raises(UsageError, match="truncated"):
        masked_prefixes([prefix])


def train(folder: Path, *variants: str) -> list[dict[str, dict]]:
    """Loss of every iteration, trained once with each variant of the flags."""
    records = [folder / f"record{number}.json" for number in range(len(variants))]
    data = ["--data-path", str(folder / "a")]
    runs = [
        {"record": str(record), "flags": [*FLAGS, *data, *flags.split()]}
        for record, flags in zip(records, variants, strict=True)
    ]
    (folder / "runs.json").write_text(json.dumps(runs))
    done = run_script(RECORDER, folder / "runs.json")
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(record.read_text()) for record in records]


@pytest.mark.slow
def test_training_learns_what_counts(tmp_path):
    """Responses are one token, prompts are noise: only a loss on responses alone can vanish."""
    write_documents(tmp_path / "a", response=77)
    masked, whole = train(tmp_path, "--response-loss-only", "")
    assert masked["1"]["loss"] == pytest.approx(np.log(127), rel=0.1)
    assert masked["20"]["loss"] < 0.1
    assert whole["20"]["loss"] > 1.5


def test_missing_mask_is_refused_before_anything_starts(tmp_path, monkeypatch):
    write_documents(tmp_path / "a", mask=False)
    flags = [*FLAGS, "--data-path", str(tmp_path / "a"), "--response-loss-only"]
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *flags])
    no_mask = pytest.raises(UsageError, match="--response-loss-only: no dataset has a loss mask")
    with install_arguments(trainer_defaults()), no_mask:
        read_settings(parse_flags())
