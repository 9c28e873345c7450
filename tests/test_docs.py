"""The pages tell the truth: their Python runs, and the files that they and the code name exist."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from single_process import process_groups, transformer_config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "docs/library.md").read_text(encoding="utf-8"), re.DOTALL)
# Words in backticks that are files of this repository: a folder that is there, then a path.
FOLDERS = "docs|examples|kernels|data_tools|megatron_ksa|slurm|tests|tools"
PATH = re.compile(rf"`((?:{FOLDERS})/[\w./-]+)`")


@pytest.mark.slow
def test_the_model_of_the_library_page_trains():
    """In a process of its own, which makes its process groups itself."""
    (code,) = (snippet for snippet in SNIPPETS if "init_process_group" in snippet)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "(2, 64, 128) (2, 64)" in done.stdout


@pytest.mark.parametrize("code", [snippet for snippet in SNIPPETS if "init_process_group" not in snippet])
def test_short_snippets_of_the_library_page_run(code, capsys):
    exec(compile(code, "docs/library.md", "exec"), {})
    said = capsys.readouterr().out.split()
    assert said == re.findall(r"print\(\w+\)  # (\d+)", code)


def test_the_readmes_lines_run():
    """With the names that a reader has: a configuration of 24 layers, and rows of text and summaries."""
    model, kernel = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    process_groups()
    names = {"config": transformer_config(num_layers=24)}
    exec(compile(model, "README.md", "exec"), names)
    assert len(names["model"].decoder.layers) == 24 and names["model"].layout.total_rows(8192) == 9216
    rows = torch.randn(1, 72, 2, 16)
    names = {"q": rows, "k": rows, "v": rows, "n": 64}
    exec(compile(kernel, "README.md", "exec"), names)
    assert names["out"].shape == rows.shape


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page):
    names = PATH.findall(page.read_text(encoding="utf-8"))
    assert names
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_documents_that_the_code_names_exist():
    """Eight comments cited specifications that a clone did not have."""
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    cited = {
        (name, document)
        for name in listed.split()
        for document in re.findall(r"\bdocs/\w+\.md", (ROOT / name).read_text(encoding="utf-8"))
    }
    assert cited
    assert [pair for pair in sorted(cited) if not (ROOT / pair[1]).is_file()] == []
    spelled = "SPEC" + "-"
    assert [name for name in listed.split() if spelled in (ROOT / name).read_text(encoding="utf-8")] == []
