"""Builds `KSAGPTModel` from Megatron's model configuration."""

import argparse
from dataclasses import dataclass, field
from typing import ClassVar, override

from megatron.core.pipeline_parallel.utils import (
    is_pp_first_stage,
    is_pp_last_stage,
    is_vp_first_stage,
    is_vp_last_stage,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig
from megatron.training.vocab_utils import calculate_padded_vocab_size

from megatron_ksa.config.distill import DistillConfig
from megatron_ksa.config.ksa import KSAConfig
from megatron_ksa.model.gpt import KSAGPTModel
from megatron_ksa.model.summary_parameters import freeze_shared_parameters


@dataclass(kw_only=True)
class KSAGPTModelConfig(GPTModelConfig):
    """Megatron's GPT configuration with KSA and HARPE settings.

    Attributes:
        ksa: KSA settings; with `ksa.enabled` off every layer is full attention without summary rows.
        bases: HARPE bases, one for each KV group, or None for the single `rotary_base`.
        text_length: n, text tokens in a sequence.
        reset_documents: documents of a sequence do not see each other.
        train: which parameters train, `summary` or `all`.
        distill: distillation's settings where the model is its own teacher.
    """

    builder: ClassVar[str] = "megatron_ksa.model.builder.KSAGPTModelBuilder"
    ksa: KSAConfig = field(default_factory=KSAConfig)
    bases: tuple[float, ...] | None = None
    text_length: int = 0
    reset_documents: bool = False
    train: str = "all"
    distill: DistillConfig = field(default_factory=DistillConfig)


def dense_config_from_args(args: argparse.Namespace, config: type[GPTModelConfig] = GPTModelConfig) -> GPTModelConfig:
    """Megatron's `gpt_config_from_args` with `--rope-scaling-factor`, which Megatron 0.19.2 leaves at its default."""
    model = gpt_config_from_args(args, model_config_cls=config)
    model.rope_scaling_factor = args.rope_scaling_factor
    return model


def model_config_from_args(
    args: argparse.Namespace, ksa: KSAConfig, bases: tuple[float, ...] | None
) -> KSAGPTModelConfig:
    """The configuration of this project's model from Megatron's arguments and its own settings."""
    model = dense_config_from_args(args, KSAGPTModelConfig)
    model.ksa, model.bases, model.text_length = ksa, bases, args.seq_length
    return model


class KSAGPTModelBuilder(GPTModelBuilder):
    """Megatron's builder, for `KSAGPTModel`."""

    @override
    def build_model(
        self,
        pg_collection: ProcessGroupCollection,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> KSAGPTModel:
        """One pipeline stage; arguments as in Megatron's `GPTModelBuilder.build_model`."""
        config = self._model_config
        transformer = config.transformer
        virtual = transformer.virtual_pipeline_model_parallel_size
        if pre_process is None:
            pre_process = is_vp_first_stage(vp_stage=vp_stage, vp_size=virtual) and is_pp_first_stage(pg_collection.pp)
        if post_process is None:
            post_process = is_vp_last_stage(vp_stage=vp_stage, vp_size=virtual) and is_pp_last_stage(pg_collection.pp)
        vocab_size = config.vocab_size
        if config.should_pad_vocab:
            vocab_size = calculate_padded_vocab_size(
                vocab_size, config.make_vocab_size_divisible_by, transformer.tensor_model_parallel_size
            )
        model = KSAGPTModel(
            transformer,
            config.ksa,
            config.text_length,
            vocab_size=vocab_size,
            bases=config.bases,
            max_sequence_length=config.seq_length,
            position_embedding_type=config.position_embedding_type,
            rotary_percent=config.rotary_percent,
            rotary_base=config.rotary_base,
            rope_scaling=config.rope_scaling,
            rope_scaling_factor=config.rope_scaling_factor,
            seq_len_interpolation_factor=config.seq_len_interpolation_factor,
            reset_documents=config.reset_documents,
            fp16_lm_cross_entropy=config.fp16_lm_cross_entropy,
            parallel_output=config.parallel_output,
            share_embeddings_and_output_weights=config.share_embeddings_and_output_weights,
            scatter_embedding_sequence_parallel=config.scatter_embedding_sequence_parallel,
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
        )
        if config.train == "summary":
            freeze_shared_parameters(model)
        if config.distill.enabled:
            model.distill(config.distill, config.ksa.num_summarised(transformer.num_layers))
        return model
