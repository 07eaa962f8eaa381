"""Ctrl-C while the libraries load, ends a script without a traceback, as it does later."""

import os
import sys


def end(kind, error, traceback):
    """An exception hook."""
    if not issubclass(kind, KeyboardInterrupt):
        return sys.__excepthook__(kind, error, traceback)
    print(f"{os.path.basename(sys.argv[0])}: interrupted", file=sys.stderr)
    os._exit(130)  # or Python would end by the signal itself


sys.excepthook = end
