"""What the README says and shows exists and runs."""

import re
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent


def test_readme_links_hit_their_lines():
    """[`name`](shortcut.py#L12): line 12 defines that name. Tests that it names exist."""
    readme = (ROOT / "README.md").read_text()
    links = re.findall(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)\)", readme)
    assert len(links) == readme.count(".py#L") >= 12
    for name, file, line in links:
        text = (ROOT / file).read_text().splitlines()[int(line) - 1]
        assert re.match(rf"(def|class) {name}\b", text), (name, line, text)
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", readme))
    assert len(named) >= 12
    assert all(f"def {name}(" in tests for name in named)


def test_readme_snippet_trains_a_network_of_ones_own():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 3)

        def forward(self, x, t, label):
            return self.layer(torch.cat([x, t[:, None]], 1)) * label[:, None]

    snippet = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    student, fast, slow, teacher = (Net() for _ in range(4))
    before = [w.clone() for net in (student, fast, slow) for w in net.parameters()]
    scope = dict(torch=torch, student=student, fast=fast, slow=slow, teacher=teacher)
    scope |= dict(x_0=torch.randn(8, 3), label=torch.ones(8), iteration=1)
    scope["optimizer"] = torch.optim.Adam(student.parameters())
    for net in (fast, slow, teacher):
        net.requires_grad_(False)
    exec(snippet, scope)
    assert scope["loss"].isfinite() and scope["log"]["residual"] > 0
    after = [w for net in (student, fast, slow) for w in net.parameters()]
    assert not any(torch.equal(a, b) for a, b in zip(before, after))


def test_readme_has_the_commands_that_ci_runs():
    readme, ci = ((ROOT / name).read_text() for name in ("README.md", ".ci/run"))
    commands = [line for line in ci.splitlines() if "pytest" in line or "install" in line]
    assert commands
    assert all(command in readme for command in commands)
