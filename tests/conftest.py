import sys
from pathlib import Path

# tests/compare.py and tests/trainer.py are shared by every folder of tests.
sys.path.insert(0, str(Path(__file__).parent))
