"""studies/temperature/arms.py: what each change does, and that runs go on with it."""

import contextlib
import io
import json
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, interrupting, metrics, only_run, quick

sys.path.insert(0, str(ROOT / "studies/temperature"))

import arms
import falls
import slopes
import table

import meow_auto_continuous_action as auto
import meow_auto_isaacgym

MEOW = "plain bounded random evenly heavy huber near two"
MEOW = [*MEOW.split(), "split", "conservative", "raw", "held"]
KEEPING_THE_IDENTITY = "base plain bounded random two split".split()


def flow_of(arm, obs_dim=3, act_dim=1, **options):
    """A float64 flow of this arm with random parameters, and its script."""
    script = arms.changed_script(arm)
    flow = script.make_flow(script.Args(**options), obs_dim, act_dim).double()
    for parameter in flow.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return flow, script


def launch(argv, cwd, signals=None):
    with (
        contextlib.chdir(cwd),
        contextlib.redirect_stderr(io.StringIO()) as err,
        interrupting(signals or {}),
    ):
        try:
            code = arms.main(argv)
        except SystemExit as stopped:
            code = stopped.code
    return code, err.getvalue()


@pytest.fixture
def output_of(tmp_path, capsys, monkeypatch):
    """output_of(tool, folder, *options): what it prints; it refuses another folder."""

    def run(tool, folder, *options):
        for place, code in ((tmp_path / "nothing", 2), (folder, 0)):
            words = [f"{tool.__name__}.py", str(place), *options]
            monkeypatch.setattr(sys, "argv", words)
            assert tool.main() == code
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("arm", KEEPING_THE_IDENTITY)
def test_v_is_still_the_soft_value_of_q(arm):
    torch.manual_seed(0)
    flow, _ = flow_of(arm)
    obs = torch.randn(5, 3, dtype=torch.float64)
    n = 20_000
    u = torch.linspace(-9, 9, n, dtype=torch.float64)
    for i in range(5):
        q = flow.q_values(obs[i].expand(n, 3), u[:, None]).view(n, -1)
        slope = 1 - torch.tanh(u) ** 2  # da / du
        alpha = flow.alpha
        integral = torch.trapezoid(torch.exp(q / alpha) * slope[:, None], u, dim=0)
        v = alpha * torch.log(integral)
        torch.testing.assert_close(
            v, flow.soft_values(obs[i][None]).flatten(), rtol=0, atol=1e-6
        )


def test_normal_has_the_mean_and_deviation_of_what_came():
    script = arms.changed_script("sac+normal")
    args = script.Args()
    replay = script.ReplayBuffer(50, 3, 1, 4, "cpu")
    actor, critics = script.make_networks(args, 3, 1)
    rng = np.random.default_rng(0)
    seen = (5 + 3 * rng.standard_normal((70, 3))).astype(np.float32)
    for obs in seen:
        replay.add(obs, [0.0], obs, 0.0, False)
    for network in (actor, critics):
        torch.testing.assert_close(
            network.mean.numpy(), seen.mean(0), rtol=1e-5, atol=0
        )
        torch.testing.assert_close(
            network.scale.numpy(), 1 / seen.std(0), rtol=1e-5, atol=0
        )
    far = torch.from_numpy(seen[:1]) * 1000
    assert actor.normal(far).abs().max() == 5
    # a resumed buffer tells a new network
    again = arms.changed_script("sac+normal")
    other = again.ReplayBuffer(50, 3, 1, 4, "cpu")
    new, _ = again.make_networks(args, 3, 1)
    other.load_state_dict(replay.state_dict())
    assert torch.equal(new.mean, actor.mean)
    assert torch.equal(new.scale, actor.scale)


