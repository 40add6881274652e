"""The commands of ``gi-model``, a module each.

A module has ``NAME``, ``SUMMARY`` (its line in the list of commands), ``EXTRA`` (the package's extra that
brings what it imports), ``add_options(parser)`` and ``run(options)``, which returns the exit code. Its
docstring is the description that ``--help`` prints. What is large is imported by ``run``, so that
``--help`` is quick and works without the extra.
"""

from __future__ import annotations

import argparse
from importlib import import_module

#: Modules of this package, in the order of the help.
MODULES = (
    "propagate",
    "train",
    "convert_checkpoint",
    "make_validation",
    "evaluate",
    "evaluate_video",
    "fetch_lpips",
)


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` a subcommand for every module; it leaves ``run`` and ``extra`` in the options."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name in MODULES:
        module = import_module(f"{__name__}.{name}")
        command = commands.add_parser(
            module.NAME,
            help=module.SUMMARY,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_options(command)
        command.set_defaults(run=module.run, extra=module.EXTRA)
