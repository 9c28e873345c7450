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


def main() -> None:
    """Read the command line and train; bad input costs one line and exit code 2."""
    with failures_named(), usage_errors_exit():
        defaults = prepare_platform(sys.argv[1:])
        # Megatron is imported only now: the CPU platform must be in place before.
        from megatron.core.enums import ModelType
        from megatron.training import pretrain

        from megatron_ksa.training.arguments import install_arguments
        from megatron_ksa.training.configure import configure, read_command_line
        from megatron_ksa.training.datasets import DatasetProvider
        from megatron_ksa.training.step import ForwardStep
        from megatron_ksa.training.step_log import install_step_log

        install_arguments(defaults)
        args, settings = read_command_line()
        forward_step = ForwardStep(args, settings)
        install_step_log(forward_step.log)
        pretrain(
            configure(args, settings),
            DatasetProvider(args, settings.data),
            ModelType.encoder_or_decoder,
            forward_step,
        )


if __name__ == "__main__":
    main()
