"""``dpnp-reconstruct``: a prior, a forward model and a measurement go in, a posterior comes out.

Without arguments it runs the bundled demo. ``dpnp-reconstruct check`` asks, with the same options, whether the intervals of such a
reconstruction hold what they promise, ``dpnp-reconstruct check-model`` whether the forward model does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools
import json
import logging
import sys
from argparse import SUPPRESS
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jsonargparse import ArgumentParser, Namespace, set_loader
from rich.console import Console
from rich.logging import RichHandler

from dpnp_inference.baselines import Baseline
from dpnp_inference.commands.batch import Batch, batch
from dpnp_inference.commands.check import Check, check
from dpnp_inference.commands.check_model import CheckModel, check_model
from dpnp_inference.commands.export import export
from dpnp_inference.commands.reconstruct import Reconstruction, reconstruct
from dpnp_inference.commands.report import report
from dpnp_inference.configuration import Configuration
from dpnp_inference.dpnp import SamplingError
from dpnp_inference.function_space import FunctionSpaceLangevin
from dpnp_inference.pcn import PCN
from dpnp_inference.userfile import name_user_files, resolve_user_files
from dpnp_shared.console import ends_with_its_reader
from dpnp_shared.noise import Noise
from dpnp_shared.operators import Operator
from dpnp_shared.prior import PriorError

log = logging.getLogger(__name__)


class Command(NamedTuple):
    """A command whose options are those of a reconstruction, with some of its own.

    Attributes:
        options: dataclass of its options.
        run: does it, given the options, the same as JSON-able values, and the command line.
        description: for the help.
    """

    options: type[Configuration]
    run: Callable[[Any, dict[str, Any], list[str]], None]
    description: str


RECONSTRUCT = "reconstruct"
COMMANDS: dict[str, Command] = {
    RECONSTRUCT: Command(
        Reconstruction,
        reconstruct,
        "Draw from the posterior of an image. Without arguments: the bundled demo. 'dpnp-reconstruct check-model' finds out "
        "whether a forward model keeps what it promises, 'dpnp-reconstruct check' whether the intervals do; 'dpnp-reconstruct report' and "
        "'dpnp-reconstruct export' show a finished run.",
    ),
    "check": Command(
        Check,
        check,
        "Do the intervals of a reconstruction hold what they promise? Truths are drawn from the prior, measured, and reconstructed. "
        "Without arguments: the bundled demo's configuration.",
    ),
    "check-model": Command(
        CheckModel,
        check_model,
        "Is the forward model what a sampler takes it for? It is tried on draws from the prior. The exit status is 1 if there is a "
        "problem. Without arguments: the bundled demo's.",
    ),
    "batch": Command(
        Batch,
        batch,
        "Reconstruct many measurements, on several processes, devices and hosts. Items that are done are skipped, those that failed are "
        "tried again. The exit status is 0 if all are done, 3 if some failed. Without arguments: the bundled prior's test images.",
    ),
}
TOOLS: dict[str, Callable[[list[str]], None]] = {
    "report": report,
    "export": export,
}  # commands about a finished run, with options of their own


def _names(*bases: type) -> list[str]:
    """Of this package's classes that are one of ``bases``."""
    found: list[str] = []
    for base in bases:
        if not inspect.isabstract(base) and base.__module__.startswith("dpnp_"):
            found.append(base.__name__)
        found.extend(_names(*base.__subclasses__()))
    return sorted(name for name in set(found) if not name.startswith("_"))


NAMES = {  # what an option may be given as one word
    "solver": ["DPnP", *_names(Baseline, FunctionSpaceLangevin, PCN)],
    "operator": _names(Operator),
    "noise": _names(Noise),
    "dds": ["ddim", "ddpm"],
    "proximal": ["auto"],
    "annealing": ["auto"],
}


