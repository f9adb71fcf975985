"""The trained policies in policies/: keeps them, plays them, films them.

    python tools/policies.py keep runs/RUN_NAME policies/Ant-v4.pt
    python tools/policies.py play policies                      # the tables of its card
    python tools/policies.py film docs/policies.webp policies/Ant-v4.pt ...

keep copies the policy out of a run, finished or stopped, and what trained it.
play plays 20 fresh episodes of each policy and writes policies/README.md's tables.
film makes one moving picture of the first episode of each, side by side, in real time.
"""

import contextlib
import dataclasses
import importlib
import io
import json
import math
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import imageio.v3 as imageio
import matplotlib
import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

import harness.environments  # noqa: F401 (chooses an off-screen renderer)
from harness.args import option, parse_args
from harness.errors import RunError, UsageError
from harness.files import POLICY_FILES, load_file, save_file
from harness.machine import choose_device, configure_process
from harness.runs import Session, explain

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import mujoco

SCRIPTS = [file.stem for file in Path(__file__).parent.parent.glob("*.py")]
NETWORKS = ("flow", "norm", "actor", "critics", "sampler", "critic")  # of all scripts
LARGEST = 2**20  # bytes of a file; weights of larger ones are halved to 16 bits
# Options that don't say what was trained.
KEEPING = """
    env_id total_timesteps resume evaluate exp_name runs_dir eval_frequency
    eval_episodes eval_envs log_frequency checkpoint_frequency keep_policies
    capture_video track wandb_project_name wandb_entity cuda torch_threads compile
    sim_threads
"""
TABLES = (  # of a card
    ("play it", "return of 20 episodes", "steps", "commit"),
    ("policy", "trained by"),
)


# --- keep -----------------------------------------------------------------------------
def keep(run: Path, file: Path):
    """Copies a run's policy. Raises: UsageError, RunError, OSError."""
    if file.suffix != ".pt" or file.is_dir():
        raise UsageError(f"{file}: give the policy to write a name that ends in .pt")
    try:
        about = json.loads((run / "args.json").read_text())
        program = Path(about["script"]).stem
    except (OSError, ValueError, LookupError, TypeError):
        text = f"{run} is no run: its args.json is missing or names no script"
        raise UsageError(text) from None
    saved = load_file("keep", run, program, POLICY_FILES)
    names = [name for name in NETWORKS if name in saved]
    content = {name: saved[name] for name in ("args", "sizes", "step", *names)}
    content["args"] |= {"resume": None, "runs_dir": "runs"}
    content["git_commit"] = about["git_commit"]
    if bytes_of(content) > LARGEST:
        for name in names:
            content[name] = {k: halved(v) for k, v in content[name].items()}
    if (size := bytes_of(content)) > LARGEST:
        raise RunError(f"{file} would have {size:,} bytes, more than {LARGEST:,}")
    save_file(file, content, program)
    print(f"{file}: {program}.py, step {saved['step']:,}, {size:,} bytes")


def bytes_of(content: dict) -> int:
    """About the size of a file with this content."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.tell()


def halved(value):
    """A matrix of weights in 16 bits; everything else as it is, in its own memory."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.half() if value.ndim > 1 else value.clone()


# --- play -----------------------------------------------------------------------------
def program_of(file: Path) -> str:
    """The script that wrote a policy. Raises: UsageError."""
    try:
        program = torch.load(file, weights_only=True)["format"]
    except OSError as error:
        raise UsageError(f"can't read {file}: {error.strerror}") from None
    except Exception:  # whatever the unpickler raises
        program = None
    if program not in SCRIPTS:
        raise UsageError(f"{file} is no policy")
    return program


def evaluate(file: Path, session_of, words: list[str]):
    """args, what is saved, returns and lengths. session_of(args) plays the episodes.

    Raises: UsageError, RunError, OSError.
    """
    module = importlib.import_module(program_of(file))
    words = ["--evaluate", str(file), *words]
    args, saved = parse_args(module.Args, module.__name__, "", words)
    with session_of(args) as session:
        returns, lengths = module.evaluate_saved(args, saved, session)
    return args, saved, returns, lengths


