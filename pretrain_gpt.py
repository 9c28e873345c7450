"""Pretrain a GPT model with Kwai Summary Attention and HARPE: Megatron's trainer with this project's model."""

import sys

try:
    from megatron_ksa.platform import prepare_platform
except ModuleNotFoundError as error:
    print(
        f"error: {error.name} is not installed here: run `pip install -e '.[train]'` in the repository", file=sys.stderr
    )
    sys.exit(2)
from megatron_ksa.errors import usage_errors_exit
from megatron_ksa.failure import failures_named
from megatron_ksa.missing_ranks import RankWatch
from megatron_ksa.orphans import end_with_launcher


def main() -> None:
    """Read the command line and train; bad input costs one line and exit code 2."""
    watch = RankWatch()
    with failures_named(watch.missing), usage_errors_exit():
        end_with_launcher()
        defaults = prepare_platform(sys.argv[1:])
        # Megatron is imported only now: the CPU platform must be in place before.
        from megatron.core.enums import ModelType
        from megatron.training import pretrain

        from megatron_ksa.checkpoint.run_folder import only_writer
        from megatron_ksa.training.arguments import install_arguments
        from megatron_ksa.training.configure import configure, parse_flags, read_settings, trainer_patches
        from megatron_ksa.training.datasets import DatasetProvider
        from megatron_ksa.training.recompute_fit import Fit, out_of_memory_told
        from megatron_ksa.training.refusals import set_up_refusals
        from megatron_ksa.training.step import ForwardStep
        from megatron_ksa.upstream.patches import apply

        with install_arguments(defaults):
            args = parse_flags()
            with only_writer(args) as still_writes:
                settings = read_settings(args)
                step = ForwardStep(args, settings, watch.progress)
                patches = trainer_patches(args, settings, step.log, still_writes)
                fit = None if settings.fit.margin is None else Fit(args, settings)
                with watch.running(settings.watch.seconds), apply(patches), set_up_refusals(args, step):
                    data = DatasetProvider(args, settings.data)
                    with out_of_memory_told(args, fit):
                        pretrain(configure(args, settings, fit), data, ModelType.encoder_or_decoder, step)


if __name__ == "__main__":
    main()
