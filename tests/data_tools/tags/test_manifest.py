"""A step is done again exactly when its settings, inputs or outputs are not those of its last run."""

import json

import pytest

from megatron_ksa.data_tools.tags.manifest import Manifest
from megatron_ksa.errors import UsageError


@pytest.fixture
def step(tmp_path):
    """Runs a step that copies `in` to `out`, with a manifest read anew; returns whether it was done."""
    (tmp_path / "in").write_text("one")

    def run(setting: object = 1, again: bool = False) -> bool:
        def action() -> dict:
            (tmp_path / "out").write_text((tmp_path / "in").read_text())
            return {"copies": 1}

        return Manifest(tmp_path).run(
            "copy", {"setting": setting}, {"in": tmp_path / "in"}, ["out"], action, again=again
        )

    return run


def test_what_stands_and_what_does_not(tmp_path, step):
    assert step() and not step()
    assert step(setting=(1, 2)) and not step(setting=[1, 2])  # JSON knows no tuples
    (tmp_path / "in").write_text("one")
    assert not step(setting=[1, 2])  # touched, the same content
    (tmp_path / "in").write_text("two")
    assert step(setting=[1, 2]) and (tmp_path / "out").read_text() == "two"
    (tmp_path / "out").write_text("edited")
    assert step(setting=[1, 2]) and (tmp_path / "out").read_text() == "two"
    (tmp_path / "out").unlink()
    assert step(setting=[1, 2]) and (tmp_path / "out").exists()
    assert step(setting=[1, 2], again=True)


def test_a_step_that_fails_is_done_again(tmp_path, step):
    step()
    before = (tmp_path / "manifest.json").read_bytes()

    def fail() -> dict:
        raise UsageError("no")

    with pytest.raises(UsageError):
        Manifest(tmp_path).run("copy", {"setting": 2}, {"in": tmp_path / "in"}, ["out"], fail)
    assert (tmp_path / "manifest.json").read_bytes() == before and step(setting=2)


def test_folders_count_by_names_and_contents(tmp_path):
    manifest = Manifest(tmp_path)
    (tmp_path / "d" / "sub").mkdir(parents=True)
    (tmp_path / "d" / "sub" / "a").write_text("x")
    first = manifest.digest(tmp_path / "d")
    (tmp_path / "d" / "sub" / "a").rename(tmp_path / "d" / "sub" / "b")
    assert manifest.digest(tmp_path / "d") != first and manifest.digest(tmp_path / "absent") is None


@pytest.mark.parametrize(
    ("content", "message"), [("{", "delete it"), ("[]", "another version"), ('{"version": 99}', "another version")]
)
def test_a_manifest_that_cannot_be_used(tmp_path, content, message):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UsageError, match=message):
        Manifest(tmp_path)


def test_work_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="--work"):
        Manifest(tmp_path / "file")


def test_the_manifest_names_no_place(tmp_path, step):
    step()
    assert str(tmp_path) not in json.dumps(json.loads((tmp_path / "manifest.json").read_text()))
