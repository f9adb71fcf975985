"""Files of a run: written atomically, checked when they are read."""

import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
import zipfile
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
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # torch.load itself doesn't compare the checksums
                raise zipfile.BadZipFile(damaged)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise RunError(f"can't read {path}: {error.strerror}") from None
    except Exception as error:  # a damaged file can make the unpickler raise anything
        raise RunError(f"{path} is damaged or not a checkpoint ({type(error).__name__})") from None
    if not isinstance(content, dict) or content.get("format") != program or "args" not in content:
        raise RunError(f"{path} was not written by this version of {program}.py")
    return content


def find_policy(path: str, option: str = "--evaluate") -> Path:
    return find_file(option, path, ["policy_final.pt", "checkpoint.pt"])


def find_file(option: str, path: str, names: list[str]) -> Path:
    """The file itself, or the first of these names in the folder. Raises: UsageError."""
    candidates = [Path(path, name) for name in names] if Path(path).is_dir() else [Path(path)]
    if found := [file for file in candidates if file.is_file()]:
        return found[0]
    raise UsageError(f"{option} {path}: there is no {' or '.join(map(str, candidates))}")


def git_commit() -> str:
    """The commit, "+changes" where tracked files differ; empty without git."""
    words = "describe --always --abbrev=40 --exclude=* --dirty=+changes".split()
    command = ["git", "-C", str(Path(__file__).parent), *words]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def describe_machine(device: torch.device) -> dict:
    """What a reader needs to reproduce a run beside its settings: commit, versions, hardware."""
    packages = "torch gymnasium mujoco numpy tyro wandb stable_baselines3".split()
    installed = filter(importlib.util.find_spec, packages)
    cpuinfo = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return {
        "git_commit": git_commit(),
        "versions": {package: importlib.metadata.version(package) for package in installed},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu[1] if cpu else platform.processor(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
    }
