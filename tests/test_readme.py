"""What the README says and shows exists and runs."""

import dataclasses
import re
import sys
from pathlib import Path

import torch

import flux_distill
import toy_2d

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
import common
import readme

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "tests/README.md", "tests/benchmarks/README.md")


def page(name: str) -> str:
    return (ROOT / name).read_text()


def test_links_of_the_readme_hit_the_lines_that_define_their_names():
    """[`name`](shortcut.py#L12): line 12 defines that name."""
    links = re.findall(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)\)", page("README.md"))
    assert len(links) == page("README.md").count(".py#L") >= 12
    for name, file, line in links:
        text = page(file).splitlines()[int(line) - 1]
        assert re.match(rf"(def|class) {name}\b", text), (name, line, text)


def test_links_between_files_lead_somewhere():
    for name in PAGES:
        folder = (ROOT / name).parent
        for target in re.findall(r"\]\(([^)#:]+)[)#]", page(name)):
            assert (folder / target).exists(), (name, target)


def test_links_within_a_page_lead_to_a_heading():
    for name in PAGES:
        headings = re.findall(r"^#+ (.+)$", page(name), re.MULTILINE)
        anchors = {re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in headings}
        assert set(re.findall(r"\]\(#([^)]+)\)", page(name))) <= anchors, name


def test_the_page_of_the_tests_names_tests_that_exist():
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", page("tests/README.md")))
    assert len(named) >= 30
    assert {name for name in named if f"def {name}(" not in tests} == set()


def test_the_readme_is_read_in_ten_minutes():
    assert len(page("README.md").split()) <= 2500
    assert page("README.md").count("<details>") <= 3


def words(text: str) -> str:
    """The text with one space between words."""
    return " ".join(text.split())


# Numbers with a decimal point that no script here measured.
OTHERS = {
    "2510.17858": "the paper, and its numbers:",
    "6.34": "FID",
    "33.10": "CLIP score",
    "7.06": "FID of FLUX.1-schnell",
    "33.06": "CLIP score of FLUX.1-schnell",
    "0.4": "settings, and what follows from them:",
    "0.25": "look-ahead of the paper's windows, of which",
    "1.5": "is (1 - 0.4) / 0.4, and",
    "0.146": "is the mean stride",
    "3.5": "guidance",
    "3.11": "versions:",
    "3.13": "",
    "2.11": "",
    "2.13": "",
    "2.0": "Apache's licence",
}


def test_the_readme_quotes_what_was_measured():
    """After a new measurement: python tests/benchmarks/readme.py says what to write."""
    text = words(page("README.md"))
    for passage in map(words, readme.quotations()):
        assert passage in text
        text = text.replace(passage, "")
    text = re.sub(r"```python.*?```|\]\([^)]*\)", "", text)
    numbers = re.findall(r"(?<![\w.])\d+\.\d+(?!\w|\.\d)", text)
    assert set(numbers) == OTHERS.keys()


def test_the_card_quotes_what_was_measured_of_layers():
    rows = common.load(common.RESULTS / "flux.json")
    blocks, whole = (
        common.column(common.where(rows, run), "student", 3) for run in ("all pairs", "all layers")
    )
    told = words(flux_distill.Flux.tools["blocks"])
    assert f"a factor of {common.ratio_text(blocks, whole).split()[0]}, three seeds" in told
    assert len(blocks) == 3
    teacher = common.column(common.where(rows, "all pairs"), "teacher", 3).mean()
    cut = common.column(common.where(rows, "all layers"), "cut").mean()
    lost = (cut - whole.mean()) / (teacher - whole.mean())
    assert f"cost {lost:.0%}".replace("%", " %") in words(flux_distill.Flux.tools["all"])


def test_the_readme_has_the_commands_that_were_measured():
    for command in (readme.TOY, readme.TINY_FLUX):
        assert f"python {' '.join(command)}" in page("README.md")


def test_a_changed_number_is_no_longer_quoted(monkeypatch, tmp_path):
    for path in common.RESULTS.glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    before = readme.quotations()
    rows = common.load(tmp_path / "toy.json")
    rows[0].found["student"][3] += 10e-4
    common.save(rows, tmp_path / "toy.json")
    assert sum(a != b for a, b in zip(before, readme.quotations(), strict=True)) == 1


def test_flags_in_the_readme_exist():
    """Those of the two scripts; other programs have theirs."""
    others = {"--help", "--nproc-per-node", "--shutdown-timeout", "--slow", "--gpu"}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", page("README.md"))) - others
    known = {"--" + f.name.replace("_", "-") for module in (flux_distill, toy_2d)
             for f in dataclasses.fields(module.Settings)}  # fmt: skip
    assert named and named <= known


def test_readme_snippet_trains_a_network_of_ones_own():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 3)

        def forward(self, x, t, label):
            return self.layer(torch.cat([x, t[:, None]], 1)) * label[:, None]

    snippet = page("README.md").split("```python\n")[1].split("```")[0]
    student, slow, teacher = (Net() for _ in range(3))
    before = [w.clone() for net in (student, slow) for w in net.parameters()]
    scope = dict(student=student, slow=slow, teacher=teacher)
    scope |= dict(x_0=torch.randn(8, 3), label=torch.ones(8), iteration=1)
    scope["optimizer"] = torch.optim.Adam(student.parameters())
    for net in (slow, teacher):
        net.requires_grad_(False)
    exec(snippet, scope)
    assert scope["loss"].isfinite() and scope["log"]["residual"] > 0
    after = [w for net in (student, slow) for w in net.parameters()]
    assert not any(torch.equal(a, b) for a, b in zip(before, after))


def test_readme_has_the_commands_that_ci_runs():
    readme, ci = ((ROOT / name).read_text() for name in ("README.md", ".ci/run"))
    commands = [line for line in ci.splitlines() if "pytest" in line or "install" in line]
    assert commands
    assert all(command in readme for command in commands)