def test_units_are_the_scripts():
    replay = arms.changed_script("sac+units").ReplayBuffer(50, 1, 1, 4, "cpu")
    for rewards, unit in ([5.0, 5.0], 0.5), ([5.0, 5.0, 2.0, 8.0], 4.5**0.5):
        for reward in rewards[len(replay) :]:
            replay.add(np.zeros(1), [0.0], np.zeros(1), reward, False)
        batch = replay.sample(np.random.default_rng(0))
        index = torch.from_numpy(np.random.default_rng(0).integers(0, len(rewards), 4))
        torch.testing.assert_close(batch[:, -2], replay.rows[index, -2] / unit)
    assert replay.rows[:4, -2].max() == 8  # the rows themselves stay


def test_recent_is_the_scripts():
    """The same draws; another change still changes what is drawn, in any order."""
    buffers = [
        arms.RecentReplayBuffer(10_000, 20_000, 1, 1, 400, "cpu"),
        arms.changed_script("sac+recent").ReplayBuffer(20_000, 1, 1, 400, "cpu"),
        arms.changed_script("sac+units+recent").ReplayBuffer(20_000, 1, 1, 400, "cpu"),
    ]
    for replay in buffers:
        replay.rows[:] = torch.arange(20_000.0)[:, None]
        replay.added = 29_000
        replay.sample(np.random.default_rng(0))
    script, arm, with_units = (replay.batch for replay in buffers)
    assert torch.equal(arm, script)
    assert torch.equal(with_units[:, 0], script[:, 0])


def test_split_is_the_loss_of_the_robots():
    """Its value, and its gradients of m, kappa and g."""
    torch.manual_seed(0)
    flow, script = flow_of("split", act_dim=2, temperature=1.5)
    flow.requires_grad_(True)
    obs, u = torch.randn(64, 3).double(), torch.randn(64, 2).double()
    target = flow.q_values(obs, u).detach() + torch.randn(64).double()

    def loss_and_gradients(loss_of, *rest):
        loss = loss_of(*flow.q_and_distance(obs, u), target, *rest)
        return loss, *torch.autograd.grad(loss, list(flow.parameters()))

    rho = torch.tensor(1.5).double()
    found = loss_and_gradients(script.meow_loss)
    expected = loss_and_gradients(meow_auto_isaacgym.meow_loss, rho)
    torch.testing.assert_close(found, expected)


def test_conservative_adds_the_gap_of_v_and_q():
    torch.manual_seed(0)
    flow, script = flow_of("conservative")
    flow.weight.fill_(0.05)
    obs, u = torch.randn(8, 3).double(), torch.randn(8, 1).double()
    q, d = flow.q_and_distance(obs, u)
    log_prob = flow.log_prob(obs, u)
    gap = -0.05 * flow.alpha * log_prob
    torch.testing.assert_close(q[:, 1], gap)
    target = torch.randn(8).double()
    td = arms.changed_script("base").meow_loss(q[:, 0], d, target)
    torch.testing.assert_close(script.meow_loss(q, d, target), td + gap.mean())
    replay = script.RecentReplayBuffer(9, 50, 3, 1, 4, "cpu")
    replay.added = 45_000
    replay.sample(np.random.default_rng(0))
    assert float(flow.weight) == pytest.approx(0.025)


@pytest.mark.parametrize(
    ("arm", "above", "below"),
    [("base", 0.02, 1), ("near", 0.02, 0.02), ("evenly", 1, 1), ("heavy", 0.2, 1)],
)
def test_what_a_far_action_weighs(arm, above, below):
    """Where it is worth more than Q says, and less."""
    script = arms.changed_script(arm)
    q, d = torch.randn(2).double(), torch.tensor([0.5, 99]).double()
    for error, far in ((3.0, above), (-3.0, below)):
        loss = script.meow_loss(q, d, q + error)
        assert float(loss) == pytest.approx(0.5 * 9 * (1 + far) / 2)


def test_large_errors_count_linearly():
    """Beyond 10 alpha."""
    flow, script = flow_of("huber", temperature=0.1)
    obs, u = torch.randn(1, 3).double(), torch.randn(1, 1).double()
    q, d = flow.q_and_distance(obs, u)
    d.zero_()
    for error, expected in ((0.5, 0.125), (-0.5, 0.125), (3, 2.5), (-3, 2.5)):
        loss = script.meow_loss(q, d, q[:, 0] + error)
        assert float(loss) == pytest.approx(expected)


