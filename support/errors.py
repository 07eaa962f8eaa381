"""What a user is told: notes, and of a mistake one clear sentence, with exit code 2."""

import contextlib
import importlib
import os
import re
import sys
import time

import torch
import torch.distributed as dist

from support.escapes import make_printable
from support.parallel import is_main

INTERRUPTED = 130  # the exit code of Ctrl-C
SEE_PLAN = ", or see what --plan says of --shard and --lora"
# what a command can do beside a smaller batch where a GPU's memory is full
MEMORY_ADVICE = {
    "adp.py": SEE_PLAN,
    "adm.py": SEE_PLAN,
    "sample.py": ", or give --offload",
    "collect_ode.py": ", or give --offload",
    "evaluate.py": ", give --offload, or fewer metrics",
}


class UserError(Exception):
    """A mistake of the person who typed the command: one sentence that says what is wrong and what to
    type."""


def first_line(error):
    """The first line of an error's message, or the error's kind where it has none."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


def note(sentence):
    """Tells the user something, once, not once a rank."""
    if is_main():
        with contextlib.suppress(OSError):  # the terminal may be gone, and the work goes on
            print(f"note: {sentence}", file=sys.stderr)


def require(module, package, does):
    """An optional package's module. UserError with the pip command where the package is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"the package {package} {does} and is not there: pip install {package}") from error


def launch(main):
    """Runs a script's main(). A mistake, a full disk, an unreadable file, a GPU that is too small becomes one
    sentence and exit code 2, on whichever rank it happens; Ctrl-C exit code 130."""
    open_streams()
    try:
        check_ranks()
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        leave("interrupted", INTERRUPTED, wait=not is_main())
    except Exception as error:
        sentence = explain(error)
        if sentence is None:
            raise
        # most mistakes are made on all ranks, and the main one speaks for them
        leave(sentence, 2, wait=not is_main() or is_lost_connection(error))
    if dist.is_initialized():
        dist.destroy_process_group()


def open_streams():
    """Output that the shell has closed goes nowhere; what a terminal cannot show is shown in its code."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  until the process ends
        with contextlib.suppress(AttributeError):
            getattr(sys, name).reconfigure(errors="backslashreplace")


def check_ranks():
    """UserError for a RANK or WORLD_SIZE that no torchrun has set."""
    names = ("RANK", "WORLD_SIZE")
    given = [os.environ.get(name) for name in names]
    if given == [None, None]:
        return
    if not all(value and value.isdecimal() for value in given) or not int(given[0]) < int(given[1]):
        found = " and ".join(f"{name}={value}" for name, value in zip(names, given) if value is not None)
        raise UserError(f"the environment has {found}: start with torchrun, which sets both, or unset them")


def explain(error):
    """What a person is to know of an error; None for one that is a defect of this program."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        command = os.path.basename(sys.argv[0])
        return f"the GPU's memory is full: lower --batch{MEMORY_ADVICE.get(command, '')}"
    if is_out_of_memory(error):
        return "the machine's memory is full: ask for less, as a smaller --batch or --resolution"
    if "using env:// rendezvous" in str(error):
        return f"{first_line(error)}: start with torchrun, which sets all of them"
    if "invalid device ordinal" in str(error):
        return "there are fewer GPUs on this machine than processes: lower --nproc_per_node"
    if "DataLoader worker" in str(error):
        return (
            "a process that decodes images was ended, most likely for its memory: give --workers 0, or the "
            "machine more (a container: a larger /dev/shm)"
        )
    if isinstance(error, BrokenPipeError):
        return "the output was closed before the end"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if is_lost_connection(error):
        return "the connection to another rank is lost"
    return None


def is_out_of_memory(error):
    """Whether an error says that the machine's memory, not a GPU's, is too small."""
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error)


def is_of_machine(error):
    """Whether an error is of a GPU, a memory or a connection, and not of what was to be computed."""
    kinds = (torch.OutOfMemoryError, torch.AcceleratorError, dist.DistError)
    is_known = isinstance(error, kinds) or is_out_of_memory(error) or is_lost_connection(error)
    return is_known or str(error).startswith("CUDA error")


def is_lost_connection(error):
    return isinstance(error, RuntimeError) and re.search(r"[Cc]onnection (closed|reset) by peer", str(error))


def leave(sentence, code, wait):
    """Ends this process with a sentence. wait: for torchrun, which ends all ranks when one fails."""
    if wait:
        time.sleep(5)
    with contextlib.suppress(OSError):
        print(f"{os.path.basename(sys.argv[0])}: {make_printable(sentence)}", file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python would try again
    raise SystemExit(code) from None
