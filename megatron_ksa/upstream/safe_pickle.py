"""Pickled parts of a checkpoint, read without running what they name.

A pickle names the functions that rebuild its objects, and `pickle.load` calls whatever it names: a checkpoint from
elsewhere is a program. Here only what Megatron's checkpoints are made of is looked up; anything else is refused by
name.
"""

import enum
import importlib
import io
import pickle
import types
from typing import IO, Any

import torch

FLAG = "--trust-checkpoint"
# Modules -> names in them that a checkpoint's objects are rebuilt from: plain data, and the records of torch's format.
BUILTINS = frozenset({"bytearray", "complex", "frozenset", "list", "set", "slice"})
ALLOWED: dict[str, frozenset[str]] = {
    "argparse": frozenset({"Namespace"}),
    "builtins": BUILTINS,
    # Their name in pickles of protocol 2, which torch.save writes.
    "__builtin__": BUILTINS,
    "collections": frozenset({"OrderedDict"}),
    "datetime": frozenset({"timedelta"}),
    "io": frozenset({"BytesIO"}),
    "_io": frozenset({"BytesIO"}),
    "pathlib": frozenset({"PosixPath", "PurePosixPath"}),
    "signal": frozenset({"Signals"}),
    "numpy": frozenset({"dtype", "ndarray"}),
    "numpy._core.multiarray": frozenset({"_reconstruct", "scalar"}),
    "numpy.core.multiarray": frozenset({"_reconstruct", "scalar"}),
    "torch": frozenset({"Size", "device"}),
    "torch._utils": frozenset({"_rebuild_parameter", "_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3"}),
    "torch.serialization": frozenset({"_get_layout"}),
    "torch.storage": frozenset({"TypedStorage", "UntypedStorage"}),
    "torch.distributed.checkpoint.filesystem": frozenset({"_StorageInfo"}),
    "torch.distributed.checkpoint.metadata": frozenset(
        {"BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
         "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"}
    ),
    "torch.distributed.checkpoint.planner": frozenset({"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"}),
    "megatron.core.rerun_state_machine": frozenset({"RerunDiagnostic", "RerunMode", "RerunState"}),
}  # fmt: skip
# Megatron's arguments hold enumerations of many of its modules.
ENUMERATIONS = ("megatron.core", "megatron.training")


# What Transformer Engine pickles into the extra state of its layers, beside plain data and tensors.
EXTRA_STATE: dict[str, frozenset[str]] = {
    "transformer_engine.common.recipe": frozenset(
        {"DelayedScaling", "Float8BlockScaling", "Float8CurrentScaling", "Format", "MMParams", "MXFP8BlockScaling",
         "NVFP4BlockScaling", "QParams", "_FormatHelper"}
    ),
    "megatron.core.extensions.transformer_engine": frozenset({"TEDelayedScaling"}),
}  # fmt: skip

NESTED = {("torch.storage", "_load_from_bytes"), ("megatron.core.safe_globals", "safe_load_from_bytes")}


class UnsafePickle(pickle.UnpicklingError):
    """A pickle names something that a checkpoint is not made of."""


def _latin1(text: str, encoding: str) -> bytes:
    """How old pickle protocols spell bytes."""
    if encoding != "latin1":
        raise UnsafePickle(f"bytes encoded as {encoding!r}")
    return text.encode(encoding)


def _find(module: str, name: str) -> Any:
    if (module, name) == ("_codecs", "encode"):
        return _latin1
    if name in ALLOWED.get(module, ()):
        return getattr(importlib.import_module(module.replace("__builtin__", "builtins")), name)
    if module == "torch" and name.isidentifier():
        found = getattr(torch, name, None)
        if isinstance(found, torch.dtype) or (isinstance(found, type) and name.endswith("Storage")):
            return found
    if module.startswith(ENUMERATIONS) and name.isidentifier():
        found = getattr(importlib.import_module(module), name, None)
        if isinstance(found, type) and issubclass(found, enum.Enum):
            return found
    raise UnsafePickle(f"an object of {module}.{name}")


class Unpickler(pickle.Unpickler):
    """`pickle.Unpickler` that finds nothing but data."""

    def find_class(self, module: str, name: str) -> Any:
        """What a checkpoint is made of.

        Raises:
            UnsafePickle: anything else.
        """
        try:
            return _find(module, name)
        except (ImportError, AttributeError):
            raise UnsafePickle(f"an object of {module}.{name}, which does not exist here") from None

    def get_extension(self, code: int) -> Any:
        """Classes by number, from a registry of the process.

        Raises:
            UnsafePickle: always.
        """
        raise UnsafePickle(f"an object by its number {code}")


class ExtraStateUnpickler(Unpickler):
    """`Unpickler` that also finds what Transformer Engine keeps in its layers' extra state."""

    def find_class(self, module: str, name: str) -> Any:
        """What such a state is made of.

        Raises:
            UnsafePickle: anything else.
        """
        if (module, name) in NESTED:
            # torch's own trusts the pickle within; Megatron puts another in its place.
            return lambda content: torch_load(io.BytesIO(content))
        if name in EXTRA_STATE.get(module, ()):
            return getattr(importlib.import_module(module), name)
        return super().find_class(module, name)


def check_extra_state(state: object) -> None:
    """Read the extra state of a layer as Transformer Engine will, but with classes looked up here.

    Args:
        state: a uint8 tensor or bytes with a pickle, or an `io.BytesIO` with what torch.save wrote; a list of these, as
            Megatron stores them; others hold none.

    Raises:
        UnsafePickle: it names something that such a state is not made of.
    """
    if isinstance(state, list | tuple):
        for part in state:
            check_extra_state(part)
        return
    if isinstance(state, io.BytesIO):
        torch_load(io.BytesIO(state.getvalue()))
        return
    if isinstance(state, torch.Tensor):
        state = state.detach().cpu().numpy().tobytes() if state.dtype == torch.uint8 else b""
    if isinstance(state, bytes | bytearray) and state:
        ExtraStateUnpickler(io.BytesIO(state)).load()


def load(file: IO[bytes], **options: Any) -> Any:
    """`pickle.load`.

    Raises:
        UnsafePickle: something that a checkpoint is not made of.
        pickle.UnpicklingError, EOFError, ValueError: bytes that are no pickle.
    """
    return Unpickler(file, **options).load()


# What torch.load takes as its pickle_module.
_MODULE = types.ModuleType("safe_pickle")
_MODULE.Unpickler, _MODULE.load = Unpickler, load


def torch_load(value: io.BytesIO) -> Any:
    """`torch.load` of one object, tensors on the CPU.

    Raises:
        UnsafePickle: something that a checkpoint is not made of.
    """
    return torch.load(value, map_location="cpu", weights_only=False, pickle_module=_MODULE)
