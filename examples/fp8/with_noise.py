"""`pretrain_gpt.py` whose initial weights have noise as large as FP8's rounding: `with_noise.py SEED FLAGS...`.

Two runs with noise of other seeds begin equally well and drift apart by chance, which is what a recipe's deviation is
to be compared with.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import pretrain_gpt  # noqa: E402
from megatron_ksa.platform import prepare_platform  # noqa: E402

# E4M3 keeps 3 bits behind the leading one: rounding moves a number by up to 2^-4 of itself.
NOISE = 2**-4


def add_noise(stages: list, seed: int) -> list:
    """The model's stages, each weight of a matrix multiplied by 1 + u, u uniform within NOISE of zero."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (parameter for stage in stages for parameter in stage.parameters()):
            if parameter.dim() > 1:
                change = NOISE * (2 * torch.rand(parameter.shape, generator=generator) - 1)
                parameter.copy_(parameter.float() * (1 + change).to(parameter.device))
    return stages


def main() -> None:
    """Train, with noise."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("seed", type=int, help="of the noise")
    options, flags = parser.parse_known_args()
    sys.argv = [sys.argv[0], *flags]
    prepare_platform(flags)
    from megatron_ksa.upstream.patches import Patch, apply

    hooks = Patch(
        "megatron_ksa.training.configure:model_hooks",
        lambda original: lambda args: [*original(args), lambda stages: add_noise(stages, options.seed)],
        why="weights get noise before the optimizer copies them",
        expects="(args)",
    )
    with apply([hooks]):
        pretrain_gpt.main()


if __name__ == "__main__":
    main()