def test_near_goes_with_two():
    script, one = arms.changed_script("two+near"), arms.changed_script("near")
    q, d = torch.randn(2, 2).double(), torch.tensor([0.5, 99]).double()
    target = torch.tensor([-9.0, -9]).double()
    expected = sum(one.meow_loss(q[:, k], d, target) for k in range(2))
    torch.testing.assert_close(script.meow_loss(q, d, target), expected)


def test_random_couplings_have_a_mode_of_their_own():
    obs = torch.randn(50, 3)
    for arm, some in (("base", False), ("random", True)):
        script = arms.changed_script(arm)
        mode = script.make_flow(script.Args(), 3, 2).mode_action(obs)
        assert (mode.std(0) > 0.1).all() == some
        assert (mode == 0).all() != some


def test_raw_leaves_out_what_the_script_does():
    obs = 9 + torch.randn(20, 3)
    for arm in ("base", "raw"):
        norm = arms.changed_script(arm).RunningMeanStd(3)
        norm.update(obs)
        assert torch.equal(norm(obs), obs) == (arm == "raw")


def test_plain_has_no_layer_norm_in_m_and_h():
    obs, u = torch.randn(4, 3).double(), torch.randn(4, 1).double()
    for arm, count in (("base", 0), ("plain", 4)):
        flow, _ = flow_of(arm)
        networks = (flow.m, flow.h)
        norms = [norm for network in networks for norm in network.norms]
        assert sum(isinstance(norm, torch.nn.Identity) for norm in norms) == count
        flow.q_values(obs, u)
    assert all(isinstance(n, torch.nn.LayerNorm) for t in flow.t for n in t.norms)


def test_bounded_translations_are_at_most_2():
    x, obs = torch.randn(50, 2).double(), torch.randn(50, 3).double()
    largest = {}
    for arm in ("base", "bounded"):
        torch.manual_seed(0)
        flow, _ = flow_of(arm, act_dim=2)
        for network in flow.t:
            network.layers[-1].weight.mul_(20)
        largest[arm] = [flow.translation(i, x, obs).abs().max() for i in range(4)]
    assert min(largest["base"]) > 2
    assert max(largest["bounded"]) <= 2


def test_layers_put_a_layer_norm_before_each_relu():
    script = arms.changed_script("sac+layers")
    for network in script.make_networks(script.Args(), 3, 1):
        kinds = [type(part).__name__ for part in network.modules()]
        assert kinds.count("LayerNorm") == kinds.count("ReLU") > 0


def test_of_two_values_the_smaller_one_counts():
    """Each Q_k has the loss, so that both learn; the difference of Q and V is one."""
    torch.manual_seed(0)
    flow, script = flow_of("two")
    obs, u = torch.randn(8, 3).double(), torch.randn(8, 1).double()
    q, v = flow.q_values(obs, u), flow.soft_values(obs)
    assert q.shape == v.shape == (8, 2)
    assert (v[:, 0] != v[:, 1]).all()
    torch.testing.assert_close(v[:, 1] - v[:, 0], (flow.m_2(obs) - flow.m(obs))[:, 0])
    torch.testing.assert_close(q[:, 0] - v[:, 0], q[:, 1] - v[:, 1])
    reward, terminated = torch.randn(8).double(), torch.zeros(8).double()
    y = script.soft_target(reward, terminated, v, 0.9)
    torch.testing.assert_close(y, reward + 0.9 * v.amin(-1))
    _, d = flow.q_and_distance(obs, u)
    one = arms.changed_script("base")
    expected = sum(one.meow_loss(q[:, k], d, y) for k in range(2))
    torch.testing.assert_close(script.meow_loss(q, d, y), expected)