def training_command(args, program: str) -> str:
    """The command that trained it: its options beside the script's own settings."""
    default = type(args).for_env(args.env_id).fixed(KEEPING)
    words = ["python", f"{program}.py", "--env-id", args.env_id]
    for name, value in args.fixed(KEEPING).items():
        if value == default[name]:
            continue
        if isinstance(value, bool):
            words.append(option(name) if value else option(f"no_{name}"))
        else:
            words += [option(name), str(value)]
    words += ["--total-timesteps", str(args.total_timesteps)]
    return shlex.join(words)


def card(file: Path) -> dict[str, str]:
    """What the tables say of a policy. Raises: see `evaluate`."""
    words = ["--eval-episodes", "20"]
    args, saved, returns, _ = evaluate(file, plain_session, words)
    program, step, planned = saved["format"], saved["step"], args.total_timesteps
    stopped = f" of {planned:,}" if step < planned else ""
    trained = dataclasses.replace(args, evaluate=None)
    place = f"{file.parent.name}/{file.name}"
    return {
        "play it": f"`python {program}.py --evaluate {place}`",
        "return of 20 episodes": f"{np.mean(returns):.0f} ± {np.std(returns):.0f}",
        "steps": f"{step:,}{stopped}",
        "commit": saved["git_commit"][:7],
        "policy": file.stem,
        "trained by": f"`{training_command(trained, program)}`",
    }


def plain_session(args) -> Session:
    return Session(args, choose_device(args.cuda))


def play(folder: Path):
    """Writes the tables of README.md in this folder: its text stays."""
    page, files = folder / "README.md", sorted(folder.glob("*.pt"))
    if not files:
        raise UsageError(f"there is no policy (*.pt) in {folder}")
    lines = page.read_text().splitlines() if page.exists() else []
    for first, *_ in TABLES:
        if not any(line.startswith(f"| {first} |") for line in lines):
            missing = f"README.md with a table that begins with | {first} |"
            raise UsageError(f"there is no {missing} in {folder}")
    cards = []
    for file in files:
        cards.append(card(file))
        print(*cards[-1].values(), sep=" | ", flush=True)
    lines = page.read_text().splitlines()  # its text may have been edited meanwhile
    for columns in TABLES:
        rows = [columns, ["---"] * len(columns)]
        rows += [[card[column] for column in columns] for card in cards]
        start = [line.startswith(f"| {columns[0]} |") for line in lines].index(True)
        ends = (i for i in range(start, len(lines)) if not lines[i].startswith("|"))
        lines[start : next(ends, None)] = [f"| {' | '.join(row)} |" for row in rows]
    page.write_text("\n".join(lines) + "\n")


# --- film -----------------------------------------------------------------------------
class Filmed(Exception):
    """There are images enough."""


class FilmingSession(Session):
    """A session that keeps the images of the first episode's first seconds."""

    def __init__(self, args, seconds: float, fps: float, size: int):
        super().__init__(args, choose_device(args.cuda))
        self.wanted, self.fps, self.size = math.ceil(seconds * fps), fps, size
        self.images, self.played, self.camera = [], 0, None

    @contextlib.contextmanager
    def evaluation(self, fps: int = 30):
        """fps: steps of the environment in a second."""
        self.steps_a_second = fps
        with contextlib.suppress(Filmed):
            yield self

    def step(self, text: str):
        """Before each step."""

    def film(self, env):
        """After `step` while the first episode goes on."""
        due = self.played / self.steps_a_second * self.fps
        while len(self.images) <= due:
            self.images.append(self.image(env))
            if len(self.images) == self.wanted:
                raise Filmed
        self.played += 1

    def image(self, env) -> np.ndarray:
        """What it shows; of a MuJoCo task, seen from a camera that goes along."""
        model = getattr(getattr(env, "unwrapped", None), "model", None)
        if not isinstance(model, mujoco.MjModel):
            return square(env.render())
        if self.camera is None:
            self.renderer = self.closing(mujoco.Renderer(model, self.size, self.size))
            # software renderers draw black squares for some shadows
            self.renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
            self.camera = following_camera(model)
        self.renderer.update_scene(env.unwrapped.data, self.camera)
        return self.renderer.render()


def following_camera(model: mujoco.MjModel) -> mujoco.MjvCamera:
    """From the side of a planar robot; from before and above of any other."""
    camera = mujoco.MjvCamera()
    camera.type, camera.trackbodyid = mujoco.mjtCamera.mjCAMERA_TRACKING, 1
    planar = mujoco.mjtJoint.mjJNT_FREE not in model.jnt_type
    camera.azimuth, camera.elevation = (90, -10) if planar else (135, -20)
    camera.distance = 3.5 if planar else 4.5
    return camera


