"""Commands of the stages, on one or several ranks, in forked processes: without their libraries' import.

The ranks are watched as torchrun does: when one fails, the others are told to end."""

import contextlib
import faulthandler
import os
import signal
import sys
import tempfile
import threading
import time
import traceback

import torch
from tqdm import tqdm

import adm
import adp
import collect_ode
import evaluate
import sample
from support.errors import launch
from tools.bench import free_port

# tqdm's own lock is one for all forked processes, and a killed one would hold it for ever
tqdm.set_lock(threading.RLock())
tqdm.monitor_interval = 0

SCRIPTS = {"collect_ode": collect_ode, "adp": adp, "adm": adm, "sample": sample, "evaluate": evaluate}
PATIENCE = 300  # seconds after which a command counts as hanging


class Command:
    """A stage's command: a script's name, its words, and how many ranks it runs on, on how many nodes."""

    def __init__(self, script, words, ranks=1, nodes=1):
        self.script = script
        self.words = words
        self.ranks = ranks
        self.nodes = nodes

    def start(self, place):
        """Starts it in this working directory -> Running."""
        port = free_port()
        folder = tempfile.mkdtemp(prefix="output-", dir=place)
        return Running([self._fork(rank, port, place, folder) for rank in range(self.ranks)], folder)

    def _fork(self, rank, port, place, folder):
        sys.stdout.flush()
        process = os.fork()
        if process:
            return process
        code = 1
        try:
            # makes torch's pool anew: threads that load weights would race for it, and one would lose
            torch.set_num_threads(1)
            output = os.open(os.path.join(folder, f"{rank}.out"), os.O_WRONLY | os.O_CREAT)
            errors = os.open(os.path.join(folder, f"{rank}.err"), os.O_WRONLY | os.O_CREAT)
            os.dup2(output, 1)
            os.dup2(errors, 2)
            sys.stdout = os.fdopen(1, "w")  # pytest has others in their places
            sys.stderr = os.fdopen(2, "w", buffering=1)
            faulthandler.enable(sys.stderr)  # a crash of compiled code says where it was
            os.chdir(place)
            if self.ranks > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.ranks)}
                os.environ |= {"LOCAL_WORLD_SIZE": str(self.ranks // self.nodes)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            sys.argv = [f"{self.script}.py", *self.words]
            launch(SCRIPTS[self.script].main)
            code = 0
        except SystemExit as end:
            code = end.code or 0
        except KeyboardInterrupt:
            code = 130  # before launch() takes care of it
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def run(self, place):
        """Runs it to its end -> Running."""
        running = self.start(place)
        running.wait()
        return running


class Running:
    """The processes of a command, and what becomes of them."""

    def __init__(self, processes, folder):
        self.processes = processes
        self.folder = folder
        self.codes = {}  # {process: exit code} of those that have ended
        self.since = time.monotonic()

    def poll(self):
        """Whether some of them still run."""
        for process in self.processes:
            if process not in self.codes:
                ended, status = os.waitpid(process, os.WNOHANG)
                if ended:
                    self.codes[process] = os.waitstatus_to_exitcode(status)
        return len(self.codes) < len(self.processes)

    def send(self, number, rank):
        process = self.processes[rank]
        if process not in self.codes:
            os.kill(process, number)

    def wait(self):
        """Waits for the end -> exit codes by rank. When one fails the others are told to end, after a while
        killed."""
        failed = None
        while self.poll():
            now = time.monotonic()
            if failed is None and any(self.codes.values()):
                failed = now
                for rank in range(len(self.processes)):
                    self.send(signal.SIGTERM, rank)
            if now - self.since > PATIENCE or (failed and now - failed > 10):
                for rank in range(len(self.processes)):
                    self.send(signal.SIGKILL, rank)
            time.sleep(0.01)
        self.seconds = time.monotonic() - self.since
        return [self.codes[process] for process in self.processes]

    def read(self):
        """What all ranks said."""
        texts = []
        for rank in range(len(self.processes)):
            with open(os.path.join(self.folder, f"{rank}.err"), errors="replace") as file:
                texts.append(file.read())
        return "\n".join(texts)

    def find_fault(self, script):
        """What is wrong with how it ended, whatever it was to do; None if nothing is."""
        codes = list(self.codes.values())
        errors = self.read()
        if self.seconds > PATIENCE:
            return "hangs"
        if "Traceback" in errors:
            return f"traceback: {errors.strip().splitlines()[-1][:150]}"
        if 2 in codes:
            said = {line for line in errors.splitlines() if line.startswith(f"{script}.py: ")}
            lost = {line for line in said if line.endswith("the connection to another rank is lost")}
            if len(said - lost) != 1:
                return f"{len(said)} sentences"
        elif set(codes) - {0, 130}:
            return f"exit codes {codes}"
        return None

    def read_sentence(self, script):
        for line in self.read().splitlines():
            if line.startswith(f"{script}.py: "):
                return line
        return ""
