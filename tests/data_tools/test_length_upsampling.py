"""Length upsampling: the share is met, nothing is lost, bad shares are refused."""

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_ksa.data_tools.indexed import IndexedDatasetWriter, loss_mask_prefix
from megatron_ksa.data_tools.length_upsampling import plan_repeats, upsample
from megatron_ksa.errors import UsageError


@pytest.mark.parametrize("share", [0.4, 0.6, 0.9])
def test_share_is_met_with_every_document(share, tmp_path):
    random = np.random.default_rng(0)
    documents = [np.full(int(size), i) for i, size in enumerate(random.integers(1, 100, 300))]
    with IndexedDatasetWriter(str(tmp_path / "in"), 300) as writer:
        for document in documents:
            writer.add_document(document)
    counts = upsample(str(tmp_path / "in"), str(tmp_path / "out"), 90, share)
    written = IndexedDataset(str(tmp_path / "out"))
    sizes = np.array([len(written[i]) for i in range(len(written))])
    assert (
        sizes[sizes > 90].sum() / sizes.sum()
        == pytest.approx(share, abs=0.01)
        == pytest.approx(counts.share_after, abs=0.01)
    )
    times = np.bincount([written[i][0] for i in range(len(written))], minlength=300)
    lengths = np.array([len(document) for document in documents])
    assert (times[lengths <= 90] == 1).all() and (times[lengths > 90] >= 1).all() and np.ptp(times[lengths > 90]) <= 1
    assert all(np.array_equal(written[i], documents[written[i][0]]) for i in range(len(written)))


def test_loss_mask_is_repeated_with_its_dataset(tmp_path):
    """The repeated dataset had no mask: training on responses only counted every token of it, without a word."""
    random = np.random.default_rng(0)
    with (
        IndexedDatasetWriter(str(tmp_path / "in"), 300) as tokens,
        IndexedDatasetWriter(loss_mask_prefix(str(tmp_path / "in")), 2, dtype=np.uint8) as masks,
    ):
        for i, size in enumerate(random.integers(1, 100, 50)):
            tokens.add_document(np.full(int(size), i))
            masks.add_document(np.full(int(size), i % 2))
    upsample(str(tmp_path / "in"), str(tmp_path / "out"), 90, 0.5)
    written, mask = (IndexedDataset(name(str(tmp_path / "out"))) for name in (str, loss_mask_prefix))
    assert mask.index.dtype == np.uint8 and len(written) == len(mask) > 50
    for i in range(len(written)):
        np.testing.assert_array_equal(mask[i], written[i] % 2)


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.uint16, np.int32, np.int64])
def test_token_type_and_its_largest_id_are_kept(kind, tmp_path):
    """The type was chosen anew by a vocabulary: 65535 in 16 bits was none of it, and ids in 64 bits were cut to 32."""
    largest = int(np.iinfo(kind).max)
    with IndexedDatasetWriter(str(tmp_path / "in"), largest + 1, dtype=kind) as writer:
        for size in (2, 3, 9):
            writer.add_document(np.array([largest] * size, kind))
    upsample(str(tmp_path / "in"), str(tmp_path / "out"), 5, 0.8)
    written = IndexedDataset(str(tmp_path / "out"))
    assert written.index.dtype == kind and {int(id) for i in range(len(written)) for id in written[i]} == {largest}


def test_documents_of_no_or_several_sequences(tmp_path):
    """A document without sequences was given the length of the next one's."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "in.bin"), np.int32)
    for sizes in ([2], [], [4, 5], [1]):
        builder.add_document(np.arange(sum(sizes)), sizes)
    builder.finalize(str(tmp_path / "in.idx"))
    counts = upsample(str(tmp_path / "in"), str(tmp_path / "out"), 5, 0.8)
    assert (counts.long_documents, counts.long_tokens, counts.tokens) == (1, 9, 12)
    written = IndexedDataset(str(tmp_path / "out"))
    assert sorted({len(written[i]) for i in range(len(written))}) == [1, 2, 9]


@pytest.mark.parametrize(
    ("threshold", "share", "message"),
    [
        (20, 0.5, "no document is longer, the longest has 10"),
        (5, 0.3, "hold 0.667 already"),
        (5, 1.0, "between 0 and 1"),
        (5, float("nan"), "between 0 and 1"),
        (5, 1 - 1e-12, "would be written .* times; at most 1000"),
    ],
)
def test_refused(threshold, share, message):
    with pytest.raises(UsageError, match=message):
        plan_repeats(np.array([5, 10]), threshold, share, np.random.default_rng(0))