def test_held_noise_lasts_some_steps():
    script, seen = arms.changed_script("base"), []
    run = SimpleNamespace(args=script.Args())
    script.make_policy = lambda *_: lambda _, z: seen.append(float(z[0, 0]))
    arms.held(script)
    acting = script.make_policy(None, None, 1, run, "acting")
    for i in range(2000):
        acting(None, np.full((1, 1), i))
    starts = [i for i in range(2000) if i == 0 or seen[i] != seen[i - 1]]
    assert all(seen[i] == i for i in starts)
    lengths = np.diff(starts)
    assert 0.5 < (lengths == 1).mean() < 0.7  # 1 / zeta(2) = 0.61
    assert lengths.max() > 10
    evaluation = script.make_policy(None, None, 1, run, "evaluation")
    evaluation(None, np.full((1, 1), -1.0))
    assert seen[-1] == -1


def test_averages_are_evaluated_and_change_nothing():
    theta, logged = torch.zeros(1), {}
    script = SimpleNamespace(
        make_policy=lambda *_: lambda *_: None,
        evaluate=lambda *_: ([theta.item()], []),
    )
    log = SimpleNamespace(log=lambda _, numbers: logged.update(numbers))
    session = SimpleNamespace(logger=log)
    arms.averages(script)
    script.make_policy(None, theta, 10, None, "evaluation")
    assert script.evaluate(None, None, None, 5, session) == ([0.0], [])
    assert logged == {}
    act = script.make_policy(None, theta, 1, None, "acting")
    act(None, None)
    theta.fill_(1)
    act(None, None)
    assert script.evaluate(None, None, None, 5, session) == ([1.0], [])
    assert logged == pytest.approx(
        {"averaged/0.001": 1e-3, "averaged/0.0005": 5e-4, "averaged/0.0002": 2e-4}
    )
    assert theta == 1


def test_a_run_with_averages_is_the_same_run(tmp_path):
    rows = []
    for arm in ("sac", "sac+averages"):
        (tmp_path / arm).mkdir()
        assert launch([arm, *quick()], tmp_path / arm)[0] == 0
        rows.append(metrics(only_run(tmp_path / arm)))
    averaged = [row for row in rows[1] if "averaged/" in str(row)]
    assert len(averaged) > 3
    assert rows[0] == [row for row in rows[1] if row not in averaged]


@pytest.mark.parametrize("arm", [*MEOW, "sac+recent+normal+units+layers", "sac+held"])
def test_a_run_of_an_arm_goes_on(arm, tmp_path):
    """From a checkpoint at step 46, exactly (but for the noise that is held)."""
    (tmp_path / "whole").mkdir()
    assert launch([arm, *quick()], tmp_path / "whole")[0] == 0
    words = [arm, *quick(resume="auto")]
    code, _ = launch(words, tmp_path, {46: signal.SIGTERM})
    assert code == 128 + signal.SIGTERM
    code, said = launch(words, tmp_path)
    assert code == 0, said
    if "held" not in arm:
        assert metrics(only_run(tmp_path)) == metrics(only_run(tmp_path / "whole"))
    folder = only_run(tmp_path)
    assert f"_{arm.replace('sac+', '').replace('+', '_')}__1__" in said
    begins = f"python studies/temperature/arms.py {arm} "
    assert f"play it with {begins}--evaluate" in said
    about = json.loads((folder / "args.json").read_text())
    assert about["command"].startswith(begins)


def test_the_script_does_not_go_on_with_a_run_of_an_arm(tmp_path, capsys):
    launch(["held", *quick(resume="auto")], tmp_path, {46: signal.SIGTERM})
    words = ["--resume", str(only_run(tmp_path))]
    assert auto.main(auto.Args, auto.train, auto.evaluate_saved, words) == 2
    begun = "was begun by: python studies/temperature/arms.py held --exp-name"
    assert begun in capsys.readouterr().err


