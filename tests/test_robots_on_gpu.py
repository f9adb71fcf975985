"""tools/robots_on_gpu.sh, small and on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

SMALL = (
    "--num-envs 2 --batch-size 8 --total-timesteps 110 --learning-starts 100 "
    "--log-frequency 55 --eval-episodes 1 --no-cuda --no-compile"
)


def test_speed_and_returns_are_printed(tmp_path):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"RUNS": str(tmp_path), "PATH": path}
    done = subprocess.run(
        [str(ROOT / "tools/robots_on_gpu.sh"), *SMALL.split()],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    rows = [row.split() for row in done.stdout.splitlines()[1:]]
    assert [row[:2] for row in rows] == [
        ["55", "charts/env_SPS"],
        ["110", "charts/env_SPS"],
        ["110", "eval/return_mean"],
    ]
    assert all(float(row[2]) for row in rows)
