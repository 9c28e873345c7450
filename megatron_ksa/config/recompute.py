"""What of a layer's forward pass is computed again in the backward pass, in place of being kept."""

import argparse
from dataclasses import dataclass

from megatron_ksa.errors import UsageError

# More layers than any model has.
EVERY = 2**31 - 1
# Modules of Megatron's `--recompute-modules` that a dense layer of this project has.
MODULES = ("core_attn", "layernorm", "mlp")
# What this project computes again by one kernel each, without products: outputs of the norms before attention and MLP,
# normalised and rotated heads, the MLP's activation.
CHEAP = ("norms", "heads", "activation")


@dataclass(frozen=True)
class Recompute:
    """What every model chunk of a pipeline stage computes again.

    Attributes:
        whole: the first layers that keep their input alone (Megatron's granularity `full`); EVERY for all of them.
        unit: successive whole layers that keep one input together: 1 with the method `block`, `--recompute-num-layers`
            with the method `uniform`.
        modules: what each of the other layers computes again, of MODULES (Megatron's granularity `selective`).
        cheap: what each of the other layers computes again, of CHEAP.
    """

    whole: int = 0
    unit: int = 1
    modules: tuple[str, ...] = ()
    cheap: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.whole < 0 or self.unit < 1:
            raise ValueError(f"{self.whole} recomputed layers in units of {self.unit}: 0 layers or more, units of 1")
        unknown = [module for module in self.modules if module not in MODULES]
        if unknown:
            raise UsageError(f"--recompute-modules {unknown[0]}: this model's layers have {', '.join(MODULES)}")

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> "Recompute":
        """What Megatron's flags say, after its validation."""
        if args.recompute_granularity is None:
            return NONE
        if args.recompute_granularity == "selective":
            return cls(modules=tuple(args.recompute_modules or ("core_attn",)))
        if args.recompute_method == "block":
            return cls(whole=args.recompute_num_layers)
        return cls(whole=EVERY, unit=args.recompute_num_layers or 1)

    def chunk(self, layers: int) -> int:
        """Whole layers of a model chunk that has so many layers."""
        return min(self.whole, layers)

    def settings(self) -> dict[str, object]:
        """Fields of Megatron's `TransformerConfig`, and destinations of its flags, that mean this."""
        method = None if not self.whole else "uniform" if self.whole == EVERY else "block"
        return {
            "recompute_granularity": "full" if self.whole else "selective" if self.modules else None,
            "recompute_method": method,
            "recompute_num_layers": None if not self.whole else self.unit if self.whole == EVERY else self.whole,
            "recompute_modules": list(self.modules) if self.modules and not self.whole else None,
        }

    def flags(self) -> str:
        """Megatron's flags that mean this; empty where nothing is recomputed."""
        words = []
        for name, value in self.settings().items():
            if value is not None:
                values = value if isinstance(value, list) else [value]
                words.append(" ".join(map(str, (f"--{name.replace('_', '-')}", *values))))
        return " ".join(words)

    def __str__(self) -> str:
        if self.whole == EVERY:
            return "every layer" if self.unit == 1 else f"every layer, in units of {self.unit}"
        first = "the first layer" if self.whole == 1 else f"the first {self.whole} layers"
        parts = [first] if self.whole else []
        modules = ", ".join((*self.modules, *self.cheap))
        parts += [modules + (" of the other layers" if self.whole else "")] if modules else []
        return " and ".join(parts) or "nothing"


NONE, FULL = Recompute(), Recompute(whole=EVERY)
