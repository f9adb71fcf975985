"""tools/robots_on_gpu.sh, small and on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

SMALL = (
    "--num-envs 2 --batch-size 8 --total-timesteps 110 --learning-starts 100 "
    "--log-frequency 55 --eval-episodes 1 --no-cuda --no-compile"
)


def launch(words, runs):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    words = [str(ROOT / "tools/robots_on_gpu.sh"), *words.split()]
    env = os.environ | {"RUNS": str(runs), "PATH": path}
    return subprocess.run(words, capture_output=True, text=True, env=env)


@pytest.mark.slow
def test_speed_and_returns_are_printed(tmp_path):
    done = launch(f"Ant {SMALL}", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [row.split() for row in done.stdout.splitlines()[1:]]
    assert [row[:2] for row in rows] == [
        ["55", "charts/env_SPS"],
        ["110", "charts/env_SPS"],
        ["110", "eval/return_mean"],
    ]
    assert all(float(row[2]) for row in rows)


def test_a_failed_run_fails(tmp_path):
    assert "say which robot" in launch("", tmp_path).stderr
    done = launch("Ant --tau 7", tmp_path)
    assert done.returncode == 2
    assert "--tau 7.0: must be" in done.stderr
