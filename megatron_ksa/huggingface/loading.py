"""A Hugging Face folder as a model that generates, in this process."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from megatron_ksa.errors import UsageError
from megatron_ksa.files import read_json
from megatron_ksa.huggingface.config_json import OWN_MODEL_TYPE
from megatron_ksa.huggingface.modeling.configuration_megatron_ksa import MegatronKSAConfig
from megatron_ksa.huggingface.modeling.modeling_megatron_ksa import MegatronKSAForCausalLM


def load_for_generation(folder: Path, dtype: str | None = None, *, trust_code: bool = False) -> PreTrainedModel:
    """A causal language model in eval mode, on the GPU where there is one.

    Args:
        folder: with config.json; models that this project exported need no code of the folder's.
        dtype: of the weights, such as "bfloat16"; by default bfloat16 on a GPU, float32 elsewhere.
        trust_code: run modelling code that the folder brings.

    Raises:
        UsageError: a model that the transformers library does not have, cannot read, or would read as another.
    """
    config = read_json(folder / "config.json")
    own = config.get("model_type") == OWN_MODEL_TYPE
    if config.get("use_summary_attention") and not own and not (trust_code and "auto_map" in config):
        raise UsageError(
            f"{folder}: the transformers library would leave out this model's summaries: import it with "
            "tools/convert_checkpoint.py and evaluate that checkpoint"
        )
    AutoConfig.register(OWN_MODEL_TYPE, MegatronKSAConfig, exist_ok=True)
    AutoModelForCausalLM.register(MegatronKSAConfig, MegatronKSAForCausalLM, exist_ok=True)
    cuda = torch.cuda.is_available()
    settings = {"dtype": getattr(torch, dtype or ("bfloat16" if cuda else "float32")), "local_files_only": True}
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust_code and not own, **settings)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        hint = "" if trust_code or "auto_map" not in config else " (--trust-checkpoint runs the folder's own code)"
        raise UsageError(f"{folder} cannot be loaded: {str(error)[:300]}{hint}") from None
    return model.to("cuda" if cuda else "cpu").eval()
