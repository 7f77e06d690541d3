"""Parses command lines and reports errors as one line with an exit code.

Exit codes: 0 done, 2 usage or configuration, 3 data, 4 environment, 75 preempted and 130
interrupted by Ctrl-C (the same command continues), 1 anything else. The last line on stderr is then
`error: ...`. Where nobody reads the output any more, as after `| head`, the code is 141 and nothing
is said.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import os
import re
import select
import sys
import traceback
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import tyro
from pydantic import BaseModel, ValidationError

from rlrag import plugins
from rlrag.cli.algorithm_flags import of_named_algorithm, refuse_other_settings, takes_recipe
from rlrag.cli.short_help import HELP_ALL, shortened
from rlrag.config import RunConfig, describe_validation_error
from rlrag.config.fixed import REMOVED, refusal
from rlrag.config.renamed import new_name
from rlrag.errors import (
    ConfigError,
    DataError,
    InUseError,
    ModelNotFoundError,
    PreemptedError,
    RlragError,
    RunDirectoryError,
    SetupError,
    nearest_name,
)

Arguments = TypeVar("Arguments")

_EXIT_CODES = (
    ((ConfigError, RunDirectoryError), 2),
    ((DataError,), 3),
    ((SetupError, ModelNotFoundError, InUseError), 4),
    ((PreemptedError,), 75),
)
_FRAME = re.compile("[│╭╮╰╯]")
_RULE = re.compile(r"\s*[─-]{5,}\s*")  # hyphens where the terminal has no other line
_HELP_INDENT = " " * 10


def parse(
    kind: type[Arguments], default: Arguments | None, argv: Sequence[str], prog: str
) -> Arguments:
    """Read flags; those that are not given have the values of `default` where there is one.

    Arguments of a recipe have two helps: `--help` shows the flags that people change first,
    `--help-all` every flag.

    Raises:
        ConfigError: when the values contradict each other. Unknown flags end the process with
            code 2 and the nearest valid name, as the parser does.
    """
    of_run, whole = default is not None and takes_recipe(kind), kind
    if of_run:
        kind, default = of_named_algorithm(kind, default, argv)
        if HELP_ALL in argv:
            argv = ["--help", *(word for word in argv if word != HELP_ALL)]
        elif {"-h", "--help"} & set(argv):
            _show_short_help(kind, default, argv, prog)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            parsed: Arguments = tyro.cli(
                kind,
                default=tyro.MISSING_NONPROP if default is None else default,
                args=list(_as_switches(argv, set(_switches(kind)))),
                prog=prog,
            )
        if of_run:  # these arguments have this one algorithm alone
            names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
            values = {name: getattr(parsed, name) for name in names}
            config = RunConfig.model_validate(values["config"].model_dump())
            parsed = whole(**(values | {"config": config}))
        return parsed
    except ValidationError as error:
        raise ConfigError(describe_validation_error(error)) from error
    except SystemExit as ending:
        # tyro 1.0 ends the process when a section of the configuration refuses its values, with
        # pydantic's text in a box; the refusal itself is what it was handling.
        refusal = ending.__context__ and ending.__context__.__context__
        if isinstance(refusal, ValidationError):
            raise ConfigError(describe_validation_error(refusal)) from refusal
        if not ending.code:
            _say_own_options(argv)
        if ending.code:
            _refuse_former(argv)
            if of_run:
                refuse_other_settings(argv, default.config.algorithm)  # type: ignore[union-attr]
            sys.stderr.write(complaint.getvalue())
            print(f"error: {_in_one_line(complaint.getvalue())}", file=sys.stderr)
        raise


@dataclasses.dataclass(frozen=True)
class _Whole:
    """The settings of a run."""

    config: typing.Annotated[RunConfig, tyro.conf.arg(name="")]


def parse_config(default: RunConfig, argv: Sequence[str], prog: str) -> RunConfig:
    """Read the flags of a run; those that are not given have the values of `default`.

    Raises:
        ConfigError: when the values contradict each other.
    """
    return parse(_Whole, _Whole(default), argv, prog).config


def _show_short_help(kind: type[Any], default: Any, argv: Sequence[str], prog: str) -> None:
    short, values = shortened(kind, default)
    try:
        tyro.cli(short, default=values, args=["--help"], prog=prog)
    except SystemExit:
        _say_own_options(argv)
        print(f"\n{HELP_ALL} lists every flag of the recipe.")
        raise


def _say_own_options(argv: Sequence[str]) -> None:
    """After the help, the options of the parts that the words name."""
    words = list(argv)
    for field, kind in plugins.FIELDS.items():
        flag, section = f"--{field}", field.partition(".")[0]
        if flag in words[:-1] and plugins.is_own(name := words[words.index(flag) + 1]):
            print(f"\n--{section}.options of {name}:")
            for line in plugins.options_of(kind, name):
                print(f"    {line}")


def _refuse_former(argv: Sequence[str]) -> None:
    for word in argv:
        flag = word.partition("=")[0]
        name = flag.removeprefix("--").replace("-", "_").replace(".no_", ".")
        if flag.startswith("--") and name in REMOVED:
            raise ConfigError(refusal(name, flag))
        if flag.startswith("--") and (renamed := new_name(name)):
            raise ConfigError(f"{flag} is no flag any more; its setting is {renamed} now")


def _switches(kind: type[Any], before: str = "") -> Iterator[str]:
    """Dotted names of the fields that are true or false, of nested sections too."""
    for name, hint in typing.get_type_hints(kind).items():
        dotted = f"{before}{name.replace('_', '-')}"
        if hint is bool:
            yield dotted
        elif isinstance(hint, type) and (
            issubclass(hint, BaseModel) or dataclasses.is_dataclass(hint)
        ):
            yield from _switches(hint, f"{dotted}.")


def _as_switches(argv: Sequence[str], switches: set[str]) -> Iterator[str]:
    """`--x True` as `--x` and `--x False` as `--no-x`, which the parser knows."""
    words = list(argv)
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--").replace("_", "-")
        # A section may be left out of its flags, as the configuration is in those of a run.
        is_switch = any(f".{switch}".endswith(f".{name}") for switch in switches)
        if not (flag.startswith("--") and is_switch):
            yield word
            continue
        if not equals and words and words[0] in ("True", "False"):
            value = words.pop(0)
        section, dot, last = name.rpartition(".")
        spelt = {"": flag, "True": flag, "False": f"--{section}{dot}no-{last}"}
        yield spelt.get(value, word)


def _in_one_line(box: str) -> str:
    """What the parser's box says above its first rule; below are hints, indented are help texts."""
    title, *lines = [_FRAME.sub(" ", line).rstrip() for line in box.splitlines()]
    blocks = [
        [line for line in block if line and not line.startswith(_HELP_INDENT)]
        for is_rule, block in itertools.groupby(lines, lambda line: bool(_RULE.fullmatch(line)))
        if not is_rule
    ]
    said = " ".join(" ".join(next(filter(any, blocks), [title])).split())
    return f"{said.rstrip('.')}; see the flags by --help"


