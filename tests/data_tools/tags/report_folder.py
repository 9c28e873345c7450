"""A work folder whose names, ids, sources and texts try to be markup."""

import numpy as np
from work_folder import make_work_folder, record

from megatron_ksa.data_tools.tags.chat_template import EncodingSettings
from megatron_ksa.data_tools.tags.files import read_arrays, write_arrays, write_jsonl
from megatron_ksa.data_tools.tags.groups import GroupSettings
from megatron_ksa.data_tools.tags.sample import SampleSettings
from megatron_ksa.data_tools.tags.selection import sample_step
from megatron_ksa.data_tools.tags.write import write_step

HOSTILE = "</script><script>window.hit=1</script><img src=x onerror='window.hit=1'>{{script}}\u2028$x_{"


def hostile_work_folder(folder):
    """A folder whose names, ids, sources and texts try to be markup, with a selection, a target and a blend."""
    make_work_folder(folder)
    arrays = read_arrays(folder / "tree.npz")
    arrays["name"] = np.array([*arrays["name"][:1], HOSTILE, *arrays["name"][2:]])
    write_arrays(folder / "tree.npz", **arrays)
    hostile = {"id": HOSTILE, "source": HOSTILE, "text": HOSTILE, "quality": None, "difficulty": None, "tags": None}
    write_jsonl(
        folder / "records.jsonl",
        ({**hostile, "id": f"{line} {HOSTILE}"} if line % 4 == 0 else record(line) for line in range(400)),
    )
    write_jsonl(folder / "rejected.jsonl", [{"origin": "x:1", "id": None, "reason": HOSTILE, "detail": ""}] * 3)
    write_jsonl(folder / "duplicates.jsonl", [{"id": "a", "kept": "b", "similarity": 0.9}])
    write_jsonl(folder / "tag_merges.jsonl", [{"tag": HOSTILE, "into": HOSTILE, "reason": "meaning"}])
    write_jsonl(folder / "failed.jsonl", [{"id": HOSTILE, "reason": "refused", "detail": HOSTILE, "attempts": 1}])
    make_work_folder(folder / "target", instances=30, seed=2)
    sample_step(folder, SampleSettings("40"), target=folder / "target", show_progress=False)
    write_step(folder, GroupSettings(), EncodingSettings(str(folder / "tokenizer")), show_progress=False)
    return folder
