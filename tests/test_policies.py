"""policies/: its card is true. tools/policies.py: keeps, plays and films policies."""

import contextlib
import io
import re
import shlex
import signal
import subprocess
import sys
from types import SimpleNamespace

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    SCRIPT,
    SCRIPTS,
    is_one_sentence,
    launch,
    only_run,
    quick,
)

import harness.args

sys.path.insert(0, str(ROOT / "tools"))

import policies

FOLDER = ROOT / "policies"
PAGE = (FOLDER / "README.md").read_text()


def read_cards(columns) -> list[dict]:
    """The rows of the page's table with these columns."""
    table = PAGE[PAGE.index(f"| {' | '.join(columns)} |") :].split("\n\n")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    return [dict(zip(columns, row, strict=True)) for row in rows]


CARDS, COMMANDS = map(read_cards, policies.TABLES)


# --- What is in the folder ------------------------------------------------------------
def test_every_policy_has_a_card_and_is_small():
    files = sorted(FOLDER.glob("*.pt"))
    assert [path.stem for path in files] == [row["policy"] for row in COMMANDS]
    assert len(CARDS) == len(files)
    for path, row in zip(files, CARDS, strict=True):
        assert path.stat().st_size <= 2**20, path
        saved = torch.load(path, weights_only=True)
        program = saved["format"]
        command = f"`python {program}.py --evaluate policies/{path.name}`"
        assert row["play it"] == command
        assert row["steps"].startswith(f"{saved['step']:,}")


@pytest.mark.slow
@pytest.mark.parametrize("row", CARDS, ids=lambda row: row["play it"].split("/")[-1])
def test_a_policy_gives_its_cards_return(row):
    """In 5 of its 20 episodes, which are others on another processor."""
    words = shlex.split(row["play it"].strip("`"))
    result = launch(ROOT / words[1], [*words[2:], "--eval-episodes", "5"], ROOT)
    assert result.returncode == 0, result.stderr
    last = result.stdout.splitlines()[-1]
    mean = float(re.search(r"return (\S+) \+-", last)[1])
    wanted, spread = map(float, row["return of 20 episodes"].split(" ± "))
    # the mean of 5 has a standard deviation of spread / sqrt(5)
    assert abs(mean - wanted) < 0.5 + 1.5 * spread, last


def test_the_moving_picture():
    """At the top of the README, by the page's command of policies that are there."""
    (command,) = re.findall(r"^python tools/policies.py film (.*\\\n.*)", PAGE, re.M)
    words = subprocess.check_output(["bash", "-c", f"echo {command}"], text=True)
    picture, *files = words.split()
    readme = (ROOT / "README.md").read_text()
    assert readme.index(f"]({picture})") < readme.index("## ")
    assert [name for name in files if not (ROOT / name).is_file()] == []
    assert (ROOT / picture).stat().st_size < 3_000_000
    shape = imageio.improps(ROOT / picture, plugin="pillow", index=...).shape
    assert shape[0] > 30  # images


# --- keep -----------------------------------------------------------------------------
def stdout_of(script, policy, cwd):
    """What --evaluate prints, but for the file's name."""
    result = launch(script, ["--evaluate", policy, "--eval-episodes", "2"], cwd)
    assert result.returncode == 0, result.stderr
    return result.stdout.replace(str(policy), "POLICY")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_kept_policy_plays_as_the_run(script, finished, tmp_path):
    folder = finished(script)[0]
    policies.keep(folder, tmp_path / "kept.pt")
    kept = stdout_of(script, tmp_path / "kept.pt", tmp_path)
    assert kept == stdout_of(script, folder / "policy_final.pt", tmp_path)


def test_the_policy_of_a_stopped_run_is_kept(tmp_path):
    result = launch(SCRIPT, quick(), tmp_path, signals={45: signal.SIGTERM})
    assert result.returncode == 128 + signal.SIGTERM
    folder = only_run(tmp_path)
    policies.keep(folder, tmp_path / "kept.pt")
    saved = torch.load(tmp_path / "kept.pt", weights_only=True)
    assert set(saved) == {"format", "args", "sizes", "step", "flow", "git_commit"}
    kept = stdout_of(SCRIPT, tmp_path / "kept.pt", tmp_path)
    assert kept == stdout_of(SCRIPT, folder / "checkpoint.pt", tmp_path)
    row = policies.card(tmp_path / "kept.pt")
    assert row["steps"] == f"{saved['step']} of 60"


def test_a_large_policy_is_kept_in_16_bits(finished, tmp_path, monkeypatch):
    file = tmp_path / "kept.pt"
    folder = finished(SCRIPT)[0]
    policies.keep(folder, file)
    size = file.stat().st_size
    monkeypatch.setattr(policies, "LARGEST", int(0.6 * size))
    policies.keep(folder, file)
    assert file.stat().st_size < 0.6 * size
    flow = torch.load(file, weights_only=True)["flow"]
    assert {v.dtype for v in flow.values() if v.ndim < 2} == {torch.float32}
    assert "return" in stdout_of(SCRIPT, file, tmp_path)
    monkeypatch.setattr(policies, "LARGEST", 1000)
    with pytest.raises(policies.RunError, match=r"bytes, more than 1,000"):
        policies.keep(folder, file)
    assert "return" in stdout_of(SCRIPT, file, tmp_path)  # the file from before