def test_values_before_falls(tmp_path, output_of, monkeypatch):
    """Of episodes of 3, 2 and 4 steps, where the second was cut off by a time limit."""
    assert launch(["base", *quick(exp_name="meow_auto")], tmp_path)[0] == 0
    folder = only_run(tmp_path)
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    rows = torch.randn(9, 11)  # obs, action, next_obs, reward, terminated
    rows[:, 5:9] = rows[:, :4].roll(-1, 0)
    rows[[2, 4], 5:9] += 1
    rows[:, -1] = torch.tensor([0, 0, 1, 0, 0, 0, 0, 0, 1])
    saved["replay"]["rows"] = rows
    flow, norm, _, unit = falls.parts_of(saved)
    r = rows[:, -2]
    for steps, first, came in (
        (1, [2, 8], [r[2], r[8]]),
        (3, [0, 6], [r[0] + 0.99 * r[1] + 0.99**2 * r[2], None]),
        (4, [5], [None]),
        (5, [], []),
    ):
        values, returns, d = falls.before_falls(saved, steps)
        z = flow.to_x(rows[first, 4:5], norm(rows[first, :4]))
        z *= torch.sqrt(flow.kappa(norm(rows[first, :4])) / flow.alpha)
        torch.testing.assert_close(d, z[:, 0] ** 2)
        expected = unit * flow.soft_values(norm(rows[first, :4]))
        torch.testing.assert_close(values, expected)
        for one, other in zip(returns, came, strict=True):
            if other is not None:
                torch.testing.assert_close(one, other)
    values, returns = falls.of_all(saved)  # of the episodes that terminated
    known = [0, 1, 2, 5, 6, 7, 8]
    torch.testing.assert_close(values, unit * flow.soft_values(norm(rows[known, :4])))
    torch.testing.assert_close(returns[2], r[2])
    torch.testing.assert_close(returns[0], r[0] + 0.99 * r[1] + 0.99**2 * r[2])
    torch.testing.assert_close(returns[5], r[7] + 0.99 * r[8])
    monkeypatch.setattr(falls, "ENOUGH", 2)
    returns = falls.of_all(saved)[1]
    assert len(returns) == 8
    torch.testing.assert_close(returns[3], r[3] + 0.99 * r[4])
    with monkeypatch.context() as patch:
        patch.setattr(falls, "RECENT", 3)
        torch.testing.assert_close(falls.of_all(saved)[1], returns[-3:])
    # Q and d of the policy's own actions, by hand, with one mask for all
    monkeypatch.setattr(torch, "rand", lambda shape: torch.arange(64.0).expand(shape))
    saved["args"]["dropout"] = 0.5  # the first unit is dropped
    less, d, d_dropped = falls.by_dropout(saved)
    flow, norm, *_ = falls.parts_of(saved)
    torch.manual_seed(0)
    obs = norm(rows[:, :4])
    u, _ = flow.sample(obs)
    kept = (torch.arange(64) > 0).expand(4, 2, 9, 64)
    q, distance = flow.q_and_distance(obs, u)
    lower, further = flow.q_and_distance(obs, u, kept)
    torch.testing.assert_close(less, unit * (q - lower))
    torch.testing.assert_close(d, distance)
    torch.testing.assert_close(d_dropped, further)
    assert (d != d_dropped).any()
    u, obs = rows[:, 4:5], norm(rows[:, :4])
    torch.testing.assert_close(
        falls.of_kept(saved, 4), flow.q_and_distance(obs[5:], u[5:])[1]
    )
    monkeypatch.undo()
    out = output_of(falls, folder)
    assert "the newest 60 actions: median d" in out
    assert "all states: V" in out
    assert "dropout: Q less by" in out
    assert "10 before a fall: V" in out


def test_the_pages_have_the_tables(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["table.py"])
    assert table.main() == 0
    tables = capsys.readouterr().out.strip().split("\n\n")
    assert [len(text.splitlines()) > 3 for text in tables] == [True] * 7
    pages = [*["README.md"] * 3, *["newest.md"] * 2, "why.md", "details.md"]
    for text, page in zip(tables, pages, strict=True):
        assert text in (ROOT / "studies/temperature" / page).read_text()


