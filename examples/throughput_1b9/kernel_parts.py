"""Kernels of a training step by part, from a trace of torch's profiler, and the floor of each part.

The floor of products is what the same products take alone, that of attention its operations at the fastest product's
rate, that of everything else its bytes (each operand once) at the bandwidth of a copy.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"}
OPTIMIZER = "part: optimizer"
# A part and what its kernels are called, or the operators that launch them; the first that fits.
KERNELS = (
    ("loss", r"^statistics_kernel|^gradients_kernel|softmax|nll_loss|cross_entropy"),
    ("rotation", r"^rotate_"),
    ("norms", r"rms_norm|RMSNorm|layer_norm|LayerNorm|GammaBeta"),
    ("activation", r"triton_\w*(silu|sigmoid)|swiglu"),
    ("attention", r"^_?\w*(forward|backward|dkv|dq|summary|text|joint)\w*_kernel|flash|fmha|sdpa|cudnn_generated"),
    ("residual", r"^triton_\w*add"),
    ("embedding", r"embedding|indexSelect|add_rows_kernel"),
    ("zeros", r"^Memset"),
    ("copies", r"^Memcpy|CatArray"),
)
OPERATORS = (
    ("embedding", r"^aten::embedding"),
    ("zeros", r"^aten::(zero_|zeros|fill_|_foreach_zero_)"),
    ("check of gradients", r"^aten::(linalg_vector_norm|norm)"),
    ("copies", r"^aten::(copy_|_to_copy|cat|contiguous|clone)|^Memcpy"),
    ("activation", r"^aten::(silu|sigmoid)|SwiGLU"),
    ("norms", r"^aten::_fused_rms_norm|^aten::rms_norm|layer_norm"),
    ("attention", r"attention|KSA|Summary"),
    ("loss", r"CrossEntropy|^aten::(exp|gather|amax|scatter_add_|logsumexp)"),
)


@dataclass
class Part:
    """Time of a part of one step.

    Attributes:
        ms: its kernels.
        kernels: how many.
        shapes: of products: (operator, sizes of the inputs) -> [calls, ms].
        names: (kernel, operator) -> [calls, ms].
    """

    ms: float = 0.0
    kernels: int = 0
    shapes: dict[tuple, list[float]] = field(default_factory=lambda: defaultdict(lambda: [0, 0.0]))
    names: dict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(lambda: [0, 0.0]))

    def add(self, kernel: str, operator: str, sizes: tuple, ms: float, *, first: bool = True) -> None:
        """Count one kernel; first of those that one call of the operator launches."""
        self.ms += ms
        self.kernels += 1
        for counts, key, count in ((self.names, (kernel[:120], operator), 1), (self.shapes, (operator, sizes), first)):
            counts[key][0] += count
            counts[key][1] += ms


def part_of(kernel: str, operator: str, sizes: tuple, types: tuple, words: int) -> str:
    """The part that a kernel belongs to.

    Args:
        operator: what launched it.
        sizes, types: of the operator's inputs.
        words: size of the vocabulary, by which products of the output layer are known.
    """
    if operator in PRODUCTS:
        return "products of the output layer" if any(words in size for size in sizes) else "products of the layers"
    for patterns, text in ((KERNELS, kernel), (OPERATORS, operator)):
        for part, pattern in patterns:
            if re.search(pattern, text):
                return part
    if operator in ("aten::add", "aten::add_"):
        return "sums of gradients in float32" if "float" in types else "residual"
    return "other"


def read_trace(path: Path, words: int, on_gpu: bool) -> tuple[dict[str, Part], float]:
    """Parts of the traced step, and the milliseconds in which the device ran at least one kernel.

    Without a GPU, operators that call no others take the place of kernels.
    """
    events = [event for event in json.loads(path.read_text(encoding="utf-8"))["traceEvents"] if event.get("ph") == "X"]
    operators = [event for event in events if event.get("cat") == "cpu_op"]
    by_id = {event["args"]["External id"]: event for event in operators if "External id" in event["args"]}
    if on_gpu:
        kernels = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
        steps = [e for e in events if e.get("cat") == "gpu_user_annotation" and e["name"] == OPTIMIZER]
    else:
        kernels = list(_leaves(operators))
        steps = [e for e in events if e.get("cat") == "user_annotation" and e["name"] == OPTIMIZER]
    parts: dict[str, Part] = defaultdict(Part)
    seen: set[int] = set()
    for kernel in kernels:
        call = kernel.get("args", {}).get("External id")
        operator = by_id.get(call, {"name": "", "args": {}})
        sizes = tuple(_size(size) for size in operator["args"].get("Input Dims", ()))
        types = tuple(operator["args"].get("Input type", ()))
        if any(step["ts"] <= kernel["ts"] < step["ts"] + step["dur"] for step in steps):
            part = "optimizer"
        else:
            part = part_of(kernel["name"], operator["name"], sizes, types, words)
        # A product clears a workspace in a kernel of its own.
        parts[part].add(kernel["name"], operator["name"], sizes, kernel["dur"] / 1e3, first=call not in seen)
        seen.add(call)
    return dict(parts), _busy(kernels)


def _size(size: list) -> tuple:
    return tuple(size) if all(isinstance(number, int) for number in size) else ()


def _leaves(operators: list[dict]) -> Iterator[dict]:
    """Operators that call no others, thread by thread; a product is one whatever it calls."""
    threads = defaultdict(list)
    for event in operators:
        threads[event["tid"]].append(event)
    for thread in threads.values():
        thread.sort(key=lambda event: (event["ts"], -event["dur"]))
        end = 0.0
        for event, following in zip(thread, [*thread[1:], None], strict=True):
            inside, event_end = event["ts"] < end, event["ts"] + event["dur"]
            calls_none = following is None or following["ts"] >= event_end
            if not inside and (calls_none or event["name"] in PRODUCTS):
                yield event
            if event["name"] in PRODUCTS:
                end = max(end, event_end)


def _busy(kernels: list[dict]) -> float:
    """Milliseconds of the union of the kernels' times."""
    busy, end = 0.0, 0.0
    for begin, duration in sorted((kernel["ts"], kernel["dur"]) for kernel in kernels):
        busy += max(begin + duration - max(begin, end), 0.0)
        end = max(end, begin + duration)
    return busy / 1e3


