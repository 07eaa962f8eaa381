"""Files: written in one move, read without trust, fetched once a machine."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import pickle
import re
import shutil
import socket

import torch
import xxhash

from support.errors import UserError, note
from support.parallel import is_main

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def short_name(path):
    """The last part of a teacher's name, folder or hub id, for the names of output folders; that of the
    folder which it means where it is "." or ".."."""
    return os.path.basename(os.path.abspath(path)) or "root"


def make_folder(path):
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder {path} cannot be made: {error.strerror}") from error


# ----------------------------------------------------------------------------------------------------------
# Writing
# ----------------------------------------------------------------------------------------------------------

LEFTOVER = re.compile(r"\.writing-(\w+)-(\d+)-(.+)")  # what write_atomically writes to: host, process, name
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
WRITE_FAILED = re.compile(  # as torch and safetensors say it
    rf"os error ({'|'.join(map(str, FULL))})\)|unexpected pos \d+ vs|file write failed"
)
HOST = re.sub(r"\W", "", socket.gethostname()) or "host"
UMASK = os.umask(0)  # there is no other way to ask for it
os.umask(UMASK)


@contextlib.contextmanager
def write_atomically(path):
    """A temporary path to write to (a file or a folder), moved to `path` at the end: readers never see half
    of it, not even after a power cut. It ends as `path` does, for libraries that choose a format by the
    suffix.

    UserError where it cannot be written: a full disk, a folder that may not be written to."""
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".writing-{HOST}-{os.getpid()}-{name}")
    try:
        remove(temporary)  # of a process that was killed and had this one's number
        yield temporary
        for file in list_files(temporary):
            os.chmod(file, 0o666 & ~UMASK)  # some libraries make files that nobody else can read
            flush(file)
        os.replace(temporary, path)
        flush(folder or ".")
    except UserError:
        raise
    except Exception as error:
        reason = explain_failed_write(error, folder or ".")
        if reason is None:
            raise
        raise UserError(f"{path} cannot be written: {reason}") from error
    finally:
        remove(temporary)


def explain_failed_write(error, folder):
    """Why a write failed, in words; None where the disk is not to blame. What libraries raise where a disk or
    a quota is full says it in many ways, or not at all."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        free = 0
    is_full = isinstance(error, OSError) and error.errno in FULL
    if is_full or free < 2**16 or WRITE_FAILED.search(str(error)):
        return f"the disk is full, or your share of it ({free / 1e9:.2f} GB free)"
    if isinstance(error, OSError) and error.strerror and not isinstance(error, FileExistsError):
        return error.strerror
    return None


def list_files(path):
    """All files below a folder, or the file itself."""
    if os.path.isfile(path):
        return [path]
    return [os.path.join(place, name) for place, _, names in os.walk(path) for name in names]


def flush(path):
    """Has a file's or a folder's content on the disk when it returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot, for folders
            raise
    finally:
        os.close(descriptor)


def remove_leftovers(folder, target=None, of_all=False):
    """Removes what killed processes of this machine were writing in a folder, of the name `target` alone if
    one is given, and with `of_all`, for who alone may write there, what any process was; nothing else."""
    folder = folder or "."
    for name in os.listdir(folder) if os.path.isdir(folder) else []:
        match = LEFTOVER.fullmatch(name)
        if not match or target not in (None, match[3]):
            continue
        host, process, _ = match.groups()
        is_dead = host == HOST and not is_alive(int(process))
        if of_all or is_dead:  # a container that starts again has the same host and process numbers
            remove(os.path.join(folder, name))


def is_alive(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def remove(path):
    """A file or a folder with all that is in it, if it is there."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.remove(path)


@contextlib.contextmanager
def lock_folder(folder):
    """Inside, no other command can work in this folder, and what dead ones left half written is gone; the
    lock ends with its holder, however that ends. UserError where another has it. Only the main rank takes
    it: the others belong to it.

    (The library filelock leaves its file behind.)"""
    if not is_main():
        yield
        return
    is_new = not os.path.isdir(folder)
    make_folder(folder)
    path = os.path.join(folder, ".lock")
    lock = take_lock(path)
    if lock is None:
        raise UserError(
            f"another process works in {folder}: wait for it, or give another --out "
            "(the processes of one run are started by torchrun)"
        )
    try:
        remove_leftovers(folder)
        yield
    finally:
        remove(path)
        os.close(lock)
        if is_new:
            with contextlib.suppress(OSError):  # it is not empty
                os.rmdir(folder)


