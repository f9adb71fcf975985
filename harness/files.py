"""Files of a run: written atomically, checked when they are read."""

import importlib.metadata
import os
import platform
import re
import subprocess
import zipfile
from importlib.util import find_spec
from pathlib import Path

import torch


class UsageError(Exception):
    """The command can't be carried out as given (exit code 2)."""


class RunError(Exception):
    """The run can't go on (exit code 1)."""


def save_file(path: Path, content: dict, program: str):
    """Writes atomically: `path` holds the old content or the new. Raises: RunError."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(exist_ok=True)
        with open(temporary, "wb") as f:
            torch.save({"format": program, **content}, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        kept = "the previous one is intact" if path.exists() else "there is no earlier one"
        raise RunError(f"can't write {path} ({error}); {kept}") from None


def load_file(path: Path, program: str) -> dict:
    """Reads a checkpoint or a policy. Raises: RunError if it is damaged or of another program."""
    try:
        file = open(path, "rb")
    except OSError as error:
        raise RunError(f"can't read {path}: {error.strerror}") from None
    try:
        with file, zipfile.ZipFile(file) as archive:
            if damaged := archive.testzip():  # torch.load itself doesn't compare the checksums
                raise zipfile.BadZipFile(damaged)
            file.seek(0)
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can make the unpickler raise anything
        raise RunError(f"{path} is damaged or not a checkpoint ({type(error).__name__})") from None
    if not isinstance(content, dict) or content.get("format") != program or "args" not in content:
        raise RunError(f"{path} was not written by this version of {program}.py")
    return content


def find_checkpoint(path: str) -> Path:
    return find_file("--resume", path, ["checkpoint.pt"])


def find_policy(path: str, option: str = "--evaluate") -> Path:
    return find_file(option, path, ["policy_final.pt", "checkpoint.pt", "policy_best.pt"])


def find_file(option: str, path: str, names: list[str]) -> Path:
    """The file itself, or the first of these names in the folder. Raises: UsageError."""
    folder = Path(path)
    candidates = [folder / name for name in names] if folder.is_dir() else [folder]
    if found := [file for file in candidates if file.is_file()]:
        return found[0]
    raise UsageError(f"{option} {path}: there is no {' or '.join(map(str, candidates))}")


def git(*words: str) -> str:
    """What git says of this repository; empty where there is none."""
    command = ["git", "-C", str(Path(__file__).parent), *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def describe_machine(device: torch.device, compiled: bool) -> dict:
    """What a reader needs to reproduce a run beside its settings: commit, versions, hardware."""
    changes = "+changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    packages = "torch gymnasium mujoco numpy tyro wandb stable_baselines3".split()
    cpuinfo = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return {
        "git_commit": git("rev-parse", "HEAD") + changes,
        "versions": {p: importlib.metadata.version(p) for p in filter(find_spec, packages)},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu[1] if cpu else platform.processor(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "compiled": compiled,
    }
