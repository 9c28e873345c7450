"""This project's own flags, fuzzed with values of every type and size: settings come out, or one line."""

import argparse
import contextlib
import copy
import io
import sys
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from megatron.training import arguments as megatron_arguments

from megatron_ksa.config.checkpoint import CheckpointConfig
from megatron_ksa.config.data import DataConfig
from megatron_ksa.config.distill import DistillConfig
from megatron_ksa.config.fit import FitConfig
from megatron_ksa.config.harpe import HarpeConfig
from megatron_ksa.config.kernels import KernelConfig
from megatron_ksa.config.ksa import KSAConfig
from megatron_ksa.config.loss import LossConfig
from megatron_ksa.config.options import add_config_arguments, config_from_args
from megatron_ksa.config.settings import RunSettings
from megatron_ksa.config.stage import StageConfig
from megatron_ksa.config.watch import WatchConfig
from megatron_ksa.data_tools.tags.pipeline import COMMANDS
from megatron_ksa.errors import UsageError
from megatron_ksa.platform import trainer_defaults
from megatron_ksa.training.arguments import install_arguments, settings_from_args
from megatron_ksa.training.flag_rules import check_run
from megatron_ksa.training.given import record_given

BASE = (
    "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --group-query-attention --num-query-groups 2 "
    "--seq-length 64 --max-position-embeddings 64 --micro-batch-size 1 --global-batch-size 4"
).split()
CONFIGS = {
    KSAConfig: "ksa", StageConfig: "ksa", DistillConfig: "ksa-distill", HarpeConfig: "harpe", DataConfig: "data",
    KernelConfig: "kernels", LossConfig: "loss", CheckpointConfig: "checkpoint", WatchConfig: "watch",
    FitConfig: "recompute",
}  # fmt: skip
# Flags of Megatron that this project's checks calculate with.
SIZES = (
    "--num-layers", "--hidden-size", "--num-attention-heads", "--num-query-groups", "--seq-length",
    "--max-position-embeddings", "--micro-batch-size", "--global-batch-size", "--tensor-model-parallel-size",
    "--context-parallel-size", "--pipeline-model-parallel-size", "--ffn-hidden-size", "--num-experts", "--kv-channels",
    "--expert-model-parallel-size", "--save-interval",
)  # fmt: skip
POSITIONS = ("rope", "harpe", "none", "learned_absolute")
NUMBERS = (
    "0", "1", "2", "3", "4", "8", "64", "-1", "-0", "127", "65536", "2147483647", "2147483648", "4294967296",
    "9223372036854775807", "9223372036854775808", "1" + "0" * 30, "9" * 400, "1e3", "1e18", "1e999", "-1e999", "1e-320",
    "0.5", "1.5", "nan", "inf", "-inf", "0x10", "1_000", "٣", "", " ", "None", "True", "k", "128",
)  # fmt: skip
TEXTS = (
    "2 2 2 2", "k k k f", "128 128 128 1024", "kklf", "kkkk", "w", "wwff", "[1]*4", "([128]*3+[1024])", "(" * 200,
    "k*65537", "1*65536*65536", "1,2", "1e4,2e4", "nan,1", "llama2-7b-128k", "/dev/zero", "/dev/null", "/", "../x",
    "\0", "x" * 100_000, "{}", "[]", "summary", "all", "ascending", "𝟘", "'; rm -rf /", "%s%n",
)  # fmt: skip
VALUES = st.one_of(
    st.sampled_from(NUMBERS), st.sampled_from(TEXTS), st.integers().map(str), st.floats().map(str), st.text(max_size=8)
)
# A line that nobody would read to its end is none.
LONGEST = 1000


class Parser(argparse.ArgumentParser):
    """A parser whose refusal is its line, as argparse prints it after the usage."""

    def error(self, message: str):
        raise UsageError(message[:LONGEST])


def said_in_one_line(run) -> object:
    """What `run` returns, or None where it ends in one line; anything else fails the test, hours of work too."""
    start, printed = time.process_time(), io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            return run()
    except UsageError as error:
        assert str(error).strip() and len(str(error)) <= LONGEST, str(error)[:300]
        return None
    finally:
        assert time.process_time() - start < 2


