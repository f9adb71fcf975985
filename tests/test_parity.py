"""The sources: copies that must not drift apart, and what must not be repeated or grow."""

import ast
import io
import re
import tokenize
from functools import cache
from itertools import combinations

import pytest
from conftest import ROOT

GYMNASIUM = [f"{name}_continuous_action.py" for name in ("meow", "sac", "sql")]
ISAAC = [f"{name}_isaacgym.py" for name in ("meow", "sac")]
SCRIPTS = GYMNASIUM + ISAAC


def files(*patterns: str) -> list[str]:
    return sorted(
        str(p.relative_to(ROOT)) for pattern in patterns for p in ROOT.glob(pattern)
    )


HARNESS, PACKAGE = files("harness/*.py"), files("isaac_tasks/*.py")
OTHERS = files("sb3_baselines.py", "multi_goal.py", "multi_goal/*.py", "tools/*.py")

# The same algorithm in two scripts: these blocks are identical.
MEOW = (
    "Triple Swish MLP EnergyFlow log_prior log_tanh_slope Keep soft_target meow_loss "
)
MEOW += "clip_gradient METRICS make_update make_flow"
SAC = "MLP Actor Critics log_normal log_tanh_slope Normal soft_target critic_loss actor_loss "
SAC += "temperature_loss CRITIC_METRICS ACTOR_METRICS make_critic_update make_actor_update "
SAC += "make_networks"
TWINS = {("meow_continuous_action.py", "meow_isaacgym.py"): MEOW.split()}
TWINS[("sac_continuous_action.py", "sac_isaacgym.py")] = SAC.split()
# What each script has of its own under a common name, and what two algorithms call alike.
OWN = set("Args PAPER_SETTINGS paper HIDDEN train load_evaluator".split())
ALIKE = OWN | set(
    "MLP log_tanh_slope soft_target critic_loss METRICS make_update".split()
)
ALIKE |= {"make_networks", "MULTI_GOAL", "Normal"}
# Formulas and networks that two algorithms share word for word.
COPIES = {"MLP", "MLP.__init__", "log_tanh_slope", "log_prior", "log_normal", "Normal"}
ENTRY = {
    "main",
    "parse_args",
    "Policy",
    "Run",
}  # names that a tool may use for its own things
LINES = {script: 450 for script in GYMNASIUM} | {script: 480 for script in ISAAC}
LINES |= {module: 260 for module in HARNESS}
LINES |= {
    "tools/compare.py": 350,
    "sb3_baselines.py": 220,
    "README.md": 200,
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


def substance(node: ast.AST) -> str:
    """A definition's source without its name, decorators, docstrings and comments."""
    node = ast.parse(ast.unparse(node)).body[0]
    for part in ast.walk(node):
        if isinstance(part, ast.FunctionDef | ast.ClassDef) and docstring(part):
            part.body[0] = ast.Pass()
    if hasattr(node, "name"):
        node.name, node.decorator_list = "_", []
    return ast.unparse(node)


@cache
def substances(path: str) -> dict[str, str]:
    """Names of functions and classes by their substance, those of a line or two left out."""
    found = {
        n: substance(d)
        for n, d in definitions(path).items()
        if not isinstance(d, ast.Assign)
    }
    return {text: name for name, text in found.items() if text.count("\n") >= 3}


def test_files_are_found():
    assert len(HARNESS) >= 6
    assert len(PACKAGE) >= 10
    assert "sb3_baselines.py" in OTHERS


@pytest.mark.parametrize("pair", TWINS, ids=" ".join)
def test_twins_have_the_same_algorithm(pair):
    """Every block of it, docstrings too; other common names are the scripts' own."""
    one, two = map(definitions, pair)
    for name in TWINS[pair]:
        assert ast.unparse(one[name]) == ast.unparse(two[name]), name
    assert {name for name in one if name in two and "." not in name} <= {
        *TWINS[pair],
        *OWN,
    }


@pytest.mark.parametrize("path", SCRIPTS + OTHERS)
def test_nothing_of_the_harness_is_repeated(path):
    """Neither under its name nor under another."""
    own, own_texts = definitions(path), substances(path)
    allowed = ENTRY if path in OTHERS else set()
    for module in HARNESS + PACKAGE * (path in ISAAC):
        names = {n for n in definitions(module) if "." not in n} & set(own) - allowed
        assert names == set(), module
        texts = substances(module)
        assert [(n, own_texts[t]) for t, n in texts.items() if t in own_texts] == [], (
            module
        )


@pytest.mark.parametrize(
    "pair", list(combinations([*SCRIPTS, "sb3_baselines.py"], 2)), ids=" ".join
)
def test_two_scripts_share_nothing_but_the_algorithm(pair):
    names = [{n for n in definitions(path) if "." not in n} for path in pair]
    assert names[0] & names[1] <= {*TWINS.get(pair, ALIKE), *OWN}
    one, two = map(substances, pair)
    copied = {(name, two[text]) for text, name in one.items() if text in two}
    blocks = {*TWINS.get(pair, []), *COPIES}
    assert [
        names for names in copied if not {n.split(".")[0] for n in names} <= blocks
    ] == []


@pytest.mark.parametrize("path", [*SCRIPTS, "sb3_baselines.py", *HARNESS, *PACKAGE])
def test_no_script_is_imported(path):
    names = "|".join(
        script.removesuffix(".py") for script in [*SCRIPTS, "sb3_baselines"]
    )
    assert not re.search(rf"^\s*(from|import) ({names})\b", read(path), re.M)


@pytest.mark.parametrize("path", LINES)
def test_files_can_be_read_in_one_sitting(path):
    assert len(read(path).splitlines()) <= LINES[path]


def test_the_whole_harness_can_be_read_in_one_sitting():
    assert sum(len(read(path).splitlines()) for path in HARNESS) <= 900


def test_readme_is_short():
    assert len(read("README.md").encode()) <= 12_000


@pytest.mark.parametrize("path", SCRIPTS)
def test_networks_come_early(path):
    """The first one by line 140."""
    classes = [d for d in definitions(path).values() if isinstance(d, ast.ClassDef)]
    networks = [
        c.lineno
        for c in classes
        if c.bases and ast.unparse(c.bases[0]).startswith("nn.")
    ]
    assert min(networks) <= 140


@pytest.mark.parametrize("path", HARNESS)
def test_harness_knows_no_algorithm(path):
    """No identifier and no text but docstrings speaks of what only an algorithm has."""
    tree, words = ast.parse(read(path)), set()
    texts = [
        docstring(n)
        for n in ast.walk(tree)
        if isinstance(n, ast.Module | ast.FunctionDef)
    ]
    texts += [docstring(n) for n in ast.walk(tree) if isinstance(n, ast.ClassDef)]
    for node in ast.walk(tree):
        if not any(node is text for text in texts):
            fields = [value for _, value in ast.iter_fields(node)]
            words |= {
                w.lower() for f in fields if isinstance(f, str) for w in split_words(f)
            }
    algorithm = "flow flows critic critics actor actors temperature alpha entropy latent sampler"
    assert (
        words
        & set(f"{algorithm} shift shifts coupling dropout polyak tau gamma".split())
        == set()
    )


def split_words(text: str) -> list[str]:
    return re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", text)


# --- Deviations from other code: D1, I1, S1, Q1, ... ------------------------------------------
UNMARKED = {
    "D4",
    "D5",
    "D6",
    "I3",
    "Q1",
}  # no line to mark: left out there, settings, the harness


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
    """Rows of its tables, or a range such as S1 to S5 where it points to a script's docstring."""
    page = read("docs/deviations.md")
    rows = re.findall(r"^\| *([DISQ]\d+) *\|", page, re.M)
    for letter, last in re.findall(r"\b([DISQ])1 to \1(\d+)\b", page):
        rows += [f"{letter}{i}" for i in range(1, int(last) + 1)]
    assert sorted(set(rows)) == sorted(tag for path in SCRIPTS for tag in listed(path))


# --- Options ------------------------------------------------------------------------------------
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
    assert {*SCRIPTS, "harness/args.py", "isaac_tasks/training.py"} <= set(OPTION_FILES)


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
