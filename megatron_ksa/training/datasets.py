"""Megatron's GPT datasets from the command line."""

import argparse
import json
from pathlib import Path

from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training.datasets.fim_dataset import GPTFIMDataset, GPTFIMDatasetConfig
from megatron.training.utils import is_first_or_last_pipeline_stage

from megatron_ksa.config.data import DataConfig
from megatron_ksa.data_tools.loss_masks import ResponseLossDataset
from megatron_ksa.errors import UsageError
from megatron_ksa.files import LIST_BYTES, read_small
from megatron_ksa.training.blend import blends_from_args
from megatron_ksa.training.refusals import megatron_refusals


def dataset_config(args: argparse.Namespace) -> GPTDatasetConfig:
    """Megatron's dataset configuration for its data flags."""
    blend, blend_per_split = blends_from_args(args)
    kind, more = GPTDatasetConfig, {}
    if args.fim_data:
        kind, more = GPTFIMDatasetConfig, fim_settings(args)
    return kind(
        **more,
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        context_parallel_size=args.context_parallel_size,
        data_parallel_size=args.data_parallel_size,
        sequence_parallel_size=args.tensor_model_parallel_size * args.sequence_parallel,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        sequences_per_dataset=_sequences_per_dataset(args.per_dataset_sequences_path),
    )


def _sequences_per_dataset(path: str | None) -> dict | None:
    """`--per-dataset-sequences-path`: the numbers of sequences and documents of each dataset.

    Raises:
        UsageError: a file that cannot be read.
    """
    if path is None:
        return None
    try:
        return json.loads(read_small(Path(path), limit=LIST_BYTES))
    except (UsageError, ValueError, RecursionError) as error:
        raise UsageError(f"--per-dataset-sequences-path {path}: {error}") from None


def fim_settings(args: argparse.Namespace) -> dict[str, object]:
    """`--fim-data`: fields of Megatron's configuration of fill-in-the-middle samples."""
    tokens = {part: getattr(args, f"fim_{part}_token") for part in ("prefix", "middle", "suffix", "pad", "eod")}
    names = ("fim_rate", "fim_spm_rate", "fim_split_sample", "fim_fragment_rate", "fim_no_prefix")
    return {"fim_extra_tokens": tokens, **{name: getattr(args, name) for name in names}}


def dataset_class(args: argparse.Namespace, data: DataConfig) -> type[GPTDataset]:
    """The kind of dataset that the data flags ask for."""
    if args.mock_data:
        return MockGPTDataset
    if args.fim_data:
        return GPTFIMDataset
    return ResponseLossDataset if data.response_loss_only else GPTDataset


class DatasetProvider:
    """Builds the train, validation and test datasets on the ranks that read them; called by `pretrain`."""

    is_distributed = True

    def __init__(self, args: argparse.Namespace, data: DataConfig) -> None:
        self.args, self.data = args, data

    def _reads_data(self, vp_stage: int | None = None) -> bool:
        stage = self.args.reset_position_ids or is_first_or_last_pipeline_stage(vp_stage)
        return stage and parallel_state.get_tensor_model_parallel_rank() == 0

    def __call__(self, num_samples: list[int | None], vp_stage: int | None = None) -> tuple:
        """Datasets with the given numbers of train, validation and test samples.

        Raises:
            UsageError: what Megatron does not accept of the data flags or files.
        """
        with megatron_refusals(self.args):
            builder = BlendedMegatronDatasetBuilder(
                dataset_class(self.args, self.data),
                num_samples,
                lambda: self._reads_data(vp_stage),
                dataset_config(self.args),
            )
            return builder.build()
