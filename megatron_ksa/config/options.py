"""Command-line flags generated from a config dataclass: one argument group, one help line a field."""

import argparse
import dataclasses
import types
from typing import TYPE_CHECKING, Any, NoReturn, get_args, get_origin, get_type_hints

from megatron_ksa.errors import UsageError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def option(
    default: Any, help: str, *, choices: tuple[str, ...] | None = None, flag: str | None = None, alone: Any = None
) -> Any:  # fmt: skip
    """A dataclass field with the help text, choices and, where it is not the prefix and name, the flag that sets it.

    Args:
        alone: the value of a flag that is given without one; None where it needs a value.
    """
    return dataclasses.field(
        default=default, metadata={"help": help, "choices": choices, "flag": flag, "alone": alone}
    )  # fmt: skip


def flag(field: dataclasses.Field, prefix: str) -> str:
    """The command-line flag of a field."""
    return field.metadata.get("flag") or f"--{prefix}-{field.name.replace('_', '-')}"


def destination(field: dataclasses.Field, prefix: str) -> str:
    """The name under which argparse stores the field."""
    return flag(field, prefix).removeprefix("--").replace("-", "_")


def _scalar_type(annotation: Any) -> type:
    """`int` for `int | None`, and the annotation itself otherwise."""
    if isinstance(annotation, types.UnionType):
        return next(member for member in get_args(annotation) if member is not type(None))
    return annotation


class OneLineParser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Argparse's, as bad input."""
        raise UsageError(f"{message} (--help lists the flags)")


class _Words(argparse.Action):
    """Words of a flag that may be given again: those of the later flag follow."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        """Add the words; they replace the default, which is no list."""
        earlier = getattr(namespace, self.dest)
        setattr(namespace, self.dest, [*earlier, *values] if isinstance(earlier, list) else values)


def add_config_arguments(parser: argparse.ArgumentParser, config: type, prefix: str, title: str) -> None:
    """Add one argument group with a flag `--<prefix>-<field>` for every field of the dataclass `config`.

    A field of type bool becomes `--flag` and `--no-flag`, one of type `tuple[str, ...]` takes several words,
    and may be given again. The class docstring's first line describes the group.
    """
    group = parser.add_argument_group(title, (config.__doc__ or "").strip().splitlines()[0])
    annotations = get_type_hints(config)
    for field in dataclasses.fields(config):
        kind = _scalar_type(annotations[field.name])
        default = "" if field.default in (None, ()) else f" (default: {field.default})"
        help_text = (field.metadata["help"] + default).replace("%", "%%")
        if kind is bool:
            group.add_argument(
                flag(field, prefix), action=argparse.BooleanOptionalAction, default=field.default, help=help_text
            )
        elif get_origin(kind) is tuple:
            group.add_argument(
                flag(field, prefix),
                nargs="+",
                action=_Words,
                type=get_args(kind)[0],
                default=field.default,
                help=help_text,
            )
        else:
            choices = field.metadata.get("choices")
            alone = field.metadata.get("alone")
            optional = {} if alone is None else {"nargs": "?", "const": alone}
            group.add_argument(
                flag(field, prefix), type=kind, default=field.default, choices=choices, help=help_text, **optional
            )


def config_from_args[Config: DataclassInstance](config: type[Config], args: argparse.Namespace, prefix: str) -> Config:
    """The dataclass `config` filled from parsed arguments.

    Raises:
        UsageError: from the dataclass's own validation.
    """
    values = {f.name: getattr(args, destination(f, prefix)) for f in dataclasses.fields(config)}
    return config(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
