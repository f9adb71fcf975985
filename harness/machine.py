"""The machine: this process's settings, its device, its memory, and its description."""

import ctypes
import importlib.metadata
import platform
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import psutil
import torch

from harness.errors import UsageError

M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1  # of glibc's mallopt
PACKAGES = "torch gymnasium mujoco numpy tyro wandb stable_baselines3".split()


def configure_process(torch_threads: int):
    """Threads and numbers of the whole process."""
    torch.set_num_threads(torch_threads)
    # networks that start at zero are full of denormal numbers, which are slow
    torch.set_flush_denormal(True)
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        # freed memory is kept: else each update faults 1,300 pages in again
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)
        libc.mallopt(M_TRIM_THRESHOLD, 2**30)


def choose_device(cuda: bool) -> torch.device:
    """The GPU, if it is wanted and there is one."""
    return torch.device("cuda" if cuda and torch.cuda.is_available() else "cpu")


def check_memory(what: str, bytes_needed: int, device: torch.device):
    """Raises: UsageError where the device can't hold so much without swapping."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = psutil.virtual_memory().available
    if bytes_needed > free:
        need, have = f"{bytes_needed / 1e9:.1f} GB", f"{free / 1e9:.1f} GB"
        text = f"needs {need}, more than the {have} free, on {device}"
        raise UsageError(f"{what} {text}")


def describe_machine(device: torch.device) -> dict:
    """What a reader needs to reproduce a run: commit, versions, hardware."""
    return {
        "git_commit": git_commit(),
        "versions": {
            x: importlib.metadata.version(x) for x in PACKAGES if find_spec(x)
        },
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
    }


def git_commit() -> str:
    """The commit of these files, "+changes" if they differ from it; "" without git."""
    if not shutil.which("git"):
        return ""
    words = "describe --always --abbrev=40 --exclude=* --dirty=+changes".split()
    command = ["git", "-C", str(Path(__file__).parent), *words]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def cpu_name() -> str:
    """The processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    found = re.search(r"model name\s*: (.*)", text)
    return found[1] if found else platform.processor()
