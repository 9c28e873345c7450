"""A text shaded by the attention that a chosen chunk gives to the summaries of older chunks: one HTML file."""

import base64
import hashlib
import re
from importlib.resources import files

import torch

from megatron_ksa.data_tools.tags.report_page import json_block
from megatron_ksa.evaluation.summary_attention import LayerAttention

# Attention is stored in 8 bits as its square root: steps of 1/65025 at 0, of 1/128 at 1.
STEPS = 255


def render(title: str, texts: list[str], layers: list[LayerAttention], facts: list[tuple[str, str]]) -> str:
    """The page, which needs no network and runs no code but its own.

    Args:
        texts: of each chunk.
        facts: (name, value) pairs for the head of the page.
    """
    stored = []
    for layer in layers:
        entry = {"layer": layer.layer, "kind": layer.kind, "window": layer.window, "data": None}
        if layer.summaries is not None:
            heads, chunks, _ = layer.summaries.shape
            lower = torch.tril_indices(chunks, chunks, -1)
            values = (layer.summaries[:, lower[0], lower[1]].sqrt() * STEPS).round().to(torch.uint8)
            entry |= {"heads": heads, "data": base64.b64encode(values.numpy().tobytes()).decode()}
        stored.append(entry)
    data = {"title": title, "texts": texts, "layers": stored, "facts": facts}
    folder = files("megatron_ksa.evaluation.summary_page")
    script = (folder / "page.js").read_text(encoding="utf-8")
    parts = {
        "style": (folder / "style.css").read_text(encoding="utf-8"),
        "script": script,
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "data": json_block(data),
    }
    page = (folder / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], page)