def take_lock(path):
    """The descriptor of a locked file; None where another process has locked it."""
    while True:
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            folder = os.path.dirname(path)
            reason = explain_failed_write(error, folder)
            raise UserError(f"the folder {folder} cannot be written to: {reason}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        except OSError as error:
            reason = f"{path} cannot be locked ({error.strerror})"
            note(f"{reason}: see to it that no second command writes there")
            return lock
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(lock)):
                return lock
        os.close(lock)  # its holder removed it in between


# ----------------------------------------------------------------------------------------------------------
# Reading
# ----------------------------------------------------------------------------------------------------------


def as_json(value):
    """A value as a JSON file keeps it, which has no tuples; what JSON cannot hold is text."""
    return json.loads(json.dumps(value, default=str))


def read_json(path):
    """The file's value; None where it is not there or damaged. OSError where it cannot be read."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, RecursionError):
        return None


def read_json_lines(path):
    """The dictionaries in a file with one a line; damaged lines are passed over."""
    values = []
    if os.path.exists(path):
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                value = parse_line(line)
                if value is not None:
                    values.append(value)
    return values


def parse_line(line):
    """A line of JSON -> its dictionary, or None."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def sample_json_lines(path, count):
    """At most about `count` of the lines, evenly spaced over the file, read without reading the rest."""
    size = os.path.getsize(path) if os.path.exists(path) else 0
    if size < 400 * count:
        return read_json_lines(path)
    values = []
    with open(path, "rb") as file:
        for i in range(count):
            file.seek(size * i // count)
            if i:
                file.readline()  # the rest of a line
            value = parse_line(file.readline().decode("utf-8", errors="replace"))
            if value is not None:
                values.append(value)
    return values


def write_text(path, text):
    with write_atomically(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(text)


def write_json(path, value):
    with write_atomically(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.write("\n")


def write_sealed(path, values):
    """write_json of a dictionary with a checksum of its own."""
    write_json(path, {**values, "checksum": compute_checksum_of_json(values)})


def read_sealed(path):
    """What write_sealed wrote; None where the file is not there, damaged, or was edited."""
    values = read_json(path)
    if not isinstance(values, dict):
        return None
    checksum = values.pop("checksum", None)
    return values if checksum == compute_checksum_of_json(values) else None


def compute_checksum_of_json(values):
    """The xxh3 hash of a value that JSON can hold."""
    return xxhash.xxh3_128_hexdigest(json.dumps(values, sort_keys=True).encode())


def compute_checksum(path):
    """A file's xxh3 hash, which tells damage, not malice."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def read_tensors(path):
    """A checkpoint file, safetensors or torch's -> what it holds, on the CPU; nothing is unpickled. Raises
    what the libraries do, and ValueError where torch would advise to unpickle."""
    if path.endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError("it holds more than tensors, or no tensors") from error


def fetch(url, advice, *folders):
    """The path of a file that is published at a URL: in one of these folders or in torch's cache, where it is
    fetched to. UserError if that fails. (hf_hub_download does not fit: these files are on no hub.)"""
    from filelock import FileLock

    cache = os.path.join(torch.hub.get_dir(), "checkpoints")
    folders = [*filter(None, folders), cache]
    name = os.path.basename(url)
    paths = [os.path.join(folder, name) for folder in folders]
    for path in paths:
        if os.path.exists(path):
            return path
    path = paths[-1]
    try:
        os.makedirs(cache, exist_ok=True)
        with FileLock(f"{path}.lock"):  # the ranks of a machine fetch it once
            if not os.path.exists(path):
                torch.hub.download_url_to_file(url, path, progress=is_main())
    except OSError as error:
        places = " nor at ".join(paths)
        raise UserError(
            f"the file {name} is wanted; it is not at {places} and could not be fetched ({error}): "
            f"fetch {url} by hand and {advice}"
        ) from error
    return path
