"""Optional baselines: when they are skipped and why, what they are checked against, and the pairs that they see."""

import importlib
import importlib.machinery
import importlib.util
import json
import sys
import types

import pytest
import torch
from attention_cases import random_rows
from compare import assert_close

from megatron_ksa.kernels.benchmarks import baselines, runner
from megatron_ksa.kernels.benchmarks.registry import Shape

GROUPED = Shape(8192, 32, 8)


def blocked(monkeypatch, *modules):
    """Packages that cannot be found."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name.partition(".")[0] in modules else find_spec(name)
    )


@pytest.mark.parametrize(
    "op, shape, reason",
    [
        (baselines.NSA, Shape(8192, 32, 2), "fla.ops.nsa is not installed: pip install fla-core"),
        (baselines.NSA, GROUPED, "from 16 query heads on for each K/V head, not 4"),
        (baselines.MOBA, GROUPED, "fla.ops.moba is not installed"),
        (baselines.MOBA, Shape(8192, 32, 8, batch=2), "one sequence, not a batch of 2"),
        (baselines.FLASH_4, GROUPED, "flash_attn.cute is not installed: pip install --pre flash-attn-4"),
    ],
)
def test_what_is_not_installed_or_not_taken_is_skipped_with_its_reason(monkeypatch, tmp_path, op, shape, reason):
    """Neither checked nor timed; the other ops run, and the run ends well."""
    blocked(monkeypatch, "fla", "flash_attn")
    monkeypatch.setattr(runner, "header", lambda device, commit: {})
    monkeypatch.setattr(runner, "_release", lambda device: None)
    plan = runner.Plan((op.name,), (shape,), "cuda", tmp_path / "record.json")
    (result,) = runner.run(plan)["results"]
    assert reason in result["skipped"] and "modes" not in result
    assert json.loads((tmp_path / "record.json").read_text())["checks"] == {}


def test_a_package_that_cannot_be_imported_says_why(monkeypatch, tmp_path):
    (tmp_path / "broken_baseline.py").write_text("import triton.of_another_version")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "ModuleNotFoundError: No module named 'triton.of_another_version'" in baselines.imported(
        "broken_baseline", "x"
    )


def test_flash_attention_4_alone_is_not_flash_attention_2(monkeypatch):
    """Its wheel installs the folder flash_attn without the functions that NSA's window and MoBA call."""
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    sys.modules["flash_attn"].__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    assert baselines._flash_attention_2() == "flash_attn has no FlashAttention 2: pip install flash-attn"


def softmax_attention(q, k, v, visible):
    """[n, D] attention of one head under a mask [n, keys]; queries that see nothing get 0."""
    scores = (q @ k.T * q.shape[-1] ** -0.5).masked_fill(~visible, -torch.inf)
    return torch.softmax(scores, dim=-1).nan_to_num(0.0) @ v


@pytest.mark.parametrize("window", [0, 96])
def test_definition_of_nsa_at_short_lengths(window):
    """Causal attention, means of the blocks that a query has passed, and the window, each written out for one head."""
    n, block = 150, baselines.NSA_BLOCK
    q, k, v = (rows.detach()[0, :, 0] for rows in random_rows(0, 1, 8, torch.float64, *[(n, 1)] * 3))
    i, j = torch.arange(n)[:, None], torch.arange(n)[None, :]
    k_mean, v_mean = (torch.stack([rows[:block].mean(0), rows[block : 2 * block].mean(0)]) for rows in (k, v))
    expected = softmax_attention(q, k, v, j <= i)
    expected = expected + softmax_attention(q, k_mean, v_mean, torch.tensor([block, 2 * block])[None] <= i + 1)
    if window:
        expected = expected + softmax_attention(q, k, v, (j <= i) & (i - j < window))
    actual = baselines.nsa_definition(*(rows[None, :, None] for rows in (q, k, v)), window)
    assert_close("out", actual[0, :, 0], expected)


@pytest.mark.parametrize("n", [1, 64, 65, 700, 2100])
def test_visible_pairs(n):
    """Counted query by query from the rules of either method."""
    nsa = moba = 0
    for i in range(n):
        blocks = min(i // 64 + 1, 16)
        nsa += sum(1 for key in range(i + 1) if key // 64 > i // 64 - blocks) + (i + 1) // 64 + min(i + 1, 512)
        moba += sum(1 for key in range(i + 1) if key // 512 > i // 512 - 3)
    assert baselines.nsa_pairs(n, 512) == nsa
    assert baselines.moba_pairs(n) == moba
