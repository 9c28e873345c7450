"""What `config.json` says about rotary positions, in the layouts of the transformers library and of this project."""

from megatron_ksa.huggingface.architecture import Architecture
from megatron_ksa.huggingface.fields import Fields, is_number

# The base of the transformers library where no key names one.
DEFAULT_BASE = 10000.0
# Where the settings stand before version 5 of the transformers library and since.
LAYOUTS = ("rope_scaling", "rope_parameters")
# Llama 3's frequency scaling; Megatron takes the factor from its flags and has the others as constants.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def read_rotary(config: Fields) -> dict[str, object]:
    """Rotary settings of an `Architecture`, as the transformers library writes them since version 5 and before.

    Where both layouts stand in a file that library takes `rope_scaling` alone, and a base inside it before the one
    outside (`convert_rope_params_to_dict`). A null there is a base of null, which fails: it is refused.

    Raises:
        UsageError: a kind of scaling, or a value, that the model here does not have.
    """
    for key in LAYOUTS:
        if not isinstance(config.get(key, None), dict | None):
            raise config.refused(key, "an object is needed")
    where = next((key for key in LAYOUTS if config.get(key, None)), "rope_parameters")
    given = config.get(where, None) or {}
    scaling = Fields(given, config.path, where)
    for key in (key for key, value in given.items() if isinstance(value, dict)):
        raise scaling.refused(key, "settings of single layers are not supported")
    base = (scaling if "rope_theta" in given else config).whole("rope_theta", DEFAULT_BASE, " (--rotary-base)")
    if scaling.get("partial_rotary_factor", 1.0) != 1.0:
        raise scaling.refused("partial_rotary_factor", "only 1 is supported")
    rotary: dict[str, object] = {"rotary_base": base}
    key = "rope_type" if "rope_type" in given else "type"
    kind = scaling.get(key, "default")
    if kind == "llama3":
        for name, known in LLAMA3.items():
            # Some files repeat the trained length outside.
            for fields in (scaling, *([config] if name in config.values else [])):
                if fields.get(name) != known:
                    raise fields.refused(name, f"only {known} is supported")
        return rotary | {"rope_scaling_factor": float(scaling.number("factor"))}
    if kind == "linear":
        return rotary | {"interpolation": scaling.whole("factor")}
    if kind != "default":
        raise scaling.refused(key, "only default, linear and llama3 are supported")
    return rotary


def read_own_rotary(config: Fields, groups: int) -> dict[str, object]:
    """Rotary settings of this project's own configuration.

    Args:
        groups: number of KV groups.

    Raises:
        UsageError: a missing key or a wrong value.
    """
    bases, percent = config.get("rotary_bases"), config.number("rotary_percent")
    if bases is not None and (
        not isinstance(bases, list) or len(bases) != groups or not all(is_number(base) and base > 0 for base in bases)
    ):
        raise config.refused("rotary_bases", f"null or {groups} numbers above 0 are needed, one for each KV group")
    if percent > 1:
        raise config.refused("rotary_percent", "at most 1 is possible")
    scaled, divided = (config.get(key) for key in ("rotary_llama3_factor", "rotary_interpolation"))
    return {
        "rotary_base": config.whole("rotary_base"),
        "rotary_percent": percent,
        "rotary_interleaved": config.flag("rotary_interleaved"),
        "rope_scaling_factor": None if scaled is None else config.number("rotary_llama3_factor"),
        "interpolation": None if divided is None else config.whole("rotary_interpolation"),
        "bases": None if bases is None else tuple(bases),
    }


def rotary_settings(arch: Architecture) -> dict[str, object]:
    """The keys that `read_rotary` reads, in the layout before version 5, which every version reads."""
    scaling = None
    if arch.rope_scaling_factor is not None:
        scaling = {"rope_type": "llama3", "factor": arch.rope_scaling_factor, **LLAMA3}
    elif arch.interpolation is not None:
        scaling = {"rope_type": "linear", "factor": float(arch.interpolation)}
    return {"rope_theta": float(arch.rotary_base), "rope_scaling": scaling}
