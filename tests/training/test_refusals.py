"""Megatron's assertions become one line with the flags; errors of this project, and of training, stay what they are."""

import argparse

import pytest
from megatron.training.arguments import validate_args
from megatron.training.config import TrainingConfig

from megatron_ksa.errors import UsageError
from megatron_ksa.training.refusals import megatron_refusals, set_up_refusals

ARGS = argparse.Namespace(ckpt_convert_format="torch", ckpt_convert_save=None, load=None)


class Step:
    started = False


def test_an_assertion_without_a_word_is_its_condition_and_its_flag():
    with pytest.raises(UsageError) as error, megatron_refusals(ARGS):
        validate_args(ARGS)
    said = "--ckpt-convert-save (not given): args.ckpt_convert_save is not None must hold (megatron/training/"
    assert said in str(error.value) and "\n" not in str(error.value)


def test_errors_of_this_project_are_no_refusals_of_megatron():
    with pytest.raises(AssertionError, match="^ours"), megatron_refusals(ARGS):
        raise AssertionError("ours")
    with pytest.raises(UsageError, match="^a line of its own$"), megatron_refusals(ARGS):
        raise UsageError("a line of its own")


def test_an_assertion_of_training_keeps_its_traceback():
    step = Step()
    with pytest.raises(UsageError), set_up_refusals(ARGS, step):
        validate_args(ARGS)
    step.started = True
    with pytest.raises(AssertionError), set_up_refusals(ARGS, step):
        validate_args(ARGS)


class Failing(argparse.Namespace):
    @property
    def ckpt_convert_save(self):
        """What a library below Megatron raises, in the place of an assertion."""
        raise ValueError("no such library")


def test_an_error_of_a_library_is_blamed_on_no_flag():
    """An assertion in torch was told as one of --swiglu, the flag of an `if` around the call."""
    args = Failing(ckpt_convert_format="torch", load=None)
    said = r"^Megatron does not accept this: no such library \(megatron/training/"
    with pytest.raises(UsageError, match=said), megatron_refusals(args):
        validate_args(args)


def test_other_exceptions_pass():
    with pytest.raises(TypeError), megatron_refusals(ARGS):
        TrainingConfig(no_such_field=1)
