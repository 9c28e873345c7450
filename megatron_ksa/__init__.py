"""Long-context pretraining on Megatron-Core: Kwai Summary Attention (KSA), HARPE and TAGS.

The names below are the public surface (docs/library.md). They are imported when they are first used, because Megatron
must be imported after the CPU platform: on a machine without a GPU call `activate_cpu_platform()` before you use
another of these names or import Megatron. With a GPU it changes nothing, so that a program can always call it.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_ksa.config.harpe import HarpeConfig
    from megatron_ksa.config.ksa import KSAConfig
    from megatron_ksa.model.gpt import KSAGPTModel
    from megatron_ksa.model.layer_specs import ksa_block_spec
    from megatron_ksa.model.prepare import pipeline_rows, prepare_config
    from megatron_ksa.upstream.cpu.cpu import activate_cpu_platform

__version__ = "0.1.0"
__all__ = [
    "HarpeConfig",
    "KSAConfig",
    "KSAGPTModel",
    "activate_cpu_platform",
    "ksa_block_spec",
    "pipeline_rows",
    "prepare_config",
]

_MODULES = {
    "HarpeConfig": "config.harpe",
    "KSAConfig": "config.ksa",
    "KSAGPTModel": "model.gpt",
    "activate_cpu_platform": "upstream.cpu.cpu",
    "ksa_block_spec": "model.layer_specs",
    "pipeline_rows": "model.prepare",
    "prepare_config": "model.prepare",
}


def __getattr__(name: str) -> object:
    """A public name, from its module."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
