"""studies/robots_on_a_cpu/measure.py: its ways to step are the same training."""

import sys

import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "studies/robots_on_a_cpu"))

import measure


def training():
    torch.manual_seed(0)
    args = measure.script.Args.for_env("Ingenuity")
    args.num_envs, args.batch_size, args.compile = 4, 16, False
    return measure.Training(args)


def test_a_simulator_beside_the_update_changes_nothing():
    results = []
    for way in ("step", "step_beside"):
        made = training()
        for _ in range(3):
            made.step()
        for _ in range(4):
            getattr(made, way)()
        results.append((made.theta, made.obs, made.replay.rows[:7]))
        made.other.shutdown()
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    before = training().theta
    assert not torch.equal(before, results[0][0])
    assert (results[0][2] != 0).any()


def test_every_part_is_measured(capsys, monkeypatch):
    words = ["--env-id", "Ingenuity", "--steps", "1", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["measure.py", *words])
    small = measure.script.Args(
        env_id="Ingenuity", num_envs=4, batch_size=16, compile=False
    )
    monkeypatch.setattr(measure.script.Args, "for_env", lambda _: small)
    measure.main()
    rows = [
        line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines()[4:]
    ]
    assert rows[:4] == ["acting", "drawing a batch", "the update", "the simulator"]
    assert rows[-1] == "the simulator beside the update"
    assert len(rows) == 9
