"""The replay buffer of one environment."""

import numpy as np
import psutil
import torch
from torch import Tensor

from harness.files import UsageError


def check_memory(capacity: int, bytes_needed: int, device: torch.device):
    """Raises: UsageError where the device can't hold so much without swapping."""
    cuda = device.type == "cuda"
    free = (
        torch.cuda.mem_get_info(device)[0]
        if cuda
        else psutil.virtual_memory().available
    )
    if bytes_needed > free:
        gb = f"{bytes_needed / 1e9:.1f} GB, more than the {free / 1e9:.1f} GB free"
        raise UsageError(
            f"--buffer-size {capacity}: the replay buffer needs {gb} on {device}"
        )


class ReplayBuffer:
    """Ring of rows obs | action | next_obs | reward | terminated on the training device.

    Time-outs are stored with terminated = 0: the target bootstraps through them. `batch` (B, row)
    is the tensor that every sample fills; `split_batch` cuts it into the five parts.
    """

    def __init__(
        self, capacity: int, obs_dim: int, act_dim: int, batch_size: int, device="cpu"
    ):
        widths = [obs_dim, act_dim, obs_dim, 1, 1]
        check_memory(capacity, 4 * capacity * sum(widths), torch.device(device))
        self.capacity, self.added = capacity, 0
        self.rows = torch.empty(capacity, sum(widths), device=device)
        self.row = torch.empty(sum(widths), pin_memory=self.rows.is_cuda)
        self.parts = np.split(self.row.numpy(), np.cumsum(widths)[:-1])
        self.batch = torch.zeros(batch_size, sum(widths), device=device)

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
        index = torch.from_numpy(rng.integers(0, len(self), len(self.batch)))
        return torch.index_select(
            self.rows, 0, index.to(self.rows.device), out=self.batch
        )

    def state_dict(self) -> dict:
        filled = (
            self.rows[: len(self)].cpu().numpy()
        )  # by way of NumPy, or torch saves all rows
        return {"added": self.added, "rows": torch.from_numpy(filled)}

    def load_state_dict(self, state: dict):
        self.added = state["added"]
        self.rows[: len(self)].copy_(state["rows"])


def split_batch(batch: Tensor, obs_dim: int, act_dim: int) -> tuple[Tensor, ...]:
    """Rows (B, ...) -> obs (B, S), action (B, A), next_obs (B, S), reward, terminated (B,)."""
    widths = [obs_dim, act_dim, obs_dim, 1, 1]
    *vectors, reward, terminated = batch.split(widths, dim=-1)
    return *vectors, reward[:, 0], terminated[:, 0]
