"""Whether there is room for something, in memory or on a disk, told before it is begun.

check_memory(2_000_000_000, "the weights", device)
check_disk(2_000_000_000, path)
"""

import os
import shutil
from pathlib import Path

import torch

from errors import UserError


def gb(count: float) -> str:
    """Bytes as people read them: "2.2 GB"."""
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
