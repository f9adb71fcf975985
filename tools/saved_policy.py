"""What the tools that play a run's saved policy have in common."""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from harness.envs import Evaluator

from harness.args import parse_args
from harness.files import RunError, UsageError


def load_evaluator(file: Path, episodes: int) -> tuple[Evaluator, int]:
    """The evaluator of a run's policy file, and the step at which it was saved.

    Raises: UsageError, RunError, OSError, KeyError.
    """
    folder = file.parent.parent if file.parent.name == "policies" else file.parent
    script = json.loads((folder / "args.json").read_text())["script"]
    module = importlib.import_module(Path(script).stem)
    options = ["--evaluate", str(file), "--eval-episodes", str(episodes)]
    args, saved = parse_args(module.Args, module.__name__, "", options)
    return module.load_evaluator(args, saved), saved["step"]


def exit_code(main: Callable[[], None]) -> int:
    """Of a tool: its errors about a run are one sentence each."""
    try:
        main()
    except (UsageError, RunError, OSError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
