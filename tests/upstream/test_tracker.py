"""The name of the newest checkpoint survives a kill at any moment."""

import pytest
from megatron.training import checkpointing

from megatron_ksa.upstream import tracker as tracker_file
from megatron_ksa.upstream.patches import apply


@pytest.fixture
def whole_files():
    with apply(tracker_file.patches(lambda: None)):
        yield


def test_a_tracker_is_the_old_or_the_new_one(tmp_path, whole_files):
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


def test_a_run_that_lost_its_lock_names_no_checkpoint(tmp_path):
    """A run that stood still for minutes made its checkpoint the newest of another run's folder."""
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    tracker.write_text("10")
    with (
        apply(tracker_file.patches(lambda: 1 / 0)), pytest.raises(ZeroDivisionError),
        checkpointing.maybe_msc.open(str(tracker), "w") as file,
    ):  # fmt: skip
        file.write("20")
    assert tracker.read_text() == "10"
