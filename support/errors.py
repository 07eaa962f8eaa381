"""What becomes of a user's mistake: one clear sentence and exit code 2."""

import importlib
import os
import sys

import torch.distributed as dist

from support.escapes import make_printable
from support.parallel import is_main


class UserError(Exception):
    """A mistake of the person who typed the command: one sentence that says what is wrong and what to
    type."""


def first_line(error):
    """The first line of an error's message, or the error's kind where it has none."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


def require(module, package, does):
    """An optional package's module. UserError with the pip command where the package is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"the package {package} {does} and is not there: pip install {package}") from error


def launch(main):
    """Runs a script's main(); a UserError becomes one sentence, said once, and exit code 2."""
    try:
        main()
    except UserError as error:
        if is_main():
            print(f"{os.path.basename(sys.argv[0])}: {make_printable(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    if dist.is_initialized():
        dist.destroy_process_group()
