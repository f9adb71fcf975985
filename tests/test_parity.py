"""The sources: copies that must not drift apart, deviations and options."""

import ast
import io
import re
import tokenize
from functools import cache

import pytest
from conftest import ROOT

GYMNASIUM = [
    f"{name}_continuous_action.py" for name in ("meow", "sac", "sql", "meow_auto")
]
ISAAC = [f"{name}_isaacgym.py" for name in ("meow", "meow_auto", "sac")]
SCRIPTS = GYMNASIUM + ISAAC


def files(*patterns: str) -> list[str]:
    return sorted(
        str(p.relative_to(ROOT)) for pattern in patterns for p in ROOT.glob(pattern)
    )


HARNESS, PACKAGE = files("harness/*.py"), files("isaac_tasks/*.py")
OTHERS = files("sb3_baselines.py", "multi_goal/*.py", "tools/*.py", "studies/*/*.py")

# What two scripts define alike, they define word for word, but for what is their own.
OWN = set("Args PAPER_SETTINGS train evaluate_saved".split())
# What an algorithm has of its own, and what a kind of environment has.
ALGORITHM = OWN | set("MLP METRICS HIDDEN make_update make_networks".split())
ALGORITHM |= set("soft_target critic_loss MULTI_GOAL".split())
ENVIRONMENT = OWN | set("evaluate make_eval_envs make_policy".split())
MEOW, SAC, SQL, AUTO = GYMNASIUM
ROBOTS, AUTO_ROBOTS, SAC_ROBOTS = ISAAC
# What MEow without tuning changes in MEow's script.
UNTUNED = OWN | set("MLP EnergyFlow make_flow make_policy make_update".split())
UNTUNED |= set("soft_target meow_loss METRICS".split())
PAIRS = {
    (MEOW, SAC): ALGORITHM,
    (MEOW, SQL): ALGORITHM,
    (MEOW, AUTO): UNTUNED,
    (AUTO, ROBOTS): UNTUNED | ENVIRONMENT,
    (AUTO, AUTO_ROBOTS): ENVIRONMENT | {"meow_loss", "make_update"},
    (ROBOTS, AUTO_ROBOTS): UNTUNED,
    (SAC, SQL): ALGORITHM,
    (MEOW, "sb3_baselines.py"): OWN,
    (ROBOTS, SAC_ROBOTS): ALGORITHM,
    (MEOW, ROBOTS): ENVIRONMENT,
    (SAC, SAC_ROBOTS): ENVIRONMENT | {"HIDDEN"},
}
# So that these blocks can't vanish from the comparison by another name.
SHARED = {
    (MEOW, SAC): "make_env episode_seed evaluate ReplayBuffer split_batch adam",
    (MEOW, SQL): "make_env episode_seed evaluate ReplayBuffer split_batch adam",
    (MEOW, AUTO): "make_env evaluate ReplayBuffer Swish log_prior adam",
    (AUTO, AUTO_ROBOTS): "EnergyFlow MLP soft_target reward_unit adam METRICS",
    (ROBOTS, AUTO_ROBOTS): "evaluate VectorReplayBuffer first_observations adam",
    (AUTO, ROBOTS): "RunningMeanStd Swish log_prior adam",
    (SAC, SQL): "make_policy make_eval_envs adam_moments evaluate make_env",
    (MEOW, "sb3_baselines.py"): "make_env episode_seed evaluate make_eval_envs",
    (
        ROBOTS,
        SAC_ROBOTS,
    ): "VectorReplayBuffer RunningMeanStd evaluate make_policy adam",
    (MEOW, ROBOTS): "EnergyFlow AffineEnergyFlow make_update meow_loss draw_dropout",
    (SAC, SAC_ROBOTS): "Actor Critics make_critic_update make_actor_update actor_loss",
}


@cache
def read(path: str) -> str:
    return (ROOT / path).read_text()


def walk(path: str):
    return ast.walk(ast.parse(read(path)))


@cache
def definitions(path: str) -> dict[str, ast.AST]:
    """Functions, classes, methods (Class.method) and constants of a file."""
    found = {}

    def visit(body, prefix=""):
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found[prefix + node.name] = node
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{prefix}{node.name}.")
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                found[prefix + node.targets[0].id] = node

    visit(ast.parse(read(path)).body)
    return found


def docstring(node: ast.AST) -> ast.Constant | None:
    first = node.body[0] if getattr(node, "body", None) else None
    value = first.value if isinstance(first, ast.Expr) else None
    return (
        value
        if isinstance(value, ast.Constant) and isinstance(value.value, str)
        else None
    )


def test_files_are_found():
    assert len(HARNESS) >= 6
    assert len(PACKAGE) >= 10
    assert "sb3_baselines.py" in OTHERS


@pytest.mark.parametrize("pair", PAIRS, ids=" ".join)
def test_repeated_blocks_are_identical(pair):
    """Docstrings too."""
    one, two = map(definitions, pair)
    common = {name for name in one if name in two and "." not in name}
    assert common >= set(SHARED[pair].split())
    for name in common - PAIRS[pair]:
        assert text(one[name]) == text(two[name]), name


def text(definition: ast.AST) -> str:
    """Its code and docstrings, without the tags of deviations."""
    return re.sub(r"  # [DISQ]\d+", "", ast.unparse(definition))


def texts_of_options(path: str) -> dict[str, str]:
    """Each option's line with its comment."""
    lines = read(path).splitlines()
    return {
        option.target.id: "\n".join(lines[option.lineno - 1 : option.end_lineno])
        for option in options(path)
    }


