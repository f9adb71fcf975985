"""docs/your_own_task.md: its module, its commands and its Python run as they stand."""

import contextlib
import io
import re
import shlex

import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPT, launch, metrics, only_run, options

import meow_auto_continuous_action as auto
from harness.runs import Session

PAGE = (ROOT / "docs/your_own_task.md").read_text()
SHORT = options(compile=False, eval_episodes=1, log_frequency=10)


def block(language: str, start: str) -> str:
    """The page's code that begins with this."""
    found = re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.M | re.S)
    (code,) = [code for code in found if code.startswith(start)]
    return code


@pytest.fixture(scope="module")
def returns(tmp_path_factory):
    """{command: (folder, its return)} of the commands that use the page's module."""
    found = {}
    lines = block("bash", "python meow_continuous_action.py --env-id my_task:")
    for line in lines.splitlines():
        cwd = tmp_path_factory.mktemp("task")
        (cwd / "my_task.py").write_text(block("python", "# my_task.py"))
        line = line.replace(" 20000", " 250").replace(" 1000", " 245")
        python, script, *words = shlex.split(line)
        assert (python, script) == ("python", SCRIPT.name)
        result = launch(SCRIPT, [*words, *SHORT], cwd)
        assert result.returncode == 0, result.stderr
        found[line] = only_run(cwd)
    return found


def episodic_return(folder) -> float:
    """Of the first training episode, whose actions are random."""
    (value,) = [v for _, name, v in metrics(folder) if name == "charts/episodic_return"]
    return float(value)


def test_the_module_and_its_commands(returns):
    """Both play the same episode; a size of 0.1 scales its rewards."""
    whole, tenth = map(episodic_return, returns.values())
    assert whole < -100
    assert tenth == pytest.approx(0.1 * whole)


@pytest.mark.parametrize("mine", [False, True], ids=["as it stands", "of a run"])
def test_the_policy_in_python(mine, returns, monkeypatch):
    monkeypatch.chdir(ROOT)
    code, dimensions = block("python", "import torch\nfrom meow_continuous"), 2
    if mine:
        folder, *_ = returns.values()
        file = f"{folder}/policy_final.pt"
        code, dimensions = code.replace("policies/MultiGoal-v0.pt", file), 1
    names, printed = {}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, names)
    assert printed.getvalue().count("tensor(") == 3
    action, sampled, log_prob = (names[n] for n in ("action", "sampled", "log_prob"))
    assert action.shape == sampled.shape == (1, dimensions)
    assert (action.abs() <= 1).all()
    flow, obs = names["flow"], names["obs"]
    torch.testing.assert_close(flow.log_prob(obs, sampled), log_prob)
    assert np.isfinite(log_prob.item())


def test_the_policy_without_tuning_in_python(monkeypatch):
    """From the page's observation, it acts as in an evaluation."""
    monkeypatch.chdir(ROOT)
    names = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(block("python", "import torch\nfrom meow_auto"), names)
    played = []

    def evaluate(*inputs):  # args, envs, policy, ...
        zeros = (np.zeros((1, n), np.float32) for n in (11, 3))
        played.append(inputs[2](*zeros))
        return [], []

    monkeypatch.setattr(auto, "evaluate", evaluate)
    args = auto.Args(**names["saved"]["args"])
    with Session(args, torch.device("cpu")) as session:
        auto.evaluate_saved(args, names["saved"], session)
    torch.testing.assert_close(names["action"].numpy(), played[0])
    expected = names["flow"].log_prob(names["obs"], names["u"])
    torch.testing.assert_close(names["log_prob"], expected)
