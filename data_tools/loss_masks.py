"""Loss on responses only: a GPT dataset with a companion that tells, token by token, what counts in the loss.

The companion of PREFIX is the indexed dataset PREFIX_loss_mask with documents of the same lengths, uint8, 1 where the
token counts as a label. Megatron reads PREFIX alone as it reads any dataset.
"""

import copy
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.datasets.indexed_dataset import IndexedDataset
from torch import Tensor

from megatron_ksa.data_tools.indexed import check_indexed_dataset, loss_mask_prefix, sequence_lengths
from megatron_ksa.errors import UsageError


def masked_prefixes(prefixes: list[str]) -> list[str]:
    """The datasets that have a loss mask, after a check that every mask fits its dataset.

    Raises:
        UsageError: no dataset has a mask, or a mask is truncated or has other lengths than its dataset.
    """
    found = [prefix for prefix in prefixes if Path(f"{loss_mask_prefix(prefix)}.idx").is_file()]
    if not found:
        raise UsageError(
            "--response-loss-only: no dataset has a loss mask (PREFIX_loss_mask.idx); "
            "tools/preprocess_tags.py writes them with --loss-on responses"
        )
    for prefix in found:
        mask = loss_mask_prefix(prefix)
        check_indexed_dataset(mask)
        if not np.array_equal(sequence_lengths(mask), sequence_lengths(prefix)):
            raise UsageError(
                f"--response-loss-only: {mask} was not written with {prefix}: their documents differ in length"
            )
    return found


class ResponseLossDataset(GPTDataset):
    """A GPT dataset whose loss mask is that of its companion, where it has one."""

    def __init__(self, indexed_dataset: IndexedDataset, dataset_path: str, *args: object) -> None:
        super().__init__(indexed_dataset, dataset_path, *args)
        self._masks: ResponseLossDataset | None = None
        if Path(f"{loss_mask_prefix(dataset_path)}.idx").is_file():
            # The same samples, cut from the masks instead of the tokens.
            self._masks = copy.copy(self)
            self._masks.dataset = IndexedDataset(loss_mask_prefix(dataset_path), mmap=self.config.mmap_bin_files)

    def __getitem__(self, index: int | None) -> dict[str, Tensor]:
        """Megatron's sample; loss_mask, float32 [n], is 0 where the label, the token after, does not count."""
        sample = super().__getitem__(index)
        if index is None or self._masks is None:
            return sample
        counts = torch.from_numpy(self._masks._query_document_sample_shuffle_indices(index)[0]) == 1
        counts = counts[1:] if self.config.add_extra_token_to_sequence else torch.roll(counts, -1)
        # Megatron may keep the mask it returned for the next sample, so it is not changed in place.
        return {**sample, "loss_mask": sample["loss_mask"] * counts[: len(sample["loss_mask"])]}