BAD = {
    "keep . kept.pt": "is no run",
    "keep broken kept.pt": "is no run",
    "keep . README.md": "ends in .pt",
    "keep . folder.pt": "ends in .pt",
    "play empty": "no policy (*.pt)",
    "play broken": "no README.md",
    "play untabled": "no README.md with a table that begins with | policy |",
    "film out.webp of_json.pt": "of_json.pt is no policy",
    "film out.webp of_list.pt": "of_list.pt is no policy",
    "film out.webp": "which policies?",
    "film out.webp README.md": "README.md is no policy",
    "film out.webp nothing.pt": "can't read nothing.pt",
    "film out.xyz README.md": ".webp or .gif",
    "film out.gif README.md --fps 0": "--fps 0.0: must be positive",
    "film out.gif README.md --columns 0": "--columns 0: must be positive",
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_one_sentence_and_harms_nothing(words, tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("| play it |\n|---|\n| x |\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/README.md").write_text("| play it |\n")
    (tmp_path / "broken").mkdir()
    (tmp_path / "untabled").mkdir()
    (tmp_path / "untabled/x.pt").write_text("")
    (tmp_path / "untabled/README.md").write_text("| play it |\n")
    torch.save({"format": "json"}, tmp_path / "of_json.pt")
    torch.save({"format": ["json"]}, tmp_path / "of_list.pt")
    (tmp_path / "folder.pt").mkdir()
    (tmp_path / "broken/args.json").write_text("{}")
    (tmp_path / "broken/x.pt").write_text("")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(sys, "argv", ["policies.py", *words.split()])
    err = io.StringIO()
    with contextlib.chdir(tmp_path), contextlib.redirect_stderr(err):
        code = policies.main()
    is_one_sentence(SimpleNamespace(returncode=code, stderr=err.getvalue()), 2)
    assert BAD[words] in err.getvalue()
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "README.md").read_text().endswith("| x |\n")


# --- play -----------------------------------------------------------------------------
def test_the_training_command_gives_the_same_options(finished, tmp_path):
    """Of a run whose options differ from the script's own settings."""
    folder = finished(SCRIPT)[0]
    policies.keep(folder, tmp_path / "kept.pt")
    saved = torch.load(tmp_path / "kept.pt", weights_only=True)
    import meow_continuous_action as meow

    trained = meow.Args(**saved["args"])
    command = policies.training_command(trained, "meow_continuous_action")
    words = shlex.split(command)
    assert words[:2] == ["python", "meow_continuous_action.py"]
    assert "--batch-size 8" in command
    assert "--learning-starts 31" in command
    again, _ = harness.args.parse_args(meow.Args, "meow", "", words[2:])
    same = set(policies.KEEPING.split()) - {"env_id", "total_timesteps"}
    assert again.fixed(" ".join(same)) == trained.fixed(" ".join(same))


def test_play_writes_the_tables_and_leaves_the_text(finished, tmp_path):
    policies.keep(finished(SCRIPT)[0], tmp_path / "B.pt")
    policies.keep(finished(SCRIPTS[1])[0], tmp_path / "A.pt")
    page = tmp_path / "README.md"
    page.write_text("# A\n\n| play it | x |\n|---|---|\n| y | z |\n\nB\n\n| policy |\n")
    policies.play(tmp_path)
    lines = page.read_text().splitlines()
    assert lines[:2] == ["# A", ""]
    assert lines[2].startswith("| play it | return")
    assert "sac_continuous_action.py --evaluate" in lines[4]
    assert "/B.pt` | " in lines[5]
    assert lines[6:9] == ["", "B", ""]
    assert lines[11].startswith("| A | `python sac_continuous_action.py ")
    assert lines[12].startswith("| B | ")
    assert len(lines) == 13
    first = page.read_text()
    policies.play(tmp_path)
    assert page.read_text() == first


# --- film -----------------------------------------------------------------------------
def test_film_shows_each_policy_and_waits_at_the_end_of_an_episode(tmp_path):
    """Of a world without MuJoCo: 10 images a second; an episode of at most 3 steps."""
    words = quick(env_id="multi_goal:MultiGoal-v0", max_episode_steps=3)
    result = launch(SCRIPT, words, tmp_path)
    assert result.returncode == 0, result.stderr
    file = tmp_path / "kept.pt"
    policies.keep(only_run(tmp_path), file)
    options = policies.Film(tmp_path / "out.webp", (file,), seconds=1, fps=10)
    title, images = policies.film_policy(file, options)
    assert title == "multi_goal:MultiGoal-v0, MEow"
    assert len(images) == 10
    same = [np.array_equal(images[i], images[i + 1]) for i in range(9)]
    assert same == [False, False] + 7 * [True]
    policies.film(options.out, [file, file], options)
    shape = imageio.improps(options.out, plugin="pillow", index=...).shape
    assert shape[0] == 3 or shape[0] == 10  # equal images may be one
    assert shape[1:3] == (220, 800)


@pytest.mark.slow
def test_film_follows_a_mujoco_robot(tmp_path):
    words = quick(env_id="Hopper-v4", eval_episodes=1)
    assert launch(SCRIPT, words, tmp_path).returncode == 0
    file = tmp_path / "kept.pt"
    policies.keep(only_run(tmp_path), file)
    options = policies.Film(tmp_path / "out.webp", (file,), seconds=0.2, panel=64)
    title, images = policies.film_policy(file, options)
    assert title == "Hopper-v4, MEow"
    assert {image.shape for image in images} == {(64, 64, 3)}
    assert len(images) == 3
    assert not np.array_equal(images[0], images[1])
