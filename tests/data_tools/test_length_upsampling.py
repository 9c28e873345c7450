"""Length upsampling: the share is met, nothing is lost, bad shares are refused."""

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_ksa.data_tools.indexed import IndexedDatasetWriter
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


@pytest.mark.parametrize(
    ("threshold", "share", "message"),
    [
        (20, 0.5, "no document is longer, the longest has 10"),
        (5, 0.3, "hold 0.667 already"),
        (5, 1.0, "between 0 and 1"),
    ],
)
def test_refused(threshold, share, message):
    with pytest.raises(UsageError, match=message):
        plan_repeats(np.array([5, 10]), threshold, share, np.random.default_rng(0))
