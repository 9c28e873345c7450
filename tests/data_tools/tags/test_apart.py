"""Nothing of the user's is replaced: what a run reads and what it writes lie apart."""

import json
from pathlib import Path

import pytest

TAGGED = [{"id": n, "text": f"text {n} about chess", "tags": ["chess"]} for n in range(6)]


def lines(path: Path, rows: list[dict] = TAGGED) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "name", ["records.jsonl", "rejected.jsonl", "tags.jsonl", "target/records.jsonl", "export/x.jsonl"]
)
@pytest.mark.parametrize("flag", ["--input", "--target", "--decontaminate"])
def test_data_under_the_name_of_an_output_stands(tmp_path, call, name, flag):
    """`--work DIR --input DIR/records.jsonl` replaced the user's data by the records made of it."""
    data = lines(tmp_path / "work" / name)
    before = data.read_bytes()
    others = () if flag == "--input" else ("--input", lines(tmp_path / "pool.jsonl"))
    code, _, error = call("--work", tmp_path / "work", "--tagger", "data", "--budget", 2, flag, data, *others)
    assert code == 2 and error.startswith(f"error: {flag} {data}: a run writes its own {tmp_path / 'work'}")
    assert data.read_bytes() == before and not (tmp_path / "work" / "manifest.json").exists()


def test_a_file_of_a_folder_that_no_run_used_stands(tmp_path, call):
    """The user's file in the work folder was replaced by an output of its name."""
    work, data = tmp_path / "work", lines(tmp_path / "pool.jsonl")
    for name in ("tags.jsonl", "target/records.jsonl"):
        mine = lines(work / name, [{"mine": 1}])
        code, _, error = call("tag", "--work", work, "--tagger", "data", "--input", data)
        assert code == 2 and error.startswith(f"error: --work {work}: {mine} is there, and no run wrote it")
        assert mine.read_text() == '{"mine": 1}\n'
        mine.unlink()
    assert call("tag", "--work", work, "--tagger", "data", "--input", data)[0] == 0
    # Whoever deletes the manifest starts over.
    (work / "manifest.json").unlink()
    assert call("tag", "--work", work, "--tagger", "data", "--input", data)[0] == 0


@pytest.mark.parametrize(("out", "names"), [
    ("pool.jsonl", "pool.jsonl"), ("p.jsonl", "p-target.jsonl"), ("p.jsonl", "p-2.jsonl"), ("work/tags.jsonl", "tags"),
    ("pool.jsonl.gz", "not compressed"),
])  # fmt: skip
def test_batch_out_replaces_no_file_that_is_read(tmp_path, call, out, names):
    """`tag --batch-out FILE` with the file of --input replaced the data by the requests."""
    data = lines(tmp_path / (names if names.endswith("jsonl") else "pool.jsonl"))
    before = data.read_bytes()
    code, _, error = call("tag", "--work", tmp_path / "work", "--input", data, "--tagger", "llm", "--llm-model", "m",
                          "--batch-out", tmp_path / out)  # fmt: skip
    assert code == 2 and error.startswith(f"error: --batch-out {tmp_path / out}") and names in error + "tags"
    assert data.read_bytes() == before
