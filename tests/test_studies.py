"""The instruments of studies/: statistics by hand, a known stride, twins, tables."""

import io
import math
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT

for package in ("matplotlib", "pandas", "scipy"):
    pytest.importorskip(package)
STUDIES = ROOT / "studies"
sys.path.insert(0, str(STUDIES / "two_gaits"))

import gaits  # noqa: E402
import pandas as pd  # noqa: E402
import same_update  # noqa: E402
import same_update_table  # noqa: E402
import stride  # noqa: E402

import meow_continuous_action as meow  # noqa: E402


def write_arm(folder, name, runs, step=90_000):
    """Returns the csv file of runs (return, stride) of seeds 1, 2, ... at `step`.

    Each run also has a row of an earlier step.
    """
    rows = ["seed,step,return,stride"]
    for seed, (value, hertz) in enumerate(runs, 1):
        rows.append(f"{seed},{step - 10_000},{value - 100},3.0")
        rows.append(f"{seed},{step},{value},{hertz}")
    file = folder / f"{name}.csv"
    file.write_text("\n".join(rows) + "\n")
    return file


def run_gaits(out, *words):
    """The exit code of gaits.py and what it prints and complains about."""
    argv = ["gaits.py", *map(str, words), "--out", str(out)]
    printed, said = io.StringIO(), io.StringIO()
    with (
        mock.patch("sys.argv", argv),
        redirect_stdout(printed),
        redirect_stderr(said),
    ):
        code = gaits.main()
    return code, printed.getvalue(), said.getvalue()


def cells(line):
    return [cell.strip() for cell in line.split("|")[1:-1]]


def columns(table):
    """{arm: its other cells} of the first of these tables."""
    head, _, *rows = map(cells, table.split("\n\n")[0].splitlines())
    return dict(zip(head, map(list, zip(*rows, strict=True)), strict=True))


def test_shares_and_probabilities_are_those_worked_out_by_hand(tmp_path):
    ours = [(5000, 3.84), (5100, 3.86), (5200, 4.5), (5300, 5.0)]
    better = [(6000 + 10 * i, 3.0 + 0.1 * i) for i in range(5)]
    files = [write_arm(tmp_path, "ours", ours), write_arm(tmp_path, "better", better)]
    code, table, _ = run_gaits(tmp_path, *files)
    assert code == 0
    assert (tmp_path / "gaits.md").read_text() == table
    arms, runs = columns(table), table.split("\n\n")[1]
    # Clopper-Pearson for 5 of 5: low^5 = 0.025; for 1 of 4: (1 - low)^4 = 0.975 and,
    # with high = 0.806, (1 - high)^4 + 4 high (1 - high)^3 = 0.025
    low = f"{100 * (1 - 0.975 ** (1 / 4)):.0f}"
    assert list(arms) == ["arm", "ours", "better"]
    assert arms["ours"][:3] == ["4", "1 of 4", f"{low} to 81"]
    assert arms["ours"][3:] == ["", "5150", "5000 to 5300", "", "", "0 of 4", ""]
    # Fisher: of the tables with 6 long and 3 short of 9, those at most as likely
    ways = [math.comb(4, k) * math.comb(5, 6 - k) for k in range(1, 5)]
    strides = sum(w for w in ways if w <= ways[0]) / math.comb(9, 6)
    separated = 1 / math.comb(9, 4)  # 5 of 5 fast, and 0 of 4: the only such table
    ranks = 2 * separated  # Mann-Whitney: complete separation, two-sided
    low = f"{100 * 0.025 ** (1 / 5):.0f}"
    better = arms["better"]
    assert better[:3] == ["5", "5 of 5", f"{low} to 100"]
    assert better[3:6] == [f"{strides:.3f}", "6020", "6000 to 6040"]
    # Welch: 870 +- t sqrt(16667 / 4 + 250 / 5), t = 3.14 with 3.07 degrees of freedom
    assert better[6] == "+870 (666 to 1074)"
    assert better[7:] == [f"{ranks:.3f}", "5 of 5", f"{separated:.3f}"]
    rows = [cells(line) for line in runs.splitlines()]
    assert rows[0] == ["seed", "ours", "better"]
    assert rows[3] == ["2", "5100, 3.86 Hz", "6010, 3.10 Hz"]
    assert [row[0] for row in rows[4:]] == ["3", "4", "5"]
    assert rows[-1][1] == ""
    assert (tmp_path / "gaits.png").stat().st_size > 1000


