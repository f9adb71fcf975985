"""What the tests share that learn a task from scratch."""

import csv


def evaluations(script, folder, **settings) -> list[float]:
    """Returns of the evaluations of a run, of one episode each."""
    settings |= dict(batch_size=128, tau=0.02, eval_episodes=1, runs_dir=folder)
    words = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    assert script.main(script.Args, script.train, script.evaluate_saved, words) == 0
    (metrics,) = folder.glob("*/metrics.csv")
    with open(metrics) as file:
        rows = [r for r in csv.DictReader(file) if r["name"] == "eval/return_mean"]
    return [float(row["value"]) for row in rows]


def inverted_pendulum(script, folder, **settings) -> list[float]:
    """The same of InvertedPendulum; a random policy gets 5, the maximum is 1,000."""
    task = dict(env_id="InvertedPendulum-v4", total_timesteps=8_000)
    task |= dict(learning_starts=500, eval_frequency=1_000)
    return evaluations(script, folder, **task | settings)
