"""Replay buffers: of one environment, and of many that are stepped together."""

import numpy as np
import psutil
import torch
from torch import Tensor

from harness.files import UsageError


def check_memory(capacity: int, bytes_needed: int, device: torch.device):
    """Raises: UsageError where the device can't hold so much without swapping."""
    cuda = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if cuda else psutil.virtual_memory().available
    if bytes_needed > free:
        gb = f"{bytes_needed / 1e9:.1f} GB, more than the {free / 1e9:.1f} GB free"
        raise UsageError(f"--buffer-size {capacity}: the replay buffer needs {gb} on {device}")


class ReplayBuffer:
    """Ring of rows obs | action | next_obs | reward | terminated on the training device.

    Time-outs are stored with terminated = 0: the target bootstraps through them. `batch` (B, row)
    is the tensor that every sample fills; `split` cuts it into the five parts.
    """

    def __init__(self, capacity: int, obs_dim: int, act_dim: int, batch_size: int, device="cpu"):
        device = torch.device(device)
        self.widths = [obs_dim, act_dim, obs_dim, 1, 1]
        self.capacity, self.added = capacity, 0
        check_memory(capacity, 4 * capacity * sum(self.widths), device)
        pinned = dict(pin_memory=device.type == "cuda")
        self.rows = torch.empty(capacity, sum(self.widths), device=device)
        self.row = torch.empty(sum(self.widths), **pinned)
        self.parts = np.split(self.row.numpy(), np.cumsum(self.widths)[:-1])
        self.batch = torch.zeros(batch_size, sum(self.widths), device=device)
        self.index = torch.zeros(batch_size, dtype=torch.int64, **pinned)
        self.device_index = self.index.to(device)

    def __len__(self) -> int:
        return min(self.added, self.capacity)

    def add(self, *transition):
        """Stores obs (S,), action (A,), next_obs (S,), reward, terminated."""
        for part, value in zip(self.parts, transition, strict=True):
            part[:] = value
        self.rows[self.added % self.capacity].copy_(self.row)
        self.added += 1

    def sample(self, rng: np.random.Generator) -> Tensor:
        """`batch` (B, row), filled with transitions drawn uniformly with replacement."""
        self.index.numpy()[:] = rng.integers(0, len(self), len(self.index))
        self.device_index.copy_(self.index, non_blocking=True)
        return torch.index_select(self.rows, 0, self.device_index, out=self.batch)

    def state_dict(self) -> dict:
        filled = self.rows[: len(self)].cpu().numpy()  # by way of NumPy, or torch saves all rows
        return {"added": self.added, "rows": torch.from_numpy(filled)}

    def load_state_dict(self, state: dict):
        self.added = state["added"]
        self.rows[: len(self)].copy_(state["rows"])


def split_batch(batch: Tensor, obs_dim: int, act_dim: int) -> tuple[Tensor, ...]:
    """Rows (B, ...) -> obs (B, S), action (B, A), next_obs (B, S), reward, terminated (B,)."""
    widths = [obs_dim, act_dim, obs_dim, 1, 1]
    obs, action, next_obs, reward, terminated = batch.split(widths, dim=-1)
    return obs, action, next_obs, reward[:, 0], terminated[:, 0]
