"""Where a run's numbers go: metrics.csv, TensorBoard, Weights & Biases and the progress bar."""

import os
import re
import sys
import threading
import time
from pathlib import Path

from tqdm import tqdm

from harness.args import RunArgs
from harness.files import RunError, UsageError


class Logger:
    """Writes every number to all of them; knows the training time over all sessions of a run."""

    def __init__(self, args: RunArgs, folder: Path, description: dict, resumed: dict | None):
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        step, seconds = (resumed["step"], resumed["seconds"]) if resumed else (0, 0.0)
        self.start, self.last = time.perf_counter() - seconds, (step, seconds)
        self.csv = open_metrics(folder / "metrics.csv", resumed and resumed["csv_bytes"])
        threading.excepthook = silence_full_disk
        self.tensorboard = SummaryWriter(str(folder), purge_step=step + 1 if resumed else None)
        self.wandb = start_wandb(args, folder, description) if args.track else None
        often = 0.1 if sys.stderr.isatty() else 30  # seconds
        self.bar = tqdm(total=args.total_timesteps, initial=step, unit="step", mininterval=often)

    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def log(self, step: int, values: dict[str, float]):
        for name, value in values.items():
            self.csv.write(f"{step},{self.seconds():.3f},{name},{value!r}\n")
            self.tensorboard.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log({"global_step": step, **values})

    def speed(self, step: int) -> float:
        """Steps per second since the last call, evaluations included."""
        (last_step, last_seconds), now = self.last, self.seconds()
        self.last = (step, now)
        return (step - last_step) / max(now - last_seconds, 1e-9)

    def show(self, **returns: float):
        """One step more on the progress bar, with these returns."""
        if self.bar.n % 50 == 0 or self.bar.n == self.bar.total - 1:  # it takes 40 us
            self.bar.set_postfix({k: f"{v:.1f}" for k, v in returns.items()}, refresh=False)
        self.bar.update()

    def state_dict(self) -> dict:
        os.fsync(self.csv.fileno())
        return {"csv_bytes": self.csv.tell(), "seconds": self.seconds()}

    def close(self):
        for part in (self.bar, self.csv, self.tensorboard):
            part.close()
        if self.wandb:
            self.wandb.finish()


def silence_full_disk(args):
    """TensorBoard's thread hands its OSError to `add_scalar` or `close`, which report it."""
    if not isinstance(args.exc_value, OSError):
        threading.__excepthook__(args)


def open_metrics(path: Path, resumed_bytes: int | None):
    """metrics.csv, step,seconds,name,value; a resumed run writes on where its checkpoint was."""
    file = open(path, "a", buffering=1)
    if resumed_bytes is None:
        file.write("step,seconds,name,value\n")
    elif file.tell() < resumed_bytes:
        raise RunError(f"{path} is shorter than when the checkpoint was written")
    else:
        file.truncate(file.seek(resumed_bytes))  # later rows are written again, the same ones
    return file


def start_wandb(args: RunArgs, folder: Path, description: dict):
    """The Weights & Biases run; a resumed run goes on in the same one. Raises: UsageError."""
    import wandb  # only here: training needs neither the package nor an account

    names = dict(project=args.wandb_project_name, entity=args.wandb_entity, name=folder.name)
    names |= dict(id=re.sub(r"[^\w-]", "-", folder.name), resume="allow", dir=str(folder))
    try:
        run = wandb.init(**names, config=description | description["args"])
    except wandb.Error as error:
        hint = "run `wandb login`, set WANDB_MODE=offline or leave out --track"
        raise UsageError(f"Weights & Biases can't start ({error}): {hint}") from None
    run.define_metric("*", step_metric="global_step")
    return run
