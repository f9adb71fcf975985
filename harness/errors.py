"""What ends a command: each message is one sentence for the user."""

import sys

import numpy as np
import torch
from tqdm import tqdm


class UsageError(Exception):
    """The command can't be carried out as given (exit code 2)."""


class RunError(Exception):
    """The run can't go on (exit code 1)."""


class UserCodeError(RunError):
    """The user's own code raised an error, the cause: its traceback is shown."""


def say(text: str):
    """Writes lines to stderr, above the progress bar if there is one."""
    tqdm.write(text, file=sys.stderr)


def check_finite(place: str, step: int, **values):
    """Raises: RunError for the first of these numbers that is NaN or infinite."""
    for name, value in values.items():
        # on small arrays NumPy is faster
        library = torch if isinstance(value, torch.Tensor) else np
        if not library.isfinite(value).all():
            value = np.asarray(torch.as_tensor(value).cpu())
            index = np.argwhere(~np.isfinite(value))[0].tolist()
            where = index or ""
            raise RunError(
                f"{place}: {name}{where} = {value[tuple(index)]} at step {step}"
            )


def is_memory_error(error: Exception) -> bool:
    """Whether memory was all that was missing, on a CPU or a GPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
