"""Damage to a checkpoint's files is found, named, and comes with the way out."""

import json
import shutil
from pathlib import Path

import pytest
from trainer import launch

from megatron_ksa.checkpoint import integrity
from megatron_ksa.checkpoint.load import TRACKER, find_checkpoint
from megatron_ksa.errors import UsageError
from megatron_ksa.upstream import checkpoint_comparison
from megatron_ksa.upstream.patches import apply

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A folder with the checkpoints of two iterations, saved by two ranks."""
    folder = tmp_path_factory.mktemp("run")
    flags = f"--train-iters 2 --save {folder / 'save'} --save-interval 1 --use-distributed-optimizer"
    done = launch([(folder / "record.json", flags)], 2)
    assert done.returncode == 0, done.stderr
    return folder / "save"


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "save"))


def newest(root: Path) -> Path:
    return root / "iter_0000002"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


DAMAGE = {
    "flipped": flip, "cut": cut, "emptied": lambda path: path.write_bytes(b""), "deleted": Path.unlink,
    "random": lambda path: path.write_bytes(bytes(range(256)) * (path.stat().st_size // 256 + 1)),
}  # fmt: skip
FILES = ("__0_0.distcp", "__1_0.distcp", ".metadata", "metadata.json", ".files_0.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", DAMAGE.values(), ids=DAMAGE)
def test_damage_names_the_file(name, how, copy):
    """23 of 27 kinds of damage ended without a line, 2 flipped bytes in a shard were loaded in 11 of 11 tries."""
    assert integrity.damage(newest(copy)) is None
    how(newest(copy) / name)
    found = integrity.damage(newest(copy))
    if name == ".files_0.json" and not (newest(copy) / name).exists():
        assert found is None, "sizes by the metadata are all that is left"
    else:
        assert name in found
    assert integrity.newest_whole(copy, without=newest(copy)) == 1
    assert "--ckpt-step 1" in integrity.way_out(newest(copy))


def test_every_file_is_in_a_record(saved):
    names = {path.name for path in newest(saved).iterdir() if not path.name.startswith(".files_")}
    assert set(integrity.stored_files(newest(saved))) == names
    files = integrity.stored_files(newest(saved))
    assert all(file.bytes and bool(file.xxh3) != bool(file.items) for file in files.values())
    for name in (name for name in files if name.endswith(".distcp")):
        items = sorted(files[name].items, key=lambda item: item.offset)
        ends = [item.offset + item.length for item in items]
        assert [item.offset for item in items] == [0, *ends[:-1]] and ends[-1] == files[name].bytes
        assert any(item.start is not None for item in items)


def test_checkpoints_without_records_are_checked_by_their_metadata(copy):
    """Those of versions before, and Megatron's own."""
    for record in newest(copy).glob(".files_*"):
        record.unlink()
    assert integrity.damage(newest(copy)) is None
    cut(newest(copy) / "__1_0.distcp")
    assert "__1_0.distcp is damaged: it has" in integrity.damage(newest(copy))


def test_ranks_share_the_work(copy):
    flip(newest(copy) / "__1_0.distcp")
    found = [integrity.damage(newest(copy), share=(rank, 3)) for rank in range(3)]
    assert sum(each is not None for each in found) == 1


@pytest.mark.parametrize("text", ["", "abc", "../x", "-3", "99999999999999999999"])
def test_a_broken_tracker_is_a_line(text, copy):
    """An empty tracker, text, or a path in it ended with exit code 0."""
    (copy / TRACKER).write_text(text)
    with pytest.raises(UsageError, match=TRACKER):
        find_checkpoint(copy)


def test_the_trainer_refuses_damage_in_one_line(copy, tmp_path):
    flip(newest(copy) / "__1_0.distcp")
    flags = f"--train-iters 3 --load {copy} --use-distributed-optimizer"
    done = launch([(tmp_path / "record.json", flags)], 2)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and errors
    assert all("__1_0.distcp is damaged" in line and "--ckpt-step 1" in line for line in errors)


def test_every_tensor_and_object_that_is_read_is_compared(copy, megatron_flags):
    """Each item of a shard, damaged in its middle, is found by the reader itself: by an export or evaluation too."""
    from megatron_ksa.checkpoint.streaming import DistributedReader, Slot

    reader = DistributedReader(newest(copy))
    slots = {key: Slot.whole(key, tuple(stored.size)) for key, stored in reader.tensors.items()}
    places = reader._reader.read_metadata().storage_data.items()
    of_one_part = {key: [at for index, at in places if index.fqn == key] for key in slots}
    tried = 0
    for key, (at, *more) in list(of_one_part.items())[::5]:
        if more:
            continue
        slot, path = slots[key], newest(copy) / at.relative_path
        whole = path.read_bytes()
        # The last element that is stored: before it is the archive's header, after it the directory.
        last = reader.read(slot).reshape(-1)[-1:].numpy().tobytes()
        place = whole.rindex(last, at.offset, at.offset + at.length)
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        said = f"{path.name} is damaged: its content at byte {at.offset:,} is not"
        with apply(checkpoint_comparison.PATCHES), pytest.raises(UsageError, match=said):
            DistributedReader(newest(copy)).read(slot)
        path.write_bytes(whole)
        tried += 1
    assert tried > 3


def test_sums_can_be_left_out(tmp_path):
    flags = f"--train-iters 1 --save {tmp_path / 'save'} --save-interval 1 --no-checkpoint-sums"
    assert launch([(tmp_path / "record.json", flags)], 1).returncode == 0
    record = json.loads((tmp_path / "save/iter_0000001/.files_0.json").read_text())
    assert all(file["xxh3"] is None and not file["content"] and file["bytes"] > 0 for file in record["files"].values())
