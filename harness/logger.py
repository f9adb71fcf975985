"""Where a run's numbers go: metrics.csv, TensorBoard, Weights & Biases and the progress bar."""

import os
import re
import sys
import time
from pathlib import Path

from tqdm import tqdm

from harness.args import RunArgs
from harness.files import RunError, UsageError


class Logger:
    """Writes every number to all of them; knows the training time over all sessions of a run."""

    def __init__(self, args: RunArgs, run_dir: Path, description: dict, resumed: dict | None):
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        step, seconds = (resumed["step"], resumed["seconds"]) if resumed else (0, 0.0)
        self.start = time.perf_counter() - seconds
        self.last = (step, seconds)
        self.csv = MetricsFile(run_dir / "metrics.csv", resumed and resumed["csv_bytes"])
        self.tensorboard = SummaryWriter(str(run_dir), purge_step=step + 1 if resumed else None)
        self.wandb = start_wandb(args, run_dir, description) if args.track else None
        often = 0.1 if sys.stderr.isatty() else 30  # seconds
        self.bar = tqdm(total=args.total_timesteps, initial=step, unit="step", mininterval=often)

    def seconds(self) -> float:
        """Training time so far, over all sessions of a resumed run."""
        return time.perf_counter() - self.start

    def log(self, step: int, values: dict[str, float]):
        self.csv.write(step, self.seconds(), values)
        for name, value in values.items():
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
        if returns != self.__dict__.get("shown"):
            self.shown = returns
            self.bar.set_postfix({k: f"{v:.1f}" for k, v in returns.items()}, refresh=False)
        self.bar.update()

    def state_dict(self) -> dict:
        return {"csv_bytes": self.csv.position(), "seconds": self.seconds()}

    def close(self):
        self.bar.close()
        self.csv.file.close()
        self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()


class MetricsFile:
    """metrics.csv: step,seconds,name,value; a resumed run writes on where its checkpoint was."""

    def __init__(self, path: Path, resumed_bytes: int | None):
        self.path = path
        self.file = open(path, "xb" if resumed_bytes is None else "r+b", buffering=0)
        if resumed_bytes is None:
            self.file.write(b"step,seconds,name,value\n")
            return
        if path.stat().st_size < resumed_bytes:
            raise RunError(f"{path} is shorter than when the checkpoint was written")
        self.file.truncate(resumed_bytes)  # later rows are written again, with the same values
        self.file.seek(0, os.SEEK_END)

    def write(self, step: int, seconds: float, values: dict[str, float]):
        """Adds a row for each value. Raises: RunError."""
        rows = "".join(f"{step},{seconds:.3f},{name},{value!r}\n" for name, value in values.items())
        try:
            complete = self.file.write(rows.encode()) == len(rows)
        except OSError as error:
            raise RunError(f"can't write {self.path}: {error.strerror}") from None
        if not complete:
            raise RunError(f"can't write {self.path}: the disk is full")

    def position(self) -> int:
        os.fsync(self.file.fileno())
        return self.file.tell()


def start_wandb(args: RunArgs, run_dir: Path, description: dict):
    """The Weights & Biases run; a resumed run goes on in the same one. Raises: UsageError."""
    import wandb  # only here: training needs neither the package nor an account

    try:
        run = wandb.init(
            project=args.wandb_project_name,
            entity=args.wandb_entity,
            name=run_dir.name,
            id=re.sub(r"[^\w-]", "-", run_dir.name),
            resume="allow",
            config=description | description["args"],
            dir=str(run_dir),
        )
    except wandb.Error as error:
        hint = "run `wandb login`, set WANDB_MODE=offline or leave out --track"
        raise UsageError(f"Weights & Biases can't start ({error}): {hint}") from None
    run.define_metric("*", step_metric="global_step")
    return run
