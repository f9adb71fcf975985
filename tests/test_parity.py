"""The scripts repeat each other's blocks on purpose; these copies must not drift apart."""

import ast
import difflib
import re
from itertools import combinations

import pytest
from conftest import ROOT

SCRIPTS = ["meow_continuous_action", "sac_continuous_action", "sql_continuous_action"]
ISAAC = ["meow_isaacgym", "sac_isaacgym"]
SIBLINGS = [*combinations(SCRIPTS, 2), tuple(ISAAC)]  # two algorithms, the same environments
TWINS = [(one, two) for one, two in zip(SCRIPTS, ISAAC, strict=False)]  # the same algorithm
# What each algorithm has of its own under a common name; every other common name is a copy.
OWN = set("Args.__post_init__ MLP MLP.__init__ MLP.forward Critics Critic soft_target".split())
OWN |= set("make_update critic_loss make_networks Learner.__init__ Learner.update".split())
OWN |= set("Learner.make_actor Learner._update_in_place Learner.state_dict".split())
OWN |= set("Learner.load_state_dict METRICS PAPER_SETTINGS FORMAT Args.exp_name Args.q_lr".split())
OWN |= set("Args.policy_lr Args.reward_shifting Args.alpha Args.tau Args.batch_size".split())
# What many environments at once change; every other common name is a copy, the algorithm above all.
MANY = set("PAPER_SETTINGS FORMAT HIDDEN default_args check_finite check_action train".split())
MANY |= set("Args.env_id Args.exp_name Args.total_timesteps Args.buffer_size Args.tau".split())
MANY |= set("Args.learning_starts Args.eval_frequency Args.log_frequency Args.batch_size".split())
MANY |= set("Args.checkpoint_frequency Args.torch_threads Args.__post_init__ Args.q_lr".split())
MANY |= set("Args.autotune Args.policy_frequency ReplayBuffer.__init__ ReplayBuffer.add".split())
MANY |= set("ReplayBuffer.__len__ ReplayBuffer.state_dict ReplayBuffer.load_state_dict".split())
MANY |= set("Learner.__init__ Learner.update Learner._update_in_place Learner.make_actor".split())
MANY |= set("Learner._update_critics Learner.state_dict Learner.load_state_dict".split())
MANY |= set("Evaluator.__init__ Evaluator.run Evaluator.open_video evaluate_file".split())
MANY |= {"make_networks"}
# Where a few lines differ, and what such a line mentions.
LINES = {
    "train": "flow|actor|critic|sampler|networks|[Ll]earner",
    "evaluate_file": "flow|actor|sampler",
}


def without_tags(node: ast.AST) -> str:
    """Source of a definition without comments and deviation tags."""
    return re.sub(r"\s*# [DSQ]\d+", "", ast.unparse(node))


def definitions(script: str) -> dict[str, str]:
    """Source of each function, method, option and constant by its qualified name."""
    found = {}

    def visit(body: list[ast.stmt], prefix: str):
        for node, following in zip(body, [*body[1:], None], strict=True):
            if isinstance(node, ast.FunctionDef):
                found[prefix + node.name] = without_tags(node)
            elif isinstance(node, ast.ClassDef):
                found[prefix + node.name] = " ".join(map(ast.unparse, node.bases))
                visit(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.AnnAssign):
                found[prefix + node.target.id] = ast.unparse(node) + ast.unparse(following)
            elif isinstance(node, ast.Assign):
                found[prefix + ast.unparse(node.targets[0])] = ast.unparse(node)

    visit(ast.parse((ROOT / f"{script}.py").read_text()).body, "")
    return found


@pytest.mark.parametrize("pair", [*SIBLINGS, *TWINS], ids=" ".join)
def test_copies_are_identical(pair):
    first, second = map(definitions, pair)
    own = MANY if pair in TWINS else OWN | set(LINES)
    common = [name for name in first if name in second and name not in own]
    assert len(common) > 80
    assert [name for name in common if first[name] != second[name]] == []


@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize("pair", SIBLINGS, ids=" ".join)
def test_nearly_identical_functions_differ_in_the_networks_alone(pair, name):
    first, second = (definitions(script)[name].splitlines() for script in pair)
    changed = [
        line[2:].strip() for line in difflib.ndiff(first, second) if line.startswith(("+", "-"))
    ]
    assert [line for line in changed if not re.search(LINES[name], line)] == []
    assert len(changed) < 30


def test_sections_have_the_same_order_and_titles():
    """Titles may differ in 'Target(s)' and 'Update(s)', sections' numbers may not."""
    titles = []
    for script in SCRIPTS + ISAAC:
        source = (ROOT / f"{script}.py").read_text()
        titles.append(re.findall(r"^# --- (\d+\. \w+?)s?[ ,]", source, flags=re.M))
    assert all(other == titles[0] for other in titles)
    assert len(titles[0]) == 10


def test_no_script_imports_another():
    for script in SCRIPTS + ISAAC:
        source = (ROOT / f"{script}.py").read_text()
        forbidden = r"^\s*(from|import) .*_(continuous_action|baselines|isaacgym\b)"
        assert not re.search(forbidden, source, re.M)
