"""Where a run's numbers go: metrics.csv, TensorBoard, W&B and the progress bar."""

import os
import re
import sys
import threading
import time
from pathlib import Path

from tqdm import tqdm

from harness.args import RunArgs
from harness.errors import RunError, UsageError, say


class Logger:
    """Writes every number to all of them; knows a run's time over all its sessions."""

    def __init__(
        self, args: RunArgs, folder: Path, description: dict, resumed: dict | None
    ):
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        saved = resumed or {"step": 0, "seconds": 0.0, "csv_bytes": 0}
        step, now = saved["step"], time.perf_counter()
        self.start, self.last = now - saved["seconds"], (step, now)
        self.csv = open(folder / "metrics.csv", "a", buffering=1)
        if self.csv.tell() < saved["csv_bytes"]:
            raise RunError(
                f"{self.csv.name} is shorter than when the checkpoint was written"
            )
        self.csv.truncate(
            self.csv.seek(saved["csv_bytes"])
        )  # what follows is written again
        if not resumed:
            self.csv.write("step,seconds,name,value\n")
        self.report, threading.excepthook = threading.excepthook, self.thread_failed
        self.tensorboard = SummaryWriter(str(folder), purge_step=step + 1)
        self.wandb = start_wandb(args, folder, description) if args.track else None
        often = 0.1 if sys.stderr.isatty() else 30  # seconds
        self.bar = tqdm(
            total=args.total_timesteps, initial=step, unit="step", mininterval=often
        )

    def log(self, step: int, values: dict[str, float]):
        seconds = time.perf_counter() - self.start
        for name, value in values.items():
            self.csv.write(f"{step},{seconds:.3f},{name},{value!r}\n")
            self.tensorboard.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log({"global_step": step, **values})

    def thread_failed(self, failure):
        """Reports it, but for TensorBoard's thread: `add_scalar` raises that too."""
        if not type(failure.thread).__module__.startswith("tensorboard."):
            self.report(failure)

    def speed(self, step: int) -> float:
        """Steps per second since the last call, evaluations included."""
        (last_step, last_time), self.last = self.last, (step, time.perf_counter())
        return (step - last_step) / max(self.last[1] - last_time, 1e-9)

    def show(self, step: int, returns: dict[str, float]):
        """Moves the progress bar to this step, with these returns."""
        if step % 50 == 0 or step == self.bar.total:  # it takes 40 us
            texts = {name: f"{value:.1f}" for name, value in returns.items()}
            self.bar.set_postfix(texts, refresh=False)
        self.bar.update()

    def pause(self, seconds: float):
        """Leaves time out of the bar's rate and remaining time."""
        self.bar.start_t += seconds
        self.bar.last_print_t += seconds

    def refresh(self):
        """Draws the bar as it is now."""
        self.bar.refresh()

    def state_dict(self) -> dict:
        os.fsync(self.csv.fileno())
        return {
            "csv_bytes": self.csv.tell(),
            "seconds": time.perf_counter() - self.start,
        }

    def close(self):
        for part in (self.bar, self.csv, self.tensorboard):
            part.close()
        threading.excepthook = self.report
        if self.wandb:
            self.wandb.finish()


class SlowProgress:
    """Says every few seconds how far something is that rarely takes long."""

    def __init__(self, seconds: float = 10):
        self.seconds, self.last = seconds, time.perf_counter()

    def show(self, text: str):
        if time.perf_counter() - self.last > self.seconds:
            say(text)
            self.last = time.perf_counter()


def start_wandb(args: RunArgs, folder: Path, description: dict):
    """The W&B run; a resumed run goes on in the same one. Raises: UsageError."""
    import wandb  # only here: training needs neither the package nor an account

    names = dict(
        project=args.wandb_project_name, entity=args.wandb_entity, name=folder.name
    )
    names |= dict(
        id=re.sub(r"[^\w-]", "-", folder.name), resume="allow", dir=str(folder)
    )
    try:
        run = wandb.init(**names, config=description | description["args"])
    except wandb.Error as error:
        hint = "run `wandb login`, set WANDB_MODE=offline or leave out --track"
        raise UsageError(f"Weights & Biases can't start ({error}): {hint}") from None
    run.define_metric("*", step_metric="global_step")
    return run
