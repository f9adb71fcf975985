"""studies/robots_held_back/distances.py: what came, dropout, d by age; its errors."""

import re
import sys

import pytest
import torch
from conftest import ISAAC_SCRIPTS, ROOT, launch, only_run, options

sys.path.insert(0, str(ROOT / "studies/robots_held_back"))

import distances

script = distances.meow_auto_isaacgym


def test_what_came_is_the_discounted_soft_return_where_it_is_known():
    """Robot 0 falls in step 9, robot 1 times out in step 449, robot 2 goes on."""
    rows = {"reward": torch.full((500, 3), 2.0), "log_prob": torch.full((500, 3), 5.0)}
    nowhere = torch.zeros(500, 3, dtype=bool)
    rows |= {"terminated": nowhere, "truncated": nowhere.clone()}
    rows["terminated"][9, 0] = rows["truncated"][449, 1] = True
    returns, known = distances.came(rows, alpha=0.1, gamma=0.99)
    soft = 2 - 0.1 * 5
    for step, robot, steps in ((0, 0, 10), (9, 0, 1), (50, 1, 400), (100, 2, 400)):
        assert known[step, robot]
        expected = soft * (1 - 0.99**steps) / (1 - 0.99)
        assert returns[step, robot].item() == pytest.approx(expected, rel=1e-5)
    last = [known[:, robot].nonzero().max().item() for robot in range(3)]
    assert last == [100, 50, 100]


def filled_replay(args) -> tuple:
    """A random flow, and what is saved of its run: 5 robots' own actions in 1,000
    steps, but that those older than 300 steps are moved by 3 sigma in each dimension
    of x."""
    torch.manual_seed(0)
    flow = script.make_flow(args, 4, 2)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        obs = torch.randn(1001, 5, 4)
        flat = obs[:1000].reshape(-1, 4)
        moved = 3.0 * (torch.arange(1000) < 700).repeat_interleave(5)
        x = (torch.randn(5000, 2) + moved[:, None]) * flow.log_sigma(flat).exp()
        u = flow.to_u(x, flat).reshape(1000, 5, 2)
    norm = script.RunningMeanStd(4, "cpu")
    rows = torch.cat([u, torch.zeros(1000, 5, 3)], -1)
    rows = torch.cat([rows, torch.zeros(1, 5, 5)])  # the slot of the next step
    replay = {"added": 1000, "obs": obs, "rows": rows}
    return flow, {"replay": replay, "sizes": [4, 2], "norm": norm.state_dict()}


def test_distances_are_those_of_each_age():
    """About 1 for the policy's own actions; 3 sigma add 9."""
    flow, saved = filled_replay(script.Args(temperature=0.3))
    found = distances.distances(script, flow, saved)
    assert list(found) == ["0 to 300", "300 to 1,000", "0 to 1,000"]
    newest, older, every = (d.mean().item() for d in found.values())
    assert newest == pytest.approx(1, rel=0.1)
    assert older == pytest.approx(10, rel=0.05)
    assert every == pytest.approx(0.3 * 1 + 0.7 * 10, rel=0.05)


def test_actions_beyond_an_energy_of_rho_and_log_10_weigh_little():
    """exp(rho - rho d / 2) is 0.1 at d = 2 + 2 log(10) / rho: 17.35 for rho = 0.3."""
    flow = script.make_flow(script.Args(temperature=0.3), 4, 2)
    d = torch.tensor([0.0, 5, 17.3, 17.4])
    assert distances.percent_light(script, flow, d) == 25


def test_what_dropout_takes_from_q():
    """Beside 100 masks of other numbers; none without dropout. The kept actions
    themselves, far ones here, don't count."""
    flow, saved = filled_replay(script.Args(temperature=0.3, dropout=0.3))
    saved["replay"]["rows"][..., :2] += 3
    found = distances.lost_to_dropout(script, flow, saved)
    with torch.no_grad():
        obs = saved["replay"]["obs"][700:1000].reshape(-1, 4)
        u, _ = flow.sample(obs)
        lost = []
        for _ in range(100):
            kept = torch.rand(4, 2, 1500, 64) < 0.7
            lost.append(flow.q_values(obs, u) - flow.q_and_distance(obs, u, kept)[0])
    assert found > 0.01
    assert found == pytest.approx(torch.stack(lost).mean().item(), rel=0.1)
    for network in flow.t:
        network.dropout = 0.0
    assert distances.lost_to_dropout(script, flow, saved) == 0


@pytest.mark.slow
def test_the_kept_policy_walks():
    """Five episodes, others than the page's; to stand brings 2,300."""
    policy = ROOT / "studies/robots_held_back/walking.pt"
    words = ["--evaluate", policy, "--eval-episodes", 5]
    result = launch(ROOT / "meow_auto_isaacgym.py", words, ROOT)
    assert result.returncode == 0, result.stderr
    mean = re.search(r"return (\S+) \+-", result.stdout.splitlines()[-1])[1]
    assert float(mean) > 2500


@pytest.mark.slow
@pytest.mark.parametrize("program", ISAAC_SCRIPTS[:2], ids=lambda path: path.stem)
def test_what_a_policy_is_paid_for(program, tmp_path, monkeypatch, capsys):
    words = options(env_id="Ingenuity", total_timesteps=20, num_envs=4, batch_size=8)
    words += options(learning_starts=10, eval_episodes=0, compile=False)
    assert launch(program, words, tmp_path).returncode == 0
    words = [only_run(tmp_path), "--robots", 4, "--steps", 420]
    monkeypatch.setattr(sys, "argv", ["distances.py", *map(str, words)])
    assert distances.main() == 0
    out = capsys.readouterr().out
    lines = dict(line.strip().rsplit(" ", 1) for line in out.splitlines()[:4])
    total = float(lines.pop("reward a step"))
    assert set(lines) == {"position", "upright", "spin"}
    assert sum(map(float, lines.values())) == pytest.approx(total, rel=0.02)
    assert ("actions of 0 to 20 vector steps ago: median d" in out) == (
        program.stem == "meow_auto_isaacgym"
    )


def test_errors_are_one_sentence(tmp_path, monkeypatch, capsys):
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(b"nothing")
    other = "is not of meow_isaacgym or meow_auto_isaacgym"
    policies = ROOT / "policies"
    for command, words in (
        ([tmp_path], f"there is no {tmp_path}/checkpoint.pt"),
        ([damaged], other),
        ([policies / "Ant-v4.pt"], other),
        ([policies / "Ant.pt"], "has no reward unit: name the folder of its run"),
        ([policies / "Humanoid.pt", "--steps", 400], "--steps must be above 400"),
    ):
        monkeypatch.setattr(sys, "argv", ["distances.py", *map(str, command)])
        assert distances.main() != 0
        err = capsys.readouterr().err
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert words in err
