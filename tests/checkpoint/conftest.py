import sys
from pathlib import Path

# tests/checkpoint/huggingface/models.py makes the checkpoints of every test here.
sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