def test_small_probabilities_are_not_rounded_to_zero(tmp_path):
    """Two arms of 8, all long and higher: 2 / C(16, 8) = 0.0002 in each test."""
    slow = write_arm(tmp_path, "ours", [(5000 + i, 4.5) for i in range(8)])
    fast = write_arm(tmp_path, "better", [(6000 + i, 3.0) for i in range(8)])
    better = columns(run_gaits(tmp_path, slow, fast)[1])["better"]
    assert better.count("< 0.001") == 3


def test_seeds_may_have_letters_and_come_in_their_order(tmp_path):
    rows = "\n".join(f"{seed},90000,5000,3.0" for seed in ["5x", "10", "9", "5"])
    (tmp_path / "ours.csv").write_text(f"seed,step,return,stride\n{rows}\n")
    runs = run_gaits(tmp_path, tmp_path / "ours.csv")[1].split("\n\n")[1]
    seeds = [line.split()[1] for line in runs.splitlines()[2:]]
    assert seeds == ["5", "9", "10", "5x"]


def test_another_step_compares_that_step(tmp_path):
    file = write_arm(tmp_path, "ours", [(5000, 5.0), (5100, 5.0)])
    early = columns(run_gaits(tmp_path, file, "--step", "80000")[1])["ours"]
    assert early[:6] == ["2", "2 of 2", "16 to 100", "", "4950", "4900 to 5000"]


@pytest.mark.parametrize("mistake", ["no file", "no arm", "no step", "no folder"])
def test_what_gaits_lacks_is_said_in_one_sentence(mistake, tmp_path):
    file = write_arm(tmp_path, "ours", [(5000, 5.0), (5100, 5.0)])
    words = {
        "no file": [file, tmp_path / "theirs.csv"],
        "no arm": [],
        "no step": [file, "--step", "100000"],
        "no folder": [file],
    }[mistake]
    out = tmp_path / "none" if mistake == "no folder" else tmp_path
    code, _, said = run_gaits(out, *words)
    assert (code, said.count("\n")) == (2, 1)
    assert said.startswith("error: ")
    assert not (tmp_path / "gaits.md").exists()


F = "../fixed_temperature/arms/"
TABLES = {
    "two_gaits": "ours authors two_masks ours_mujoco_2.3.7 authors_mujoco_2.3.7",
    "fixed_temperature": f"ours {F}tau_0.01 {F}alpha_0.1_reward "
    f"{F}alpha_0.1_reward_tau_0.01 {F}alpha_0.1_reward_tau_0.01_pre_tanh",
    "bf16": "ours ../bf16/arms/bf16",
}


@pytest.mark.parametrize("study", TABLES)
def test_tables_of_the_studies_are_those_of_their_data(study, tmp_path):
    """gaits.md as a whole, and its first table on the study's page."""
    names = [name.removeprefix("../") for name in TABLES[study].split()]
    files = [
        STUDIES / f"{name}.csv"
        if "/" in name
        else STUDIES / f"two_gaits/arms/{name}.csv"
        for name in names
    ]
    table = run_gaits(tmp_path, *files)[1]
    assert table == (STUDIES / study / "gaits.md").read_text()
    assert table.split("\n\n")[0] in (STUDIES / study / "README.md").read_text()


def test_table_of_updates_on_the_same_data_is_that_of_its_data():
    rows = pd.read_csv(STUDIES / "bf16" / "same_update.csv")
    page = (STUDIES / "bf16" / "details.md").read_text()
    assert same_update_table.table(rows) in page


def test_means_of_updates_are_beside_the_first_arms():
    """Over six seeds, all of one sign: p = 2 / 2^6 = 0.03 by Wilcoxon."""
    rows = [
        (arm, seed, 500, base + seed, base - seed, base + 1.0)
        for arm, base in (("ours", 0), ("other", 0.5))
        for seed in range(1, 7)
    ]
    names = ["arm", "seed", "update", *same_update_table.MEASURES]
    table = same_update_table.table(pd.DataFrame(rows, columns=names)).splitlines()
    assert cells(table[0]) == ["measure", "updates", "ours", "other", "p"]
    assert cells(table[2]) == ["td_error", "500", "3.500", "4.000", "0.03"]
    assert cells(table[3])[2:4] == ["\N{MINUS SIGN}3.500", "\N{MINUS SIGN}3.000"]


def test_hoppers_curves_are_drawn(tmp_path):
    """From the committed data."""
    file = tmp_path / "curves.png"
    script = STUDIES / "hopper_divergence" / "curves.py"
    subprocess.run([sys.executable, script, "--out", file], check=True)
    assert file.read_bytes()[:4] == b"\x89PNG"


