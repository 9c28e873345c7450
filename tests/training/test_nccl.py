"""Layouts of two ranks under NCCL (see `nccl_check.py`, which also runs by itself)."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_as_one():
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("nccl_check.py")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr[-6000:]
