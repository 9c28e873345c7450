"""The benchmark of the steps' seconds and memory: what its file says of where figures come from."""

import json

import pytest

from megatron_ksa.data_tools.benchmarks import tags_scale
from megatron_ksa.data_tools.tags.sample import SampleSettings


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The program on 60 instances, its first two steps in this process; returns what it wrote."""
    out = tmp_path / "results.json"
    monkeypatch.setattr(tags_scale, "STEPS", tags_scale.STEPS[:2])
    apart = []

    def here(function, *arguments):
        apart.append(function.__name__)
        return function(*arguments)

    monkeypatch.setattr(tags_scale, "_apart", here)

    def call(*arguments: str) -> dict:
        given = ["--work", tmp_path, "--out", out, "--instances", "60", "--workers", "1", *arguments]
        monkeypatch.setattr("sys.argv", ["tags_scale", *map(str, given)])
        tags_scale.main()
        return json.loads(out.read_text())

    call.out, call.apart = out, apart
    return call


def test_the_file_tells_settings_machine_and_the_commit_of_each_step(run, monkeypatch):
    """Figures of tags_scale came without settings and commit: nobody could tell of which code they were."""
    settings = tags_scale.settings_of()
    found = run()
    assert found["settings"] == settings and found["settings"]["pool"]["topics"] == tags_scale.TOPICS
    assert found["settings"]["steps"]["tag"]["TaggerSettings"]["kind"] == "data"
    commit = found["machine"]["commit"]
    assert commit and {"processor", "python", "numpy", "scipy"} <= set(found["machine"])
    assert [(step["step"], step["commit"]) for step in found["sizes"][0]["steps"]] == [
        ("read", commit),
        ("tag", commit),
    ]
    # Steps that stand keep the commit that they were measured at.
    of_now = {**found["machine"], "commit": "0000000"}

    def of_other_code(commit, packages):
        return of_now

    monkeypatch.setattr(tags_scale, "machine", of_other_code)
    again = run("--first", "tag")
    assert [step["commit"] for step in again["sizes"][0]["steps"]] == [commit, "0000000"]
    assert again["machine"] == of_now


def test_what_loads_torch_runs_in_a_process_of_its_own(run):
    """The tokenizer was written by the process that starts the steps: each step's peak began with torch's 0.7 GiB."""
    run()
    assert run.apart == ["machine", "write_pool", "write_byte_level", "run_step", "run_step"]


def test_all_steps_settings_are_told():
    steps = tags_scale.settings_of()["steps"]
    assert list(steps) == [step.name for step in tags_scale.STEPS]
    assert steps["sample"]["SampleSettings"] == json.loads(json.dumps(vars(SampleSettings())))
    assert steps["write"]["EncodingSettings"]["loss_on"] == "responses"


def test_figures_of_other_settings_are_not_gone_on_with(run, monkeypatch, capsys):
    """Sizes of a file stayed whatever they had been measured with."""
    run()
    before = run.out.read_bytes()
    monkeypatch.setattr(tags_scale, "COPIES", 0.5)
    with pytest.raises(SystemExit) as stopped:
        run()
    assert stopped.value.code == 2 and "is of other settings" in capsys.readouterr().err
    assert run.out.read_bytes() == before
    run.out.write_text(json.dumps({"cpus": 2, "sizes": []}))
    with pytest.raises(SystemExit) as stopped:
        run()
    assert stopped.value.code == 2 and "does not say of which settings" in capsys.readouterr().err


@pytest.mark.slow
def test_what_workers_use_is_counted(tmp_path):
    """Workers are forks of a process that nobody waited for: their memory was 0 and their time missing."""
    pool = tmp_path / "pool.jsonl"
    tags_scale.write_pool(pool, 60)
    found = tags_scale._apart(tags_scale.run_step, tmp_path / "work", pool, 0, 2, "local")
    assert found["step"] == "read" and found["worker_peak_gib"] > 0.01
