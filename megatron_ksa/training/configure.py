"""Command line to configuration: everything that happens before Megatron's `pretrain` takes over."""

import argparse
import contextlib
import io

from megatron.training import checkpointing
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args, parse_args
from megatron.training.config import PretrainConfigContainer

from megatron_ksa.checkpoint.dense import install_dense_start
from megatron_ksa.checkpoint.helpers import install_save_helpers
from megatron_ksa.checkpoint.identity import check_finetune, install_identity_check
from megatron_ksa.checkpoint.stored_args import install_checkpoint_args
from megatron_ksa.checkpoint.tracker import install_tracker_replacement
from megatron_ksa.config.settings import RunSettings
from megatron_ksa.cost.run_report import run_report
from megatron_ksa.data_tools.indexed import check_indexed_dataset
from megatron_ksa.data_tools.loss_masks import masked_prefixes
from megatron_ksa.kernels.dispatch import force_reference
from megatron_ksa.model.builder import dense_config_from_args, model_config_from_args
from megatron_ksa.training.arguments import adapt_trainer, settings_from_args
from megatron_ksa.training.datasets import dataset_prefixes
from megatron_ksa.training.stages import resolve_start
from megatron_ksa.upstream.flops import install_flops


def read_command_line() -> tuple[argparse.Namespace, RunSettings]:
    """Parse and check the flags, this project's first, so that a mistake costs one line and touches nothing.

    Raises:
        UsageError: a mistake in the flags, or data files that are missing or truncated.
    """
    install_checkpoint_args()
    parsed = parse_args()
    if parsed.use_checkpoint_args and parsed.load:
        with contextlib.redirect_stdout(io.StringIO()):
            checkpointing.load_args_from_checkpoint(parsed)
    settings = settings_from_args(parsed)
    check_finetune(parsed, settings)
    settings = resolve_start(parsed, settings)
    prefixes = dataset_prefixes(parsed)
    for prefix in prefixes:
        check_indexed_dataset(prefix)
    if settings.data.response_loss_only:
        masked_prefixes(prefixes)
    args = parse_and_validate_args()
    adapt_trainer(args, settings)
    return args, settings


def configure(args: argparse.Namespace, settings: RunSettings) -> PretrainConfigContainer:
    """Megatron's configuration with this project's model; Megatron's own model where KSA and HARPE are off."""
    force_reference(settings.kernels.reference)
    install_identity_check(settings)
    install_dense_start(args, settings)
    install_save_helpers(args)
    install_tracker_replacement()
    if settings.is_megatron:
        return pretrain_cfg_container_from_args(args, dense_config_from_args(args))
    model = model_config_from_args(args, settings.ksa, settings.bases)
    model.reset_documents = args.reset_position_ids
    model.train, model.distill = settings.train, settings.distill
    install_flops(settings)
    if args.rank == 0:
        print(run_report(args, settings), flush=True)
    return pretrain_cfg_container_from_args(args, model)