def main(args: Sequence[str] | None = None) -> None:
    """Run ``dpnp-reconstruct``.

    Args:
        args: command-line arguments; those of the process by default.

    Raises:
        SystemExit: with a non-zero status and one message, for any bad input; and with status 1 where a forward model that is checked
            has a problem.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    logging.basicConfig(
        level=logging.INFO,
        format="%(message)s",
        handlers=[RichHandler(console=Console(stderr=True), show_time=False, show_path=False, markup=False)],
    )
    for noisy in ("httpx", "huggingface_hub", "matplotlib", "filelock", "arviz.preview"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    first = "".join(arguments[:1])
    try:
        with ends_with_its_reader():
            if first in TOOLS:
                TOOLS[first](arguments[1:])
            elif first in COMMANDS:
                _run(first, arguments[1:], arguments)
            else:
                _run(RECONSTRUCT, arguments, arguments)
    except (PriorError, SamplingError, ImportError, ValueError, TypeError, OSError, RuntimeError) as error:
        if log.isEnabledFor(logging.DEBUG):
            raise
        sys.exit(f"dpnp-reconstruct: {error}")


def _run(name: str, given: list[str], arguments: list[str]) -> None:
    """One of the commands: ``given`` are its options, ``arguments`` the command line as it was written."""
    options, config = read_options(name, given)
    COMMANDS[name].run(options, config, arguments)


def read_options(name: str, given: Sequence[str]) -> tuple[Configuration, dict[str, Any]]:
    """A command's options, built, and the same as JSON-able values.

    Args:
        name: of the command.
        given: its arguments.

    Raises:
        ValueError: an option that takes a class is given a word that names none.
    """
    command, parser = COMMANDS[name], _parser(name)
    for option, value in itertools.pairwise(part for argument in given for part in argument.split("=", 1)):
        if option == "--config" and Path(value).is_file():
            _check_names_in(Path(value))
        elif option.startswith("--"):
            _check_name(option[2:], value)
    settings = parser.parse_args([_resolve_argument(argument) for argument in given])
    built = parser.instantiate(settings)
    options = command.options(**{field.name: built[field.name] for field in dataclasses.fields(command.options)})
    _name_unused(name, settings)
    return options, name_user_files(json.loads(parser.dump(settings, format="json")))


def _parser(name: str = RECONSTRUCT) -> ArgumentParser:
    here = Path.cwd()  # the parser goes to the folder of a configuration file while it reads it
    set_loader("dpnp_yaml", lambda text: resolve_user_files(yaml.safe_load(text), here))
    command = COMMANDS[name]
    program = "dpnp-reconstruct" if name == RECONSTRUCT else f"dpnp-reconstruct {name}"
    parser = ArgumentParser(
        prog=program,
        usage=f"{program} [--config FILE] [options]; --help lists the options",
        parser_mode="dpnp_yaml",
        description=command.description,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the options below")
    parser.add_class_arguments(command.options)
    for field in _unused(command.options):  # a reconstruction's config file is taken as it is
        parser.add_argument(f"--{field.name}", type=Any, default=field.default, help=SUPPRESS)
    return parser


def _check_name(option: str, value: Any) -> None:
    """One error that lists what there is, where the parser would list why each of its types does not fit."""
    if option in NAMES and isinstance(value, str) and value.isidentifier() and value not in [*NAMES[option], "null"]:
        raise ValueError(
            f"{option} = {value!r}; allowed are {', '.join(NAMES[option])}, a class path, or path/to/file.py:Name"
        )


def _check_names_in(file: Path) -> None:
    """Those at the top of a configuration file; what else is wrong with it is the parser's to say."""
    with contextlib.suppress(yaml.YAMLError, UnicodeDecodeError):
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
        for option, value in found.items() if isinstance(found, dict) else ():
            _check_name(option, value.get("class_path") if isinstance(value, dict) else value)


def _unused(options: type[Configuration]) -> list[dataclasses.Field[Any]]:
    """A reconstruction's options that a command has no use for."""
    known = {field.name for field in dataclasses.fields(options)}
    return [field for field in dataclasses.fields(Reconstruction) if field.name not in known]


def _name_unused(name: str, settings: Namespace) -> None:
    names = [field.name for field in _unused(COMMANDS[name].options) if settings[field.name] != field.default]
    if names:
        log.info("%s: for a reconstruction, a %s has no use for it", ", ".join(names), name.partition("-")[0])


def _resolve_argument(argument: str) -> str:
    """``--operator=file.py:Name`` and ``file.py:Name`` with the class path of the user's class."""
    option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return f"{option}{equals}{resolve_user_files(value)}"


if __name__ == "__main__":
    main()