def pick_recipe(
    argv: Sequence[str], recipes: dict[str, Callable[[], RunConfig]], prog: str
) -> tuple[RunConfig, list[str]]:
    """The recipe that the first word names, and the words after it.

    Raises:
        ConfigError: when the name is missing or unknown.
    """
    listing = "\n".join(f"  {name:22} {_summary(make)}" for name, make in recipes.items())
    usage = f"usage: {prog} RECIPE [--run-dir DIR] [flags]\n\nrecipes:\n{listing}"
    if not argv or argv[0] in ("-h", "--help"):
        print(
            f"{usage}\n\n{prog} RECIPE --help lists a recipe's main flags, {HELP_ALL} all of them.",
            flush=True,
        )
        if not argv:
            raise ConfigError(f"no recipe was given; choose from: {', '.join(recipes)}")
        raise SystemExit(0)
    name, *rest = argv
    if name not in recipes:
        hint = nearest_name(name, recipes, f"there are: {', '.join(recipes)}")
        raise ConfigError(f"unknown recipe {name!r}; {hint}")
    return recipes[name](), rest


def program_name(command: str) -> str:
    """How this process was started: `rlrag train`, or `python -m jobs.train` from a checkout."""
    if os.path.basename(sys.argv[0]) == "rlrag":
        return f"rlrag {command}"
    return f"python -m jobs.{command}"


def _summary(make: Callable[[], RunConfig]) -> str:
    return (make.__doc__ or "").splitlines()[0]


def run_program(main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> None:
    """Run `main` on the words of the command line and end the process with the right code.

    Args:
        main: What to run.
        argv: The words; those after the program's name when unset.
    """
    try:
        try:
            main(sys.argv[1:] if argv is None else argv)
        finally:
            sys.stdout.flush()
    except RlragError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(exit_code(error)) from None
    except KeyboardInterrupt:
        print("error: stopped; the same command continues", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            # What is still to be written when the interpreter ends goes nowhere, in silence.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(141) from None
        traceback.print_exc()
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        print(
            f"error: {reason} (unexpected: report it with the lines above)",
            file=sys.stderr,
        )
        raise SystemExit(1) from error


def _nobody_reads() -> bool:
    """Whether the other end of standard output is closed; other pipes and sockets may be broken."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # an error is always reported
    return any(event & select.POLLERR for _, event in poll.poll(0))


def exit_code(error: RlragError) -> int:
    """The process exit code for an error."""
    for kinds, code in _EXIT_CODES:
        if isinstance(error, kinds):
            return code
    return 1
