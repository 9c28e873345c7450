"""The demo's text: the running interpreter's standard library, which is on every machine that can run the demo."""

import json
import sysconfig
from pathlib import Path

from megatron_ksa.files import whole_file

LEFT_OUT = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__", "encodings", "pydoc_data"}
VALIDATION_EVERY = 20


def write_corpus(folder: Path, one_file_in: int = 1) -> None:
    """Write `train.jsonl` and `validation.jsonl` (every 20th file), each complete as soon as it has its name.

    Args:
        one_file_in: take one file of the library in so many.
    """
    library = Path(sysconfig.get_path("stdlib"))
    files = [file for file in sorted(library.rglob("*.py")) if not LEFT_OUT & set(file.relative_to(library).parts[:-1])]
    files = files[::one_file_in]
    split = {"validation": files[::VALIDATION_EVERY], "train": [f for i, f in enumerate(files) if i % VALIDATION_EVERY]}
    for name, members in split.items():
        with whole_file(folder / f"{name}.jsonl") as out:
            for file in members:
                text = file.read_text(encoding="utf-8", errors="ignore")
                out.write(json.dumps({"text": text, "file": str(file.relative_to(library))}) + "\n")
