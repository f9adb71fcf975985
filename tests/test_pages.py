"""Pages, packaging and what a contributor is told: nothing names what isn't there."""

import ast
import re
import sys
import tomllib

import pytest
from conftest import ROOT, SCRIPTS

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "policies/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "studies").rglob("*.md")),
]
REPORTS = sorted((ROOT / "results").rglob("*.md"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
README = (ROOT / "README.md").read_text()


def name_of(page) -> str:
    return str(page.relative_to(ROOT))


each_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


def names(requirements: list[str]) -> set[str]:
    """The packages of requirements, as they are imported."""
    found = (re.match(r"[\w-]+", line) for line in requirements)
    return {match[0].replace("-", "_") for match in found if match}


def anchors(page) -> set[str]:
    """What `page.md#...` can point to, as GitHub derives it from the headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {
        re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        for heading in headings
    }


@pytest.mark.parametrize("page", [*PAGES, *REPORTS, ROOT / "CHANGELOG.md"], ids=name_of)
def test_links_and_images_exist(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.is_file(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=name_of)
def test_no_line_is_too_long(page):
    """120 characters, rows of tables and code included."""
    lines = enumerate(page.read_text().splitlines(), 1)
    assert [(number, line) for number, line in lines if len(line) > 120] == []


@each_page
def test_commands_run_files_that_exist(page):
    """`python FILE`, `python -m MODULE` and `./SCRIPT`, from here or the page's folder.

    Commands at an earlier commit are left out: `git checkout ...` and blocks with a
    `git worktree`.
    """
    text = re.sub(r"`git checkout .*`", "", page.read_text())
    text = re.sub(r"^```bash\ngit worktree (?s:.*?)^```", "", text, flags=re.M)
    for name in re.findall(r"python (\S+\.py)\b", text):
        for algorithm in ("meow", "sac", "sql") if "${algo}" in name else ("",):
            file = name.replace("${algo}", algorithm)
            assert (ROOT / file).is_file() or (page.parent / file).is_file(), name
    for module in set(re.findall(r"python -m (\w[\w.]*)", text)) - {"venv", "pytest"}:
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), module
    for script in re.findall(r"^(\./\S+|\.ci/run)", text, re.M):
        assert (ROOT / script).is_file(), script


@each_page
def test_files_that_are_named_exist(page):
    folders = "harness|isaac_tasks|multi_goal|tools|tests|docs|results|studies"
    scripts = "meow_|sac_|sql_|sb3_"
    pattern = rf"`((?:{folders}|{scripts})[\w/.-]*(?:/|\.\w+))`"
    found = re.findall(pattern, page.read_text())
    files = [name for name in found if "/" in name or name.endswith((".py", ".md"))]
    missing = [
        n for n in files if not any((f / n).exists() for f in (ROOT, ROOT / "tools"))
    ]
    assert missing == []


def test_every_page_is_reached_from_the_readme():
    """By links from page to page."""
    reached, new = set(), {ROOT / "README.md"}
    while new:
        reached |= new
        links = {
            (page.parent / target).resolve()
            for page in new
            for target in re.findall(r"\]\(([^)\s#]+\.md)", page.read_text())
            if not target.startswith("http")
        }
        new = links - reached
    assert set(PAGES) - reached == set()


def test_code_named_beside_the_mathematics_exists():
    """The table from mathematics to code: each name is a definition of the script."""
    table = README[README.index("| mathematics | code") :].split("\n\n")[0]
    tree = ast.parse((ROOT / "meow_continuous_action.py").read_text())
    defined = {node.name for node in ast.walk(tree) if hasattr(node, "name")}
    rows = table.splitlines()[2:]
    assert len(rows) > 9
    for row in rows:
        code = row.rsplit("|", 2)[1]
        for name in re.findall(r"`([\w.]+)`", code):
            assert set(name.split(".")) <= defined, name


def test_every_import_is_a_requirement_and_every_requirement_is_used():
    """requirements.txt is what the project depends on; extras hold the rest."""
    project = PROJECT["project"]
    assert "dependencies" in project["dynamic"]
    source = PROJECT["tool"]["setuptools"]["dynamic"]["dependencies"]["file"]
    assert source == ["requirements.txt"]
    required = names((ROOT / "requirements.txt").read_text().splitlines())
    extras = set().union(*map(names, project["optional-dependencies"].values()))
    assert not required & extras

    files = [
        f for f in ROOT.rglob("*.py") if not {"runs", ".venv", "build"} & set(f.parts)
    ]
    own = {file.stem for file in files} | {file.parent.name for file in files}
    imported = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(node.module.split(".")[0])
    imported = {"warp_lang" if name == "warp" else name for name in imported}
    imported -= sys.stdlib_module_names | own
    nvidia = {"isaacgym", "isaacgymenvs", "isaaclab", "isaaclab_tasks"}
    assert imported - nvidia <= required | extras
    alone = {
        "tensorboard",
        "pytest_xdist",
        "ruff",
    }  # used by torch or from the command line
    assert (required | extras) - imported <= alone


def test_contributors_install_and_run_what_the_check_does():
    """One command installs every extra, one runs all tests, wherever it is said."""
    extras = ",".join(PROJECT["project"]["optional-dependencies"])
    test = re.search(r"^python -m pytest .*$", README, re.M)[0]
    check = (ROOT / ".ci/run").read_text()
    for text in (README, (ROOT / "CONTRIBUTING.md").read_text(), check):
        assert re.search(rf'^pip install (--quiet )?-e "\.\[{extras}\]"', text, re.M)
        assert re.search(rf"^{re.escape(test)} *([#|].*)?$", text, re.M)
    assert ".ci/run" in (ROOT / ".github/workflows/ci.yml").read_text()


def script_metadata(script) -> dict:
    """The inline metadata of a script, by the regular expression of its standard."""
    pattern = r"(?m)^# /// script$\s(?P<content>(^#(| .*)$\s)+)^# ///$"
    (found,) = re.finditer(pattern, script.read_text())
    lines = found["content"].splitlines(keepends=True)
    return tomllib.loads("".join(line.removeprefix("#")[1:] for line in lines))


@pytest.mark.parametrize(
    "script", sorted(ROOT.glob("*.py")), ids=lambda path: path.stem
)
def test_inline_metadata_is_the_requirements(script):
    """`uv run SCRIPT` installs what requirements.txt lists; PEP 723."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    wanted = [line for line in lines if line and not line.startswith("#")]
    if "import stable_baselines3" in script.read_text():
        extra = PROJECT["project"]["optional-dependencies"]["bench"]
        wanted += [line for line in extra if line.startswith("stable-baselines3")]
    metadata = script_metadata(script)
    assert metadata["dependencies"] == wanted
    assert metadata["requires-python"] == PROJECT["project"]["requires-python"]
    assert script.read_text().startswith("# /// script\n")


def test_an_installation_has_every_script_and_package():
    """`pip install .` gives modules that can be imported from anywhere."""
    setuptools = PROJECT["tool"]["setuptools"]
    scripts = {path.stem for path in ROOT.glob("*.py")}
    assert set(setuptools["py-modules"]) == scripts
    assert {path.stem for path in SCRIPTS} < scripts
    imported = {
        name.split(".")[0]
        for script in scripts
        for node in ast.walk(ast.parse((ROOT / f"{script}.py").read_text()))
        if isinstance(node, ast.ImportFrom)
        for name in [node.module]
        if (ROOT / name.split(".")[0]).is_dir()
    }
    assert imported <= set(setuptools["packages"])
    for package in setuptools["packages"]:
        folders = {path.parent for path in (ROOT / package).rglob("*.py")}
        assert folders == {ROOT / package}  # or its subpackages are to be listed too


def test_citation_has_the_software_and_the_paper():
    text = (ROOT / "CITATION.cff").read_text()
    top = dict(re.findall(r"^([\w-]+):[ ]?(.*)$", text, re.M))
    for key in "cff-version message title authors preferred-citation".split():
        assert key in top
    assert all(re.match(r" *(- )?[\w-]+:( |$)", line) for line in text.splitlines())
    assert top["version"] == PROJECT["project"]["version"]
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(r"^## (\S+)", changes, re.M)[1] == top["version"]
    authors = re.search(r"author += \{(.*)\}", README)[1].split(" and ")
    family, given = (
        re.findall(rf"{key}-names: (.*)", text) for key in ("family", "given")
    )
    assert [f"{f}, {g}" for f, g in zip(family, given, strict=True)] == authors