@pytest.fixture(scope="module")
def base():
    """The arguments of a model that works, and a parser of the flags that are fuzzed."""
    with pytest.MonkeyPatch.context() as patch, install_arguments(trainer_defaults()):
        patch.setenv("WORLD_SIZE", "1")
        patch.setattr(sys, "argv", ["pretrain_gpt.py", *BASE])
        args = megatron_arguments.parse_args()
    parser = Parser(add_help=False, allow_abbrev=False)
    for config, prefix in CONFIGS.items():
        add_config_arguments(parser, config, prefix, prefix)
    for flag in SIZES:
        parser.add_argument(flag, type=int, default=argparse.SUPPRESS)
    parser.add_argument("--split", default=argparse.SUPPRESS)
    parser.add_argument("--position-embedding-type", choices=POSITIONS, default="rope")
    record_given(parser)
    return args, parser


def flags_of(config: type, prefix: str) -> list[argparse.Action]:
    """The arguments of one config class."""
    parser = Parser(add_help=False)
    add_config_arguments(parser, config, prefix, prefix)
    return parser._actions


def words(action: argparse.Action, value: str) -> list[str]:
    """An argument on the command line; a switch is the one that its value's length chooses."""
    if action.nargs == 0:
        return [action.option_strings[len(value) % len(action.option_strings)]]
    # Joined, so that a value may begin with a dash.
    return [f"{action.option_strings[0]}={value}"] if action.nargs is None else [action.option_strings[0], value]


OWN = [action for config, prefix in CONFIGS.items() for action in flags_of(config, prefix)]
MEGATRON = [argparse.Action([flag], flag) for flag in (*SIZES, "--split")]
COMMAND_LINES = st.tuples(
    st.sampled_from(POSITIONS),
    st.booleans(),
    st.lists(st.tuples(st.sampled_from(OWN), VALUES), max_size=4),
    st.lists(st.tuples(st.sampled_from(MEGATRON), VALUES), max_size=2),
)


def given_by_hand(*pairs: str) -> list[tuple[argparse.Action, str]]:
    known = {name: action for action in (*OWN, *MEGATRON) for name in action.option_strings}
    return [(known[flag], value) for flag, value in zip(pairs[::2], pairs[1::2], strict=True)]


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(COMMAND_LINES)
@example(("rope", True, given_by_hand("--ksa-window-chunks", "2 2 2 2"), []))
@example(("rope", True, given_by_hand("--ksa-layer-pattern", "k k k f"), []))
@example(("harpe", True, given_by_hand("--harpe-bases", "9" * 400 + ",1"), []))
@example(("rope", True, given_by_hand("--ksa-chunk-size", "1" + "0" * 30), []))
@example(("rope", True, [], given_by_hand("--num-layers", "1" + "0" * 12)))
@example(("rope", True, [], given_by_hand("--hidden-size", "999999999999")))
@example(("harpe", False, [], given_by_hand("--num-query-groups", "9" * 400)))
@example(("rope", True, [], given_by_hand("--global-batch-size", "9" * 400)))
def test_flags_of_the_trainer(base, command_line):
    """Absurd values ended in tracebacks, or in a NaN that was shown as a TypeError."""
    args, parser = base
    position, ksa, own, megatron = command_line
    flags = ["--position-embedding-type", position, *(["--ksa"] if ksa else [])]
    flags += [word for action, value in (*own, *megatron) for word in words(action, value)]

    def run() -> RunSettings:
        parsed = parser.parse_args(flags)
        together = argparse.Namespace(**{**vars(copy.copy(args)), **vars(parsed)})
        check_run(together)
        found = settings_from_args(together)
        found.ksa.layers(together.num_layers, together.seq_length)
        return found

    found = said_in_one_line(run)
    assert found is None or isinstance(found, RunSettings)


STEPS = [step for command in COMMANDS.values() for step in command.steps]
SETTINGS = list(dict.fromkeys(config for step in STEPS for config in step.settings.values()))


@pytest.mark.parametrize("config", SETTINGS, ids=lambda config: config.__name__)
def test_flags_of_tags(config):
    actions = flags_of(config, "")

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.tuples(st.sampled_from(actions), VALUES), max_size=3))
    def fuzzed(chosen):
        parser = Parser(add_help=False, allow_abbrev=False)
        add_config_arguments(parser, config, "", "")
        flags = [word for action, value in chosen for word in words(action, value)]
        found = said_in_one_line(lambda: config_from_args(config, parser.parse_args(flags), ""))
        assert found is None or isinstance(found, config)

    fuzzed()