@pytest.mark.parametrize("pair", PAIRS, ids=" ".join)
def test_repeated_options_are_identical(pair):
    """Their texts and defaults, but for those that an algorithm or a simulator sets."""
    own = "exp_name env_id learning_starts batch_size buffer_size reward_shifting alpha"
    own += " tau deterministic_eval policy_lr q_lr autotune policy_frequency"
    own += " recent_size policy_average temperature dropout"
    one, two = map(texts_of_options, pair)
    common = set(one) & set(two) - set(own.split())
    assert len(common) >= 2
    assert {name for name in common if one[name] != two[name]} == set()


# The run alone: words of what only a script knows.
SCRIPTS_WORDS = "reward rewards observation observations action actions batch batches"
SCRIPTS_WORDS += " gradient gradients critic actor alpha gamma tau entropy"


@pytest.mark.parametrize("path", sorted(set(HARNESS) - {"harness/environments.py"}))
def test_harness_keeps_the_run_and_nothing_else(path):
    """But for the wrapper of environments, which plays an episode's actions again."""
    words = set(re.findall(r"[a-z_]+", read(path).lower()))
    assert words & set(SCRIPTS_WORDS.split()) == set()


@pytest.mark.parametrize("path", PACKAGE)
def test_robots_need_nothing_of_the_harness(path):
    assert not re.search(r"^\s*(from|import) harness\b", read(path), re.M)


@pytest.mark.parametrize("path", [*SCRIPTS, "sb3_baselines.py", *HARNESS, *PACKAGE])
def test_no_script_is_imported(path):
    names = "|".join(
        script.removesuffix(".py") for script in [*SCRIPTS, "sb3_baselines"]
    )
    assert not re.search(rf"^\s*(from|import) ({names})\b", read(path), re.M)


# --- Deviations from other code: D1, I1, S1, Q1, ... -------------------------------
# No line to mark: left out there, settings, the harness.
UNMARKED = set("D4 D5 D6 I3 Q1".split())


def listed(path: str) -> list[str]:
    """The tags that a script's docstring explains, in its order."""
    return re.findall(
        r"^([DISQ]\d+) (?!to )", ast.get_docstring(ast.parse(read(path))), re.M
    )


def marked(path: str) -> set[str]:
    """The tags of a file's comments and of its functions' and classes' docstrings."""
    tokens = tokenize.generate_tokens(io.StringIO(read(path)).readline)
    comments = [t.string for t in tokens if t.type == tokenize.COMMENT]
    texts = [docstring(d).value for d in definitions(path).values() if docstring(d)]
    found = [re.findall(r"# ([DISQ]\d+)\b", text) for text in comments + texts]
    return {tag for tags in found for tag in tags}


@pytest.mark.parametrize("path", SCRIPTS)
def test_deviations_are_numbered_in_order(path):
    for letter in "DISQ":
        tags = [tag for tag in listed(path) if tag[0] == letter]
        assert tags == [f"{letter}{i + 1}" for i in range(len(tags))]


def test_deviations_are_explained_once_and_marked():
    """A tag's comment is in the script that explains it or in what it imports."""
    tags = [tag for path in SCRIPTS for tag in listed(path)]
    assert len(tags) == len(set(tags)) >= 25
    imported = set().union(*(marked(path) for path in HARNESS + PACKAGE))
    used = imported.union(*(marked(path) for path in SCRIPTS))
    assert used == set(tags) - UNMARKED
    for path in SCRIPTS:
        assert set(listed(path)) - UNMARKED <= marked(path) | imported


def test_deviations_are_those_of_the_documentation():
    """Rows of its tables, or a range such as S1 to S5 that points to a docstring."""
    page = read("docs/deviations.md")
    rows = re.findall(r"^\| *([DISQ]\d+) *\|", page, re.M)
    for letter, last in re.findall(r"\b([DISQ])1 to \1(\d+)\b", page):
        rows += [f"{letter}{i}" for i in range(1, int(last) + 1)]
    assert sorted(set(rows)) == sorted(tag for path in SCRIPTS for tag in listed(path))


# --- Options ----------------------------------------------------------------------
def options(path: str) -> list[ast.AnnAssign]:
    """The options of a file's Args classes."""
    classes = [d for n, d in definitions(path).items() if isinstance(d, ast.ClassDef)]
    fields = [field for c in classes if c.name.endswith("Args") for field in c.body]
    fields = [field for field in fields if isinstance(field, ast.AnnAssign)]
    return [
        field for field in fields if "ClassVar" not in ast.unparse(field.annotation)
    ]


OPTION_FILES = [p for p in SCRIPTS + OTHERS + HARNESS + PACKAGE if options(p)]


def test_options_are_found():
    assert {*SCRIPTS, "harness/args.py"} <= set(OPTION_FILES)


@pytest.mark.parametrize("path", OPTION_FILES)
def test_every_option_is_explained(path):
    lines = read(path).splitlines()
    for field in options(path):
        text = "\n".join(lines[field.lineno - 1 : field.end_lineno])
        assert re.search(r"# \w.{5}", text), text


@pytest.mark.parametrize("path", OPTION_FILES)
def test_every_option_is_read(path):
    """As args.name, in the script itself or, if it is everyone's, anywhere."""
    shared = {field.target.id for file in HARNESS + PACKAGE for field in options(file)}
    everyone = path in HARNESS + PACKAGE
    nodes = [
        n
        for f in (SCRIPTS + HARNESS + PACKAGE if everyone else [path])
        for n in walk(f)
    ]
    attributes = [
        n for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)
    ]
    used = {
        n.attr
        for n in attributes
        if re.search(r"\b(args|given)$", ast.unparse(n.value))
    }
    names = {field.target.id for field in options(path)}
    assert names - used - (set() if everyone else shared) == set()