def test_the_stride_is_the_strongest_frequency_of_the_last_800_steps():
    time = 0.05 * np.arange(1001)
    angle = 0.3 + np.sin(2 * np.pi * 3.25 * time) + 0.5 * np.sin(2 * np.pi * 6.5 * time)
    angle[:200] += 5 * np.sin(2 * np.pi * 1.5 * time[:200])  # getting started
    assert stride.stride_frequency(angle) == pytest.approx(3.25)


def test_a_policy_is_measured_by_the_thigh_that_is_asked_for(monkeypatch, tmp_path):
    """The back thigh swings at 4.5 Hz, the front one at 2.25 Hz, all else at 1 Hz."""

    class Env:
        def reset(self):
            self.t = 0.0
            return self.observation(), {}

        def step(self, _):
            self.t += 0.05
            return self.observation(), 1.0, False, False, {}

        def observation(self):
            hertz = np.ones(17)
            hertz[2], hertz[5] = 4.5, 2.25
            return np.sin(2 * np.pi * hertz * self.t)

        def close(self):
            pass

    def evaluate_saved(_args, _saved, session):
        env = session.closing(Env())
        for _ in range(3):
            env.reset()
            for _ in range(1000):
                env.step(None)
        return [7.0, 8.0, 9.0], [1000] * 3

    args = meow.Args(env_id="HalfCheetah-v4")
    monkeypatch.setattr(stride, "parse_args", lambda *_: (args, {"step": 90_000}))
    monkeypatch.setattr(stride, "configure_process", lambda _: None)
    monkeypatch.setattr(meow, "evaluate_saved", evaluate_saved)
    (tmp_path / "args.json").write_text('{"script": "meow_continuous_action.py"}')
    file = tmp_path / "policy_final.pt"
    assert stride.measure(file, 3) == (90_000, 8.0, pytest.approx(4.5))
    assert stride.measure(file, 3, "front") == (90_000, 8.0, pytest.approx(2.25))
    args.env_id = "Hopper-v4"
    with pytest.raises(stride.UsageError, match="trained on Hopper-v4"):
        stride.measure(file, 3)


def test_a_run_that_is_missing_is_one_sentence(monkeypatch, capsys):
    for instrument, words in (stride, []), (same_update, ["--arms", "ours"]):
        monkeypatch.setattr(sys, "argv", ["instrument", "runs/none", *words])
        assert instrument.main() == 1
        assert capsys.readouterr().err.startswith("error: ")


def test_each_q_of_two_masks_has_its_own():
    args = meow.Args(env_id="HalfCheetah-v4", dropout=0.5)
    flow = meow.make_flow(args, 3, 2)
    obs, action, rng = torch.randn(8, 3), torch.rand(8, 2), np.random.default_rng(1)
    masks, expected = torch.ones(2, 4, 2, 8, 64, dtype=torch.bool), []
    for k in range(2):
        meow.draw_dropout(masks[k], 0.5, rng)
        expected.append(flow.q_values(obs, action, masks[k])[:, k])
    flow.__class__ = same_update.TwoMasks
    found = flow.q_values(obs, action, torch.cat([*masks], dim=2))
    torch.testing.assert_close(found, torch.stack(expected, -1))
    assert not torch.equal(*masks)
    without = meow.EnergyFlow.q_values(flow, obs, action)
    torch.testing.assert_close(flow.q_values(obs, action), without)


def test_each_arm_differs_in_what_it_is_named_after(monkeypatch, capsys):
    args = meow.Args(env_id="HalfCheetah-v4")
    one, two = (
        same_update.make_arm(name, args, None, compiled=False)
        for name in ("ours", "two masks")
    )
    assert type(one.flow) is meow.EnergyFlow
    assert type(two.flow) is same_update.TwoMasks
    batch = torch.rand(args.batch_size, same_update.ROW)
    values = []
    for arm in (one, two):
        before = arm.q_v_next(batch[:, :17], batch[:, 17:23], batch[:, 23:40])
        for _ in range(3):
            arm.update(batch)
        after = arm.q_v_next(batch[:, :17], batch[:, 17:23], batch[:, 23:40])
        assert not torch.equal(before[0], after[0])  # it learns, and so does its target
        assert not torch.equal(before[2], after[2])
        values.append(after[0])
    assert (values[0] - values[1]).abs().max() > 1e-5  # not the same arm
    monkeypatch.setattr(sys, "argv", ["same_update.py", "runs/x"])
    assert same_update.main() == 2
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
