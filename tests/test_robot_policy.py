"""tools/robot_policy.py: what a robot does, over a run's own evaluation; its errors."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ISAAC_SCRIPTS, ROOT, launch, metrics, only_run, options

sys.path.insert(0, str(ROOT / "tools"))

import robot_policy


@pytest.mark.slow
def test_what_a_robots_policy_does(tmp_path):
    """Over the episodes of the run's last evaluation."""
    words = options(env_id="Ingenuity", total_timesteps=20, num_envs=4, batch_size=8)
    words += options(learning_starts=10, eval_episodes=2, compile=False)
    result = launch(ISAAC_SCRIPTS[0], words, tmp_path)
    assert result.returncode == 0, result.stderr
    run = only_run(tmp_path)
    means = robot_policy.play(run, 2)
    last = {name: float(value) for step, name, value in metrics(run) if step == "20"}
    assert means["return"] == pytest.approx(last["eval/return_mean"], rel=1e-3)
    assert means["length"] == pytest.approx(last["eval/length_mean"])
    mean = means["distance to the target, m"]
    assert 0.1 < mean < means["largest distance to the target, m"]


def test_measures_count_until_an_episode_ends():
    """Of two environments, whose episodes last one and three steps."""
    measured = torch.tensor([[-10.0, 1.0], [90.0, 2.0], [90.0, 6.0]])
    rows = [{"height": values} for values in measured]
    means = robot_policy.means_of_measures(rows, [1, 3])
    assert means == {"height": (-10 + 3) / 2, "largest height": (-10 + 6) / 2}


def test_each_step_of_an_evaluation_is_a_row():
    """The simulator is known from the first one on, shown while one episode lasts."""

    class Simulator:
        def measures(self):
            return {"height": torch.zeros(2)}

    session = robot_policy.RecordedSession(robot_policy_args())
    with session.evaluation(30) as watch:
        for step in range(5):
            watch.step("")
            if step < 2:
                watch.film(Simulator())
            assert len(session.rows) == step + 1


def robot_policy_args():
    from meow_continuous_action import Args

    return Args(evaluate="runs/Hopper")


def test_errors_are_one_sentence(tmp_path, monkeypatch, capsys):
    with pytest.raises(robot_policy.UsageError, match="one of the embedded robots"):
        robot_policy.RecordedSession(robot_policy_args()).film(object())
    (tmp_path / "args.json").write_text(json.dumps({"script": "meow_isaacgym.py"}))
    for folder, words in ((tmp_path, "there is no"), (tmp_path / "x", "No such file")):
        monkeypatch.setattr(sys, "argv", ["robot_policy.py", str(folder)])
        assert robot_policy.main() != 0
        err = capsys.readouterr().err
        assert err.startswith("error: ")
        assert words in err
        assert err.count("\n") == 1


def test_help_starts_as_a_command():
    words = [sys.executable, ROOT / "tools" / "robot_policy.py", "--help"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "beyond its return" in done.stdout
