"""The kernels without the trainer: what they import, the examples of docs/kernels.md, which implementation runs."""

import importlib
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
from triton.language import standard

from megatron_ksa.kernels import (
    adam,
    cross_entropy,
    dispatch,
    distillation,
    ksa_attention,
    norm,
    rotation,
    softmax_merge,
    swiglu,
)
from megatron_ksa.kernels.ksa_attention import KSAGeometry, reference

ROOT = Path(__file__).parents[2]
EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8"), re.DOTALL)
NAMES = [example.split("import ")[-1].split("\n")[0] for example in EXAMPLES]
OPS = {
    "ksa_attention": ksa_attention.ksa_attention,
    "ksa_text_attention": ksa_attention.ksa_text_attention,
    "ksa_summary_attention": ksa_attention.ksa_summary_attention,
    "rotate_heads": rotation.rotate_heads,
    "statistics": cross_entropy.statistics,
    "gradients": cross_entropy.gradients,
    "distillation statistics": distillation.statistics,
    "distillation gradients": distillation.gradients,
    "rms_norm": norm.rms_norm,
    "swiglu": swiglu.swiglu,
    "adam_step": adam.adam_step,
    "l2_norm": adam.l2_norm,
    "ksa_forward": ksa_attention.ksa_forward,
    "ksa_backward": ksa_attention.ksa_backward,
    "merge_into": softmax_merge.merge_into,
}
# Nothing but what torch, triton and numpy bring along may be imported; Megatron and the trainer's folders may not.
BLOCKED = """
import importlib.abc, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        top, _, rest = name.partition(".")
        outside = top in {"megatron", "transformers", "tokenizers", "safetensors", "tensorboard", "transformer_engine"}
        inside = top == "megatron_ksa" and rest and rest.partition(".")[0] not in {"kernels", "errors", "files"}
        if outside or inside:
            raise ModuleNotFoundError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
"""
# Runs each of `examples` as a main module in a fork, and prints exit codes and what they print as JSON.
FORKS = """
import json, os, sys, tempfile, traceback
import torch

found = []
for example in examples:
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                exec(compile(example, "example", "exec"), {"__name__": "__main__"})
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        output.seek(0)
        found.append([code, output.read().decode()])
print(json.dumps(found))
"""


def run_alone(code):
    """Runs code in a process in which only the base install can be imported."""
    return subprocess.run([sys.executable, "-c", BLOCKED + code], cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_block_blocks():
    assert "megatron is blocked" in run_alone("import megatron.core").stderr
    assert "megatron_ksa.model is blocked" in run_alone("import megatron_ksa.model.gpt").stderr


@pytest.fixture(scope="module")
def printed():
    """Exit code and output of each example, in a fork of one process that has imported torch."""
    done = run_alone(f"examples = {EXAMPLES!r}\n{FORKS}")
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("number", range(len(EXAMPLES)), ids=NAMES)
def test_examples_of_the_page_run_with_the_base_install_alone(number, printed):
    code, output = printed[number]
    assert code == 0, output[-2000:]
    for name, value in re.findall(r"(largest \w+) (\S+)", output):
        assert float(value) < 1e-5, name


def test_the_page_names_every_op():
    text = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    folders = (ksa_attention, rotation, cross_entropy, distillation, norm, swiglu, adam)
    for name, module in ((folder.__name__.rpartition(".")[2], folder) for folder in folders):
        for op in OPS.keys() & set(module.__all__):
            assert f"`{name}.{op}`" in text
    assert len(EXAMPLES) == 4


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_kernels_take_the_arguments_of_their_reference(op):
    """What a GPU's path needs beyond the reference's arguments has a default."""
    path = re.search(r"`(megatron_ksa[\w.]+:\w+)`", op.__doc__).group(1)
    module, _, name = path.partition(":")
    kernels = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    given = inspect.signature(op).parameters
    assert [(p.name, p.default, p.kind) for p in kernels.values() if p.name in given] == [
        (p.name, p.default, p.kind) for p in given.values()
    ]
    assert all(p.default is not p.empty for p in kernels.values() if p.name not in given)


def rows(*counts, heads=2, dim=16):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, count, heads, dim, generator=generator).requires_grad_() for count in counts]


needs_interpreter = pytest.mark.skipif(
    isinstance(standard.sum, triton.runtime.JITFunction), reason="CPU tensors need Triton's interpreter"
)


@needs_interpreter
@pytest.mark.parametrize("compiled", [False, True])
def test_the_public_op_reaches_the_kernels(monkeypatch, compiled):
    """Also in one graph of torch.compile, which must not trace the import of a kernel's module."""
    monkeypatch.setattr(dispatch, "uses_triton", lambda op, given: True)
    geometry, leaves = KSAGeometry(4, 1, 2), rows(25, 25, 25)

    def attend(q, k, v):
        return ksa_attention.ksa_attention(q, k, v, geometry, text_rows=20)

    calls = []
    monkeypatch.setattr(reference, "text_attention", lambda *given, **options: calls.append(given))
    out = (torch.compile(attend, backend="aot_eager", fullgraph=True) if compiled else attend)(*leaves)
    gradients = torch.autograd.grad(out.sum(), leaves)
    monkeypatch.undo()
    assert not calls
    expected = reference.attention(*leaves, geometry, text_rows=20)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.sum(), leaves))


def test_a_call_may_name_its_arguments():
    q, k, v = rows(10, 10, 10)
    geometry = KSAGeometry(4, 1, 2)
    out = ksa_attention.ksa_attention(q=q, k=k, v=v, geometry=geometry, text_rows=8)
    torch.testing.assert_close(out, reference.attention(q, k, v, geometry, text_rows=8))
