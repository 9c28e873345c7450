"""A check that Megatron reads a blend as it was written, with its own dataset builder."""

import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace

from megatron_ksa.data_tools.indexed import check_indexed_dataset, loss_mask_prefix, sequence_lengths
from megatron_ksa.errors import UsageError

SAMPLES = 64
SEQUENCE_LENGTH = 128


def check_blend(folder: Path, datasets: list[dict], end_of_document: int, vocab_size: int) -> None:
    """Build the blend with `BlendedMegatronDatasetBuilder` and read samples of it.

    Args:
        folder: where the datasets lie.
        datasets: "prefix", "weight", "documents" and "written_tokens" of each, as they were written.

    Raises:
        UsageError: a dataset that is not what was written, or that Megatron does not read.
    """
    for dataset in datasets:
        prefix = str(folder / dataset["prefix"])
        check_indexed_dataset(prefix)
        lengths = sequence_lengths(prefix)
        if (len(lengths), int(lengths.sum())) != (dataset["documents"], dataset["written_tokens"]):
            raise UsageError(
                f"{prefix}: read back {len(lengths)} documents, {lengths.sum()} tokens; written were others"
            )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron's word on every optional package that is absent
        from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
        from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

        from megatron_ksa.data_tools.loss_masks import ResponseLossDataset, masked_prefixes

        prefixes = [str(folder / dataset["prefix"]) for dataset in datasets]
        if Path(f"{loss_mask_prefix(prefixes[0])}.idx").exists():
            masked_prefixes(prefixes)
        with tempfile.TemporaryDirectory() as cache:
            config = GPTDatasetConfig(
                random_seed=0,
                sequence_length=SEQUENCE_LENGTH,
                blend=(prefixes, [float(dataset["weight"]) for dataset in datasets]),
                split="1,0,0",
                path_to_cache=cache,
                tokenizer=SimpleNamespace(eod=end_of_document, vocab_size=vocab_size, unique_identifiers={}),
                reset_position_ids=False,
                reset_attention_mask=False,
                eod_mask_loss=False,
                create_attention_mask=False,
            )
            train = BlendedMegatronDatasetBuilder(ResponseLossDataset, [SAMPLES, 0, 0], lambda: True, config).build()[0]
            for i in range(SAMPLES):
                sample = train[i]
                if len(sample["tokens"]) != SEQUENCE_LENGTH or not 0 <= int(sample["tokens"].max()) < vocab_size:
                    raise UsageError(f"{folder}: Megatron reads other tokens than were written")