@dataclass(frozen=True)
class StepShape:
    """What a step of the model must move and compute.

    Attributes:
        layers, hidden, ffn, head_dim, heads, groups, words: sizes of the model; groups are K/V heads.
        rows: text and summary rows of all layers together.
        text: tokens of the step.
        pairs: visible query-key pairs of all layers together.
        parameters: all that train.
        itemsize: bytes of a parameter and of an activation.
        recomputes: the layers' forward pass runs twice.
    """

    layers: int
    hidden: int
    ffn: int
    head_dim: int
    heads: int
    groups: int
    words: int
    rows: int
    text: int
    pairs: int
    parameters: int
    itemsize: int
    recomputes: bool

    def traffic(self) -> dict[str, float]:
        """Bytes that each part must read and write, every operand once."""
        forward = 2 if self.recomputes else 1
        row = self.rows * self.hidden * self.itemsize
        wide = self.rows * self.ffn * self.itemsize
        mixed = self.rows * (self.heads + 2 * self.groups) * self.head_dim * self.itemsize
        normalised = self.rows * (self.heads + self.groups) * self.head_dim * self.itemsize
        return {
            # Input and output; in the backward pass the gradients of output, residual and input, and the input.
            "norms": 2 * row * (2 * forward + 4),
            "residual": 2 * row * 3 * forward,
            # Both halves and their product; in the backward pass both halves and all three gradients.
            "activation": wide * (3 * forward + 5),
            "rotation": mixed * (2 * forward + 2) + normalised,
            # Logits are read, and read and overwritten.
            "loss": self.text * self.words * self.itemsize * 3,
            # Token rows; in the backward pass the gradient's rows in float32 read and written.
            "embedding": self.text * self.hidden * (3 * self.itemsize + 8),
            # The norm of the gradients; gradient, parameter, two moments, and the copy.
            "optimizer": self.parameters * (4 + 16 + 12 + (self.itemsize if self.itemsize < 4 else 0)),
        }

    def attention_flops(self) -> float:
        """Two products of the forward pass and five of the backward pass."""
        forward = 2 if self.recomputes else 1
        return self.pairs * self.heads * self.head_dim * (4 * forward + 10)


def factors(operator: str, sizes: tuple) -> tuple[tuple, tuple]:
    """Sizes of the two matrices that a product multiplies; what is added to it stands before them."""
    first = 1 if operator in ("aten::addmm", "aten::baddbmm") else 0
    return sizes[first], sizes[first + 1]


def product_flops(left: tuple, right: tuple) -> float:
    """Operations of a product of [..., m, k] and [..., k, n]."""
    (*batch, m, k), n = left, right[-1]
    return 2.0 * m * k * n * (batch[0] if batch else 1)