def film_policy(file: Path, options) -> tuple[str, list]:
    """Its title and its images. An episode that ends earlier stays at its end."""
    sessions = []

    def filming(args):
        size = options.seconds, options.fps, options.panel
        sessions.append(FilmingSession(args, *size))
        return sessions[0]

    words = ["--capture-video", "--eval-episodes", "1"]
    args, saved, *_ = evaluate(file, filming, words)
    images = sessions[0].images
    images += images[-1:] * (sessions[0].wanted - len(images))
    name, rest = saved["format"].split("_", 1)
    method = {"meow": "MEow", "sac": "SAC", "sql": "SQL"}.get(name, name)
    if rest.startswith("auto"):
        method += " without tuning"
    robot = "robot " if "isaacgym" in rest else ""
    return f"{robot}{args.env_id}, {method}", images


def square(image: np.ndarray) -> np.ndarray:
    """The middle of an image (height, width, 3)."""
    height, width = image.shape[:2]
    size = min(height, width)
    top, left = (height - size) // 2, (width - size) // 2
    return image[top : top + size, left : left + size]


def film(out: Path, files: list[Path], options):
    """Writes one moving picture, a panel for each policy. Raises: see `evaluate`."""
    if out.suffix not in (".webp", ".gif"):
        raise UsageError(f"{out}: the picture's name ends in .webp or .gif")
    for name in ("seconds", "fps", "columns", "panel"):
        if getattr(options, name) <= 0:
            raise UsageError(f"--{name} {getattr(options, name)}: must be positive")
    if not files:
        raise UsageError("film: which policies?")
    films = [film_policy(file, options) for file in files]
    rows = math.ceil(len(films) / options.columns)
    side = options.panel / 100  # inches, at 100 dots each
    size = (options.columns * side, rows * (side + 0.2))
    figure, axes = plt.subplots(rows, options.columns, figsize=size, squeeze=False)
    figure.subplots_adjust(0, 0, 1, 1 - 0.2 / size[1], 0.02, 0.2 / side)
    for ax in axes.flat:
        ax.axis("off")
    panels = []
    for ax, (title, images) in zip(axes.flat, films, strict=False):
        ax.set_title(title, fontsize=7, pad=3)
        panels.append(ax.imshow(images[0]))
    frames = []
    for images in zip(*(images for _, images in films), strict=True):
        for panel, image in zip(panels, images, strict=True):
            panel.set_data(image)
        figure.canvas.draw()
        frames.append(np.asarray(figure.canvas.buffer_rgba())[..., :3].copy())
    plt.close(figure)
    milliseconds = round(1000 / options.fps)
    settings = dict(duration=milliseconds, loop=0, quality=options.quality, method=6)
    imageio.imwrite(out, np.stack(frames), plugin="pillow", **settings)
    print(f"{out}: {len(frames)} frames, {out.stat().st_size:,} bytes")


# --- The command line -----------------------------------------------------------------
@dataclass
class Keep:
    """Copies a run's policy."""

    run: Annotated[Path, tyro.conf.Positional]
    """folder of the run"""
    file: Annotated[Path, tyro.conf.Positional]
    """policy to write, such as policies/Ant-v4.pt"""


@dataclass
class Play:
    """Plays all policies and writes the table of their card."""

    folder: Annotated[Path, tyro.conf.Positional]
    """with *.pt and README.md"""


@dataclass
class Film:
    """Makes one moving picture of policies."""

    out: Annotated[Path, tyro.conf.Positional]
    """picture to write: .webp or .gif"""
    files: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """policies, a panel each"""
    seconds: float = 6.0
    """length"""
    fps: float = 12.5
    """images a second"""
    columns: int = 4
    """panels in a row"""
    panel: int = 200
    """pixels of a panel's side"""
    quality: int = 22
    """of the images, up to 100"""


def main() -> int:
    options = tyro.cli(Keep | Play | Film, description=__doc__.split("\n\n")[0])
    configure_process(1)
    try:
        if isinstance(options, Keep):
            keep(options.run, options.file)
        elif isinstance(options, Play):
            play(options.folder)
        else:
            film(options.out, list(options.files), options)
    except Exception as error:
        return explain(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
