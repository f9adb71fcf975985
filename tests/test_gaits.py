"""tools/gaits.py, stride.py and same_update.py: statistics by hand, a known stride, twins."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

for package in ("matplotlib", "pandas", "scipy"):
    pytest.importorskip(package)
sys.path.insert(0, str(ROOT / "tools"))

import same_update  # noqa: E402
import stride  # noqa: E402

import meow_continuous_action as meow  # noqa: E402
from harness.functional import Hardware  # noqa: E402


def write_arm(folder, name, runs, step=90_000):
    """runs: (return, stride) of seeds 1, 2, ... at `step`, each after a row of an earlier one."""
    rows = ["seed,step,return,stride"]
    for seed, (value, hertz) in enumerate(runs, 1):
        rows += [
            f"{seed},{step - 10_000},{value - 100},3.0",
            f"{seed},{step},{value},{hertz}",
        ]
    (folder / f"{name}.csv").write_text("\n".join(rows) + "\n")


def gaits(folder, *words):
    command = [sys.executable, ROOT / "tools" / "gaits.py", folder, *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_shares_and_probabilities_are_those_worked_out_by_hand(tmp_path):
    write_arm(tmp_path, "ours", [(5000, 3.84), (5100, 3.86), (5200, 4.5), (5300, 5.0)])
    write_arm(tmp_path, "better", [(6000 + 10 * i, 3.0 + 0.1 * i) for i in range(5)])
    done = gaits(tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "gaits.md").read_text() == done.stdout
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in done.stdout.splitlines()
    ]
    # Clopper-Pearson for 5 of 5: low^5 = 0.025; for 1 of 4: (1 - low)^4 = 0.975 and, with
    # high = 0.806, (1 - high)^4 + 4 high (1 - high)^3 = 0.025
    assert rows[2] == ["ours", "4", "1 of 4", f"{1 - 0.975 ** (1 / 4):.0%}".replace("%", " %")
                       + " to 81 %", "", "5150", ""]  # fmt: skip
    # Fisher: of the tables with 6 long and 3 short of 9, those at most as likely as this one
    ways = [math.comb(4, k) * math.comb(5, 6 - k) for k in range(1, 5)]
    fisher = sum(w for w in ways if w <= ways[0]) / math.comb(9, 6)
    ranks = 2 / math.comb(9, 4)  # Mann-Whitney: complete separation, two-sided
    low = f"{0.025 ** (1 / 5):.0%}".replace("%", " %")
    assert rows[3] == ["better", "5", "5 of 5", f"{low} to 100 %", f"{fisher:.2f}", "6020",
                       f"{ranks:.2f}"]  # fmt: skip
    assert rows[5] == ["seed", "ours", "better"]
    assert rows[8] == ["2", "5100, 3.86 Hz", "6010, 3.10 Hz"]
    assert [row[0] for row in rows[9:]] == ["3", "4", "5"]
    assert rows[-1][1] == ""
    assert (tmp_path / "gaits.png").stat().st_size > 1000


def test_small_probabilities_are_not_rounded_to_zero(tmp_path):
    """Two arms of 6, all long and higher: Fisher and Mann-Whitney give 2 / C(12, 6) = 0.002."""
    write_arm(tmp_path, "ours", [(5000 + i, 4.5) for i in range(6)])
    write_arm(tmp_path, "better", [(6000 + i, 3.0) for i in range(6)])
    better = gaits(tmp_path).stdout.splitlines()[3]
    assert better.count("| < 0.01 |") == 2


def test_seeds_may_have_letters_and_come_in_their_order(tmp_path):
    rows = "\n".join(f"{seed},90000,5000,3.0" for seed in ["5x", "10", "9", "5"])
    (tmp_path / "ours.csv").write_text(f"seed,step,return,stride\n{rows}\n")
    lines = gaits(tmp_path).stdout.splitlines()
    assert [line.split()[1] for line in lines[6:]] == ["5", "9", "10", "5x"]


def test_another_step_compares_that_step_and_a_missing_base_is_said(tmp_path):
    write_arm(tmp_path, "ours", [(5000, 5.0), (5100, 5.0)])
    early = gaits(tmp_path, "--step", "80000").stdout
    assert "| ours | 2 | 2 of 2 | 16 % to 100 % |  | 4950 |  |" in early
    missing = gaits(tmp_path, "--base", "theirs")
    assert (missing.returncode, missing.stderr.count("\n")) == (2, 1)
    assert "theirs.csv" in missing.stderr


def test_the_stride_is_the_strongest_frequency_of_the_last_800_steps():
    time = 0.05 * np.arange(1001)
    angle = 0.3 + np.sin(2 * np.pi * 3.25 * time) + 0.5 * np.sin(2 * np.pi * 6.5 * time)
    angle[:200] += 5 * np.sin(2 * np.pi * 1.5 * time[:200])  # getting started
    assert stride.stride_frequency(angle) == pytest.approx(3.25)


def test_a_policy_is_measured_by_the_thigh_that_is_asked_for(monkeypatch):
    """The back thigh swings at 4.5 Hz and the front one at 2.25 Hz, the others at 1 Hz."""

    class Evaluator:
        args, policy = meow.Args(env_id="HalfCheetah-v4"), staticmethod(lambda *_: None)

        def run(self, *_):
            for t in 0.05 * np.arange(1000):
                obs = np.sin(2 * np.pi * t) * torch.ones(3, 17)
                obs[:, 2], obs[:, 5] = (
                    np.sin(2 * np.pi * 4.5 * t),
                    np.sin(2 * np.pi * 2.25 * t),
                )
                self.policy(obs, None)
            return [7.0, 8.0, 9.0], None

    monkeypatch.setattr(stride, "load_evaluator", lambda *_: (Evaluator(), 90_000))
    assert stride.measure("policy.pt", 3) == (90_000, 8.0, pytest.approx(4.5))
    assert stride.measure("policy.pt", 3, "front") == (90_000, 8.0, pytest.approx(2.25))


def test_each_q_of_two_masks_has_its_own():
    args = meow.Args(env_id="HalfCheetah-v4", dropout=0.5)
    flow = meow.make_flow(args, 3, 2)
    one, rng = meow.Keep(4, 2, 8, 64, dropout=0.5), np.random.default_rng(1)
    obs, action, masks, expected = torch.randn(8, 3), torch.rand(8, 2), [], []
    for k in range(2):
        one.fill(rng)
        masks.append(one.tensor.clone())
        expected.append(flow.q_values(obs, action, masks[k])[:, k])
    flow.__class__ = same_update.TwoMasks
    found = flow.q_values(obs, action, torch.cat(masks, dim=2))
    torch.testing.assert_close(found, torch.stack(expected, -1))
    assert not torch.equal(*masks)
    torch.testing.assert_close(
        flow.q_values(obs, action), meow.EnergyFlow.q_values(flow, obs, action)
    )


def test_each_arm_differs_in_what_it_is_named_after(monkeypatch, capsys):
    monkeypatch.setattr(same_update, "Hardware", lambda *_: Hardware(False, 1, False))
    args = meow.Args(env_id="HalfCheetah-v4")
    arms = {
        n: same_update.make_arm(n, args, None) for n in ("ours", "two masks", "bf16")
    }
    assert [type(arm.flow) for arm in arms.values()] == [
        meow.EnergyFlow,
        same_update.TwoMasks,
        meow.EnergyFlow,
    ]
    assert [arm.flow.b[0].bf16 for arm in arms.values()] == [False, False, True]
    batch = torch.rand(args.batch_size, same_update.ROW)
    values = []
    for arm in arms.values():
        for _ in range(3):
            arm.update(batch)
        values.append(arm.q_v_next(batch[:, :17], batch[:, 17:23], batch[:, 23:40])[0])
    assert all(
        (values[0] - other).abs().max() > 1e-5 for other in values[1:]
    )  # not the same arm
    torch.testing.assert_close(
        values[0], values[2], rtol=0.02, atol=0.02
    )  # bf16 rounds
    monkeypatch.setattr(sys, "argv", ["same_update.py", "runs/x"])
    assert same_update.exit_code(same_update.main) == 2
    assert "--repository" in capsys.readouterr().err


def test_twins_of_a_doubled_batch_become_columns():
    x = torch.arange(3.0)[:, None]
    both = same_update.Theirs.twice(
        lambda doubled: doubled + torch.arange(6)[:, None] // 3 * 10, x
    )
    assert both.tolist() == [[0, 10], [1, 11], [2, 12]]


def test_a_measurement_is_the_squared_td_error_and_its_share():
    rows = torch.zeros(4, same_update.ROW)
    rows[:, -2], rows[3, -1] = (
        torch.tensor([1.0, 2, 3, 4]),
        1,
    )  # rewards; the last one terminated
    y = torch.tensor([5.0, 6, 7, 4])  # r + 0.5 min(10, 8), or r
    v = torch.tensor([[2.0, 3], [2, 3], [2, 3], [9, 3]])

    class Arm:
        def q_v_next(self, *_):
            q = torch.stack([y - 1, y + 3], -1)
            return q, v, torch.tensor([[10.0, 8]] * 4), torch.tensor([[-1.0, 0.5]] * 4)

    error, share, log_sigma = same_update.measure(Arm(), rows, 0.5)
    assert (error, log_sigma) == (5, -0.25)
    assert share == pytest.approx(5 / np.var([3, 4, 5, 1], ddof=1))  # of y - min_k V_k
