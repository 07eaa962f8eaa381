"""Runs one of the project's scripts in a process of its own, and measures what it took; and on what."""

import os
import platform
import subprocess
import sys

import torch

from support.files import ROOT


def run_script(words, log, threads, **environment):
    """Runs `python WORDS` in the repository's root, without network, on so many threads and with further
    variables of the environment; what it prints goes to the open file `log` -> (exit code, resource usage as
    of os.wait4)."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"} | environment
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, env=environment, stdout=log, stderr=log)
    _, status, usage = os.wait4(process.pid, 0)
    return os.waitstatus_to_exitcode(status), usage


def describe_machine():
    """The number of cores, and what they are; the GPU, where there is one."""
    model = platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
        model = names[0] if names else model
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{os.cpu_count()} x {model}{gpu}"
