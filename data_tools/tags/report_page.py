"""The report as one HTML file that needs no network and runs no code but its own.

Everything that comes from the pool (tags, names, texts) is in a block of JSON in which `<`, `>` and `&` are escaped,
and the script sets it as text only. A content security policy with the script's hash forbids every other script and
every request.
"""

import base64
import hashlib
import json
import re
from importlib.resources import files

import numpy as np

from megatron_ksa.data_tools.tags.pool import Pool
from megatron_ksa.data_tools.tags.report_data import NodeStatistics, largest_nodes, preorder

MAX_NODES = 50_000
# Parts of the page's script, in order; they share one scope. The libraries are in page/vendor/.
SCRIPTS = ("base", "tree", "branch", "map", "charts", "search", "start")
_ESCAPES = {character: f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}


def json_block(value: object) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    text = re.sub("[<>&\u2028\u2029]", lambda match: _ESCAPES[match[0]], text)
    # A lone surrogate, which JSON can carry into a tag, has no UTF-8.
    return text.encode("utf-8", "replace").decode("utf-8")


def _column(values: np.ndarray, digits: int) -> list:
    """Numbers as JSON: rounded to significant digits, null where there is none."""
    return [None if np.isnan(value) else float(f"{value:.{digits}g}") for value in values.tolist()]


def node_columns(pool: Pool, statistics: NodeStatistics) -> tuple[dict[str, list], np.ndarray]:
    """Columns of the page's nodes, in pre-order, at most `MAX_NODES` of them.

    Returns:
        The columns, and int64 [nodes] the place of each tree node among them; of nodes left out, that of the nearest
        kept one above.
    """
    kept = largest_nodes(statistics.pool, pool.depth, MAX_NODES)
    order = preorder(pool.parent, kept, statistics.pool_share)
    place = np.full(len(pool.parent), -1, np.int64)
    place[order] = np.arange(len(order))
    for node in np.flatnonzero(~kept):
        above = node
        while place[above] < 0:
            above = pool.parent[above]
        place[node] = place[above]
    columns = {
        "parent": [-1 if node < 0 else int(place[node]) for node in pool.parent[order]],
        "depth": pool.depth[order].tolist(),
        "name": [str(name)[:200] for name in pool.names[order]],
        "pool": statistics.pool[order].tolist(),
        "selected": statistics.selected[order].tolist(),
        "coverage": _column(statistics.coverage[order], 4),
        "pool_quality": _column(statistics.pool_quality[order], 4),
        "selected_quality": _column(statistics.selected_quality[order], 4),
        # Children's widths must not add up to more than their parent's.
        "pool_share": _column(statistics.pool_share[order], 9),
        "selected_share": _column(statistics.selected_share[order], 4),
        "target_share": None if statistics.target_share is None else _column(statistics.target_share[order], 4),
        "other_share": None if statistics.other_share is None else _column(statistics.other_share[order], 4),
    }
    return columns, place


def _hash(script: str) -> str:
    """A script's source in a content security policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def render(data: dict) -> str:
    """The page.

    Args:
        data: "nodes" (`node_columns`) and everything else that `report.report_step` puts there.
    """
    folder = files("megatron_ksa.data_tools.tags") / "page"
    script = "".join((folder / "js" / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS)
    licence = (folder / "vendor" / "LICENSE").read_text(encoding="utf-8").replace("*/", "* /")
    vendor = f"/*\n{licence}\n*/\n" + (folder / "vendor" / "d3.min.js").read_text(encoding="utf-8")
    parts = {
        "style": (folder / "style.css").read_text(encoding="utf-8"),
        "script": script,
        "vendor": vendor,
        "script_hashes": f"{_hash(vendor)} {_hash(script)}",
        "data": json_block(data),
    }
    page = (folder / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], page)
