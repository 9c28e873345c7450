"""What a benchmark is: an op, a shape, and a case that the op prepares for the shape."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from megatron_ksa.kernels.ksa_attention.geometry import KSAGeometry

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward_backward"


@dataclass(frozen=True)
class Shape:
    """Sizes of one measurement: n text tokens, query and K/V heads, and KSA's three numbers (S = 0: no summaries)."""

    n: int
    heads: int = 32
    groups: int = 32
    head_dim: int = 128
    batch: int = 1
    chunk_size: int = 8
    summary_tokens: int = 1
    window_chunks: int = 128
    dtype: str = "bfloat16"

    @property
    def geometry(self) -> KSAGeometry:
        return KSAGeometry(self.chunk_size, self.summary_tokens, self.window_chunks)

    @property
    def summary_rows(self) -> int:
        return self.n // self.chunk_size * self.summary_tokens

    @property
    def rows(self) -> int:
        """Text and summary rows."""
        return self.n + self.summary_rows

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def random(self, rows: int, heads: int, device: str) -> Tensor:
        """A leaf [batch, rows, heads, head_dim]."""
        values = torch.randn(self.batch, rows, heads, self.head_dim, device=device)
        return values.to(self.torch_dtype).requires_grad_()

    def __str__(self) -> str:
        return f"n{self.n} h{self.heads}/{self.groups}"

    def as_json(self) -> dict:
        return asdict(self)


@dataclass
class Case:
    """An op with its inputs.

    Attributes:
        leaves: inputs that get gradients.
        run: leaves -> outputs, as a tuple.
        expected: the same from float64 leaves, by the definition of the op; None where another op's check covers it.
        names: of the outputs and then of the gradients, for the check's report.
        modes: what is timed: some of forward, backward, forward_backward, made from `run`; or calls by name.
        flops, moved_bytes: work of each mode, for rates in the report.
        needed_bytes: what forward + backward must allocate: outputs, gradients, statistics of a row.
        facts: what else the record should say.
    """

    leaves: list[Tensor]
    run: Callable[..., tuple[Tensor, ...]]
    expected: Callable[..., tuple[Tensor, ...]] | None = None
    names: tuple[str, ...] = ()
    modes: tuple[str, ...] | dict[str, Callable[[], object]] = (FORWARD, BOTH)
    flops: dict[str, float] = field(default_factory=dict)
    moved_bytes: dict[str, float] = field(default_factory=dict)
    needed_bytes: int | None = None
    facts: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Op:
    """A registered op.

    Attributes:
        prepare: the case of a shape on a device.
        check_shapes: device -> shapes at which the case is compared with `Case.expected` before anything is timed.
        features: device -> errors and limits of further cases, by case and entry.
        checked_by: name of the op whose check stands for this one.
        poisoned: uninitialised memory is NaN during the check; off for other libraries' ops.
        missing: (shape, device) -> why the op cannot run there (a package that is not installed), or None.
    """

    name: str
    what: str
    prepare: Callable[[Shape, str], Case]
    check_shapes: Callable[[str], list[Shape]] = lambda device: []
    features: Callable[[str], dict[str, dict[str, tuple[float, float]]]] | None = None
    checked_by: str | None = None
    poisoned: bool = True
    missing: Callable[[Shape, str], str | None] = lambda shape, device: None


def small_shapes(device: str, *heads: tuple[int, int]) -> list[Shape]:
    """Shapes for checks: the real tiles with a ragged tail on a GPU, tiny float32 ones for the interpreter."""
    if device == "cpu":
        return [Shape(45, *pair, head_dim=16, chunk_size=4, window_chunks=3, dtype="float32") for pair in heads]
    return [Shape(2051, *pair) for pair in heads]
