"""The commands of `slurm/README.md` for a cluster without Slurm, with two launchers on this machine as two nodes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ksa.platform.ports import free_port

ROOT = Path(__file__).parents[2]


def documented_commands() -> str:
    """The block of shell under "Without Slurm"."""
    section = (ROOT / "slurm/README.md").read_text().split("## Without Slurm")[1]
    return re.search(r"```bash\n(.*?)```", section, re.DOTALL)[1]


@pytest.mark.long
def test_two_launchers_train_one_model(tmp_path):
    """Tensor parallelism across the two; each is started with the same text."""
    commands = documented_commands()
    for documented, here in (
        ("layouts/ksa_1b9.args", "layouts/ksa_1b9.args slurm/overrides/tiny.args"), ("--nnodes 8", "--nnodes 2"),
        ("--nproc-per-node 8", "--nproc-per-node 1"), ("node0:29500", f"localhost:{free_port()}"),
        ("--tokenizer-model data/tokenizer --data-args-path data/blend.txt", "--train-iters 4"),
        ("runs/ksa_1b9/checkpoints", f"{tmp_path}/checkpoints"), ("--save-interval 500", "--save-interval 4"),
        ("torchrun --n", f"{sys.executable} -m torch.distributed.run --n"),
    ):  # fmt: skip
        assert documented in commands, documented
        commands = commands.replace(documented, here)
    nodes = [
        subprocess.Popen(
            ["bash", "-c", commands], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for _ in range(2)
    ]
    outputs = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert (tmp_path / "checkpoints/latest_checkpointed_iteration.txt").read_text() == "4"
    assert sum("iteration        4/       4" in output for output in outputs) == 1