def test_returns_of_a_task_stand_beside_each_other(tmp_path):
    names = "meow_auto_continuous_action__1 meow_auto_continuous_action__2"
    names += " sac_continuous_action__2 sac_continuous_action_longer__2"
    for i, name in enumerate([*names.split(), "sac_continuous_action__2"]):
        run = tmp_path / f"Ant-v4__{name}__{i}"
        run.mkdir()
        rows = ["step,seconds,name,value", "10,1,eval/return_mean,1.0"]
        rows += [f"20,2,eval/return_mean,{i}.6", "20,2,eval/return_std,9.0"]
        (run / "metrics.csv").write_text("\n".join(rows) + "\n")
    script = "| Ant-v4 | the script | 1 | 1 | 2 |  |  |  |  |"
    sac = "| Ant-v4 | SAC | 3 |  | 3 |  |  |  |  |"
    assert table.beside([tmp_path], "Ant-v4", (20,), table.COMPARED) == [script, sac]
    script = "| Ant-v4 | the script | 1 | 1 | 1 |  |  |  |  |"
    sac = "| Ant-v4 | SAC | 2 |  | 2 |  |  |  |  |"
    assert table.beside([tmp_path], "Ant-v4", (10, 20), table.COMPARED) == [script, sac]
    assert table.beside([tmp_path], "Ant-v4", (10, 15), table.COMPARED) == []


def test_sac_averaged_is_the_average(tmp_path):
    run = tmp_path / "Ant-v4__sac_averages__1__0"
    run.mkdir()
    rows = ["step,seconds,name,value", "20,1,eval/return_mean,5.0"]
    rows += ["20,1,averaged/0.001,7.0"]
    (run / "metrics.csv").write_text("\n".join(rows) + "\n")
    line = "| Ant-v4 | SAC, averaged | 7 | 7 |  |  |  |  |  |"
    assert table.beside([tmp_path], "Ant-v4", (20,), table.COMPARED) == [line]


def test_theta_is_compared_with_its_average_late(tmp_path):
    """In runs that have both to the end."""
    steps = [(40_000, 9, 9), (50_000, 4, 6), (60_000, 2, 7), (70_000, 0, 0)]
    for name, kept in {"latest__1": steps, "latest__2": steps[:2]}.items():
        run = tmp_path / f"Ant-v4__auto_{name}__0"
        run.mkdir()
        rows = [
            f"{t},1,eval/return_mean,{a}\n{t},1,averaged/0.001,{b}" for t, a, b in kept
        ]
        (run / "metrics.csv").write_text("\n".join(["step,seconds,name,value", *rows]))
    line = "| Ant-v4 | recent | 1 | 3 | 2 | 6 | 6 |"
    assert table.averages(tmp_path, 60_000) == [line]


def test_when_a_run_walks():
    runs = [[9.0, 2001.0, 9.0], [1.0, 2000.0, 1.0], [1.0, 1.0, 3000.0]]
    runs = [pd.Series(run, index=[10_000, 20_000, 90_000]) for run in runs]
    assert table.first_above(runs, 90_000) == "20, never, 90"
    assert table.first_above(runs, 80_000) == "20, never, never"


def test_temperatures_are_means_over_the_runs_of_a_rule():
    rows = [("Ant-v4", "a", 10_000, 0.1), ("Ant-v4", "b", 10_000, 0.3)]
    rows += [("Ant-v4", "a", 90_000, 0.5), ("Ant-v4", "c", 90_000, 9.0)]
    rows = pd.DataFrame(rows, columns=["task", "experiment", "step", "alpha"])
    assert table.temperatures(rows, ["a", "b"], "Ant-v4") == "0.200, 0.500"
    assert table.temperatures(rows, ["a", "b"], "Hopper-v4") == ""
    assert table.temperatures(rows, ["d"], "Ant-v4") == ""


