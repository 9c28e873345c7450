"""Bad input of the base search: one line that names the flag, exit code 2, no file."""

import runpy
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "search_harpe_bases.py"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--groups 0", "--groups 0: from 1 to 4,096"),
        ("--groups 33 --method llama2-7b-128k", "has 32 bases, the model has 33 KV groups"),
        ("--head-dim 7", "--head-dim 7: an even number"),
        ("--head-dim 0", "--head-dim 0: from 2"),
        ("--length 3", "--length 3: from 16"),
        ("--length 100000000000", "--length 100000000000: from 16 to 16,777,216"),
        ("--length 64", "--extrema 32: a waveform has 9 within --length 64"),
        ("--extrema 1", "--extrema 1: from 2"),
        ("--base-min nan", "--base-min nan, --base-max 5e+06 and --stride 30000 must be positive"),
        ("--base-min 5e6 --base-max 1e6", "min below max"),
        ("--method uniform --base-min 5e6 --base-max 1e6", "5e+06 is above --harpe-base-max 1e+06"),
        ("--stride 0", "--stride 0 must be positive"),
        ("--stride 1e-9", "--stride 1e-09 gives 4,000,000,000,000,001 candidates, at most 100,000"),
        ("--stride 4e6", "2 candidates for 32 bases"),
        ("--output bases.txt", "--output bases.txt: a .json file"),
        ("--output nowhere/bases.json", "--output nowhere/bases.json: a .json file in a folder that exists"),
    ],
)
def test_bad_input(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(TOOL), *flags.split()])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(TOOL), run_name="__main__")
    lines = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and len(lines) == 1 and message in lines[0]
    assert not list(tmp_path.iterdir())
