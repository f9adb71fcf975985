"""Files of a run: written atomically, checked when they are read."""

import os
import zipfile
from pathlib import Path

import torch
from torch import nn

from harness.errors import RunError, UsageError

POLICY_FILES = ("policy_final.pt", "checkpoint.pt")


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
        kept = (
            "the previous one is intact" if path.exists() else "there is no earlier one"
        )
        reason = error.__context__ or error  # torch's RuntimeError hides the OSError
        raise RunError(f"can't write {path} ({reason}); {kept}") from None


def load_file(
    option: str, path: str | Path, program: str, names=("checkpoint.pt",)
) -> dict:
    """A checkpoint or policy, and its "path". Raises: UsageError, RunError."""
    candidates = (
        [Path(path, name) for name in names] if Path(path).is_dir() else [Path(path)]
    )
    file = next(filter(Path.is_file, candidates), None)
    if file is None:
        raise UsageError(
            f"{option} {path}: there is no {' or '.join(map(str, candidates))}"
        )
    try:
        with zipfile.ZipFile(file) as archive:
            if (
                damaged := archive.testzip()
            ):  # torch.load itself doesn't compare the checksums
                raise zipfile.BadZipFile(damaged)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise RunError(f"can't read {file}: {error.strerror}") from None
    except Exception as error:  # a damaged file can make the unpickler raise anything
        raise RunError(
            f"{file} is damaged or not a checkpoint ({type(error).__name__})"
        ) from None
    known = isinstance(content, dict) and "args" in content
    if not known or content.get("format") != program:
        text = f"{file} was not written by this version of {program}.py"
        if known and "format" in content:
            text += f" but by {content['format']}.py"
        raise RunError(text)
    return content | {"path": file}


def other_version(content: dict) -> RunError:
    """What to raise where a file's networks aren't those of the script."""
    text = f"was not written by this version of {content['format']}.py"
    return RunError(f"{content['path']} {text}")


def load_network(network: nn.Module, saved: dict, name: str):
    """Gives a network the numbers of a checkpoint or policy. Raises: RunError."""
    try:
        network.load_state_dict(saved[name])
    except RuntimeError:  # PyTorch's answer to other names or shapes
        raise other_version(saved) from None
