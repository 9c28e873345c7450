"""The name of the newest checkpoint survives a kill at any moment."""

import pytest
from megatron.training import checkpointing

from megatron_ksa.upstream import tracker as tracker_file
from megatron_ksa.upstream.patches import apply


@pytest.fixture(autouse=True)
def whole_files():
    with apply(tracker_file.PATCHES):
        yield


def test_a_tracker_is_the_old_or_the_new_one(tmp_path):
    """It was empty between Megatron's open and close, and a run killed there did not resume."""
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    tracker.write_text("10")
    with checkpointing.maybe_msc.open(str(tracker), "w") as file:
        file.write("20")
        assert checkpointing.read_metadata(str(tracker)) == (10, False)
    assert checkpointing.read_metadata(str(tracker)) == (20, False)
    with pytest.raises(KeyboardInterrupt), checkpointing.maybe_msc.open(str(tracker), "w"):
        raise KeyboardInterrupt
    assert checkpointing.read_metadata(str(tracker)) == (20, False)
    assert checkpointing.maybe_msc.os.path.isfile(str(tracker))
