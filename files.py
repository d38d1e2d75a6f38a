"""Files and room for them: JSON and text read with clear errors, whole files or none written, memory and disk checked.

    config = read_json(folder / "config.json")
    check_disk(2_000_000_000, path)                          # UserError before anything is begun
    with write_atomically(path) as file:                     # the file appears, or replaces the old one, as a whole
        file.write(data)

A file is written to a temporary name in the same folder, synced and renamed: after a kill there is the old file or the
new one. Locks keep two runs from writing the same one.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from errors import UserError

MAX_TEXT_BYTES = 2**28
MAX_JSON_BYTES = 100_000_000  # the limit of the safetensors library for a header

# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. UserError when it is missing, not JSON or not an object."""
    if not path.is_file():
        raise UserError(f"{path} is missing; get the complete checkpoint folder")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise UserError(f"{path} has {gb(path.stat().st_size)}, far too much for JSON; get the file again")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); get the file again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {type(value).__name__}, not a JSON object; get the file again")
    return value


def refuse_lfs_pointer(path: Path) -> None:
    """UserError where git-lfs has left a pointer in the place of a large file."""
    with open(path, "rb") as file:
        start = file.read(1000)
    if len(start) < 1000 and b"https://git-lfs" in start:
        raise UserError(f"{path} is no more than a pointer of git-lfs; run `git lfs pull` in {path.parent}")


def read_text(path: Path) -> str:
    """A UTF-8 text file, as it is. UserError when it can't be read."""
    try:
        with open(path, "rb") as file:
            return read_bounded(file, str(path)).decode()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; name a readable text file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); re-encode it") from error


def read_bounded(file: BinaryIO, name: str) -> bytes:
    """What a file holds, of this name. UserError where that is more than a text ever is: /dev/zero has no end."""
    data = file.read(MAX_TEXT_BYTES + 1)
    if len(data) > MAX_TEXT_BYTES:
        raise UserError(f"{name} holds more than {gb(MAX_TEXT_BYTES)}; give a part of it")
    return data


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def lock_temporary(path: Path, is_folder: bool = False) -> int:
    """Opens the temporary file or folder `path`, creating it, and locks it; returns the descriptor that holds the lock.

    What a killed run left there is found unlocked and taken over. UserError when another run is at work on it.
    """
    while True:
        if is_folder:
            path.mkdir(exist_ok=True)
        descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise UserError(f"another run is writing {path}; wait for it to end") from error
        except OSError:
            pass  # a file system without locks
        try:
            if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                return descriptor
        except FileNotFoundError:
            pass
        os.close(descriptor)  # the run that had it has just renamed it


def sync_folder(folder: Path) -> None:
    """Flushes a folder to the disk, so that a rename in it survives a crash."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def write_atomically(path: Path | str) -> Iterator[BinaryIO]:
    """`with write_atomically(path) as file: file.write(...)`: the file appears, or replaces the old one, as a whole."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    descriptor = lock_temporary(temporary)
    with os.fdopen(descriptor, "wb") as file:
        try:
            file.truncate(0)
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.rename(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    sync_folder(path.parent)


def link_or_copy(path: Path, new: Path) -> None:
    try:
        os.link(path, new)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, new)


def replace_folder(path: Path, check: Callable[[Path], None], write: Callable[[Path], None]) -> None:
    """Lets `write` fill a temporary folder, then puts it in the place of `path`, which `check` may refuse."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = path.with_name(f".{path.name}.converting"), path.with_name(f".{path.name}.old")
    lock = lock_temporary(temporary, is_folder=True)
    try:
        if old.exists():  # left by a killed run, between the renames below or after them
            if path.exists():
                shutil.rmtree(old)
            else:
                os.rename(old, path)
        check(path)
        for left in temporary.iterdir():
            left.unlink()
        write(temporary)
        sync_folder(temporary)
        if path.exists():
            os.rename(path, old)
        os.rename(temporary, path)
        sync_folder(path.parent)
        if old.exists():
            shutil.rmtree(old)
    except BaseException:
        if old.exists() and not path.exists():
            os.rename(old, path)
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        os.close(lock)


# ---------------------------------------------------------------------------------------------------------------------
# Room


def gb(count: float) -> str:
    """A number of bytes for people: "2.2 GB"."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def check_memory(needed_bytes: int, what: str, device: torch.device | str = "cpu") -> None:
    """UserError, before anything is allocated, when `what` needs more memory than is free on the device."""
    device = torch.device(device)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
    if needed_bytes > free:
        needed = gb(needed_bytes)
        raise UserError(f"{what} needs {needed}, {gb(free)} are free on {device.type}; take a smaller one")


def check_disk(needed: int, path: Path) -> None:
    """UserError when the disk that `path` will be on has not enough room."""
    existing = next(parent for parent in [path, *path.parents] if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(f"{path} needs {gb(needed)}, {gb(free)} are free there; free some space or take another disk")


def free_memory(root: Path = Path("/")) -> int:
    """Bytes that can still be allocated: what the system has, or the control group's limit where that is less."""
    meminfo = root / "proc" / "meminfo"
    if not meminfo.exists():  # macOS: what is free is not told without a library, so all there is
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    free = int(fields.get("MemAvailable", fields["MemFree"]).split()[0]) * 1024
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        groups = []
    for group in groups:
        _, controllers, inside = group.split(":", 2)
        if controllers == "":
            base, limit, usage, prefix = root / "sys/fs/cgroup", "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):
            base, limit, usage = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            prefix = "total_"
        else:
            continue
        # Any group above may set the limit; in a container the outer part of the path does not exist.
        here = base / inside.lstrip("/")
        for folder in [here, *here.parents]:
            try:
                most, used = (folder / limit).read_text().strip(), int((folder / usage).read_text())
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                # Cached files, mapped weights among them, give way; they do not count as used.
                used -= int(stat.get(f"{prefix}inactive_file", 0)) + int(stat.get(f"{prefix}active_file", 0))
                if most != "max":
                    free = min(free, max(int(most) - used, 0))
            except (OSError, ValueError):
                pass
            if folder == base:
                break
    return free
