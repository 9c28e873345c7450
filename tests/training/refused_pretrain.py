"""`pretrain_gpt.py` once for each list of flags, in one process; what each said on stderr and its exit code, as JSON.

Usage: refused_pretrain.py RUNS.json RESULTS.json, lists of lists of flags and of [exit code, lines].
"""

import contextlib
import io
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))
import pretrain_gpt  # noqa: E402
from megatron_ksa.platform import prepare_platform  # noqa: E402
from megatron_ksa.upstream.run_state import forget_run  # noqa: E402


class Heard(io.StringIO):
    """What is written, also where it would be without this: a run that fails ends the process."""

    def write(self, text: str) -> int:
        sys.__stderr__.write(text)
        return super().write(text)

    def fileno(self) -> int:
        return sys.__stderr__.fileno()


def main() -> None:
    runs, results = (Path(path) for path in sys.argv[1:])
    prepare_platform([])
    found = []
    for flags in json.loads(runs.read_text()):
        sys.argv = ["pretrain_gpt.py", *flags]
        code, said = 0, Heard()
        with contextlib.redirect_stderr(said):
            try:
                pretrain_gpt.main()
            except SystemExit as end:
                code = end.code
        with contextlib.suppress(Exception):
            forget_run()
        found.append([code, [line for line in said.getvalue().splitlines() if line.startswith("error: ")]])
        results.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