def test_a_line_of_the_table(tmp_path):
    run = tmp_path / "Hopper-v4__auto_evenly_raw__3__abc"
    run.mkdir()
    command = "python x.py --seed 3 --dropout 0 --no-compile --torch-threads 1"
    about = {"command": command, "git_commit": "0123456789"}
    (run / "args.json").write_text(json.dumps(about))
    rows = "10,0.1,eval/return_mean,4.6", "10,0.1,eval/return_0,9"
    (run / "metrics.csv").write_text("\n".join(["step,seconds,name,value", *rows]))
    wanted = "| Hopper-v4 | evenly+raw --dropout 0 --no-compile | 3 | 0123456 | 5 |  |"
    assert table.line(run, (10, 20)) == wanted
    assert table.line(run, (20,)) == ""


def test_slopes_are_of_the_true_simulator(tmp_path, output_of, monkeypatch):
    """y is that of real steps; a policy that knows it has correlation 1."""
    words = quick(env_id="Hopper-v4", exp_name="meow_auto")
    assert launch(["base", *words], tmp_path)[0] == 0
    folder = only_run(tmp_path)
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    tried, worth = [], slopes.worth
    with monkeypatch.context() as patch:
        patch.setattr(slopes, "worth", lambda *x: tried.append(x[4]) or worth(*x))
        y, q = slopes.values_of_actions(saved, 3)
    assert y.shape == q.shape == (3, 32)
    assert y.mean(1).abs().max() < 1e-5
    assert (y.std(1) > 0).all()
    assert slopes.correlation(y, 3 * y) == pytest.approx(1)
    # the same episode without trials: the same states, and Q of the same actions
    torch.manual_seed(0)
    flow, norm, args, unit = slopes.parts_of(saved)
    env = slopes.script.make_env(args).env
    obs, _ = env.reset(seed=0)
    for step in range(9):
        here = norm(torch.from_numpy(obs).float()[None])
        if step % 3 == 0:
            now, then = slopes.simulator_state(env), tried[step // 3]
            for mine, theirs in zip(now, then, strict=True):
                np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-12)
            many = here.expand(32, -1)
            expected = flow.q_values(many, flow.sample(many)[0])
            expected = expected - expected.mean(0)
            torch.testing.assert_close(q[step // 3], expected)
        obs, *_ = env.step(np.tanh(flow.sample(here)[0][0].numpy()))
    # y of an action by hand, with values of the next state
    env.reset(seed=0)
    state, u = slopes.simulator_state(env), torch.tensor([[0.3, -0.2, 0.1]])
    next_obs, reward, terminated, _, _ = env.step(np.tanh(u[0].numpy()))
    y = worth(flow, norm, unit, env, state, u, 0.9)
    v = flow.soft_values(norm(torch.from_numpy(next_obs).float()[None]))
    assert not terminated
    torch.testing.assert_close(y, reward / unit + 0.9 * v)
    assert unit != 1
    out = output_of(slopes, folder, "--states", "2")
    assert "correlation of Q and y" in out


def test_a_wrong_word_says_which_there_are(tmp_path):
    code, _ = launch(["nonsense"], tmp_path)
    assert "nonsense is not one of base, sac, recent" in code
    for arm in ("two+conservative", "huber+near", "near+split"):
        code, _ = launch([arm, *quick()], tmp_path)
        assert f"{arm} can't be joined" in code
    for arm in ("layers", "normal", "recent", "sac+near"):
        code, _ = launch([arm, *quick()], tmp_path)
        assert "is no change of" in code


def test_units_is_uniform_where_alpha_is_the_same(tmp_path):
    for task in ("Walker2d-v4", "Hopper-v4"):
        run = tmp_path / f"{task}__auto_units__2__0"
        run.mkdir()
        (run / "metrics.csv").write_text(
            "step,seconds,name,value\n20,2,eval/return_mean,5\n"
        )
    walker = table.beside([tmp_path], "Walker2d-v4", (20,), table.RULES)
    assert walker == ["| Walker2d-v4 | `uniform` | 5 |  | 5 |  |  |  |  |"]
    hopper = table.beside([tmp_path], "Hopper-v4", (20,), table.RULES)
    assert hopper == ["| Hopper-v4 | `units` | 5 |  | 5 |  |  |  |  |"]
