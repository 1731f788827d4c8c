"""What the pages say of the code: commands, options, settings, messages and files that they name are there."""

import ast
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
import typer

from serve_app.cli import app
from serve_app.reference import commands, settings
from serve_app.settings import Settings
from train_loop.errors import Cause, UserError

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.glob("*.md")), ROOT / "README.md", ROOT / "examples" / "README.md"]
TROUBLES = (DOCS / "troubleshooting.md").read_text()
SOURCES = [p for package in ("serve_app", "train_loop") for p in (ROOT / package).rglob("*.py") if "migrations" not in p.parts]
FENCE = re.compile(r"^```(\S*).*?$(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page):
    """The shell lines of a page's fenced blocks, those that go on joined."""
    for language, text in FENCE.findall(page.read_text()):
        if language in ("", "bash"):
            yield from text.replace("\\\n", " ").splitlines()


def spans(text):
    """What stands between backticks outside of fenced blocks."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


def invocations(program):
    """Every use of a program in the pages: the page, and the words after it, as a shell takes them."""
    for page in PAGES:
        for text in [*blocks(page), *spans(page.read_text())]:
            if "kubectl " in text:  # has a namespace and a service that are named tuneyard
                continue
            for found in re.finditer(rf"(?:^|[\s(])(?:\.venv/bin/)?{program}(\s[^()|;&…]*|$)", text):
                words = found[1].replace("<", "").replace(">", "").partition(" #")[0]
                try:
                    yield page.name, shlex.split(words)
                except ValueError:
                    yield page.name, words.split()


def test_the_pages_that_are_made_from_the_code_are_what_it_says():
    for name, text in {"cli.md": commands.markdown(), "settings.md": settings.markdown()}.items():
        assert (DOCS / name).read_text() == text, f"docs/{name}: run make docs"


def test_every_tuneyard_command_and_option_that_is_named_exists():
    root, checked = typer.main.get_command(app), set()
    for page, words in invocations("tuneyard"):
        at = root
        while words and hasattr(at, "commands") and words[0].isidentifier():
            assert words[0] in at.commands, f"{page}: tuneyard {' '.join(words)}"
            at = at.commands[words.pop(0)]
        checked.add(at.name)
        known = {option for p in at.params for option in [*p.opts, *p.secondary_opts]} | {"--help"}
        known |= {"--install-completion"} if at is root else set()
        unknown = [w for w in words if w.startswith("-") and w.partition("=")[0] not in known]
        assert not unknown, f"{page}: {at.name} has no {unknown}"
    assert {"up", "down", "token", "submit", "plan", "watch", "cancel", "resume", "download", "chat", "serve", "add"} <= checked


def test_every_option_of_a_run_without_the_service_exists():
    known = set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', (ROOT / "train_loop/__main__.py").read_text()))
    uses = list(invocations("python -m train_loop"))
    assert len(uses) > 10
    for page, words in uses:
        assert {w for w in words if w.startswith("--")} <= known | {"--help"}, page
        for file in words:
            if file.endswith(".json") and "/" in file:
                assert (ROOT / file).is_file(), f"{page}: {file}"


def test_every_make_target_that_is_named_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {(page, words[0]) for page, words in invocations("make") if words}
    assert {"setup", "check", "test", "docs"} <= {target for _, target in named}
    assert {(page, target) for page, target in named if target not in targets} == set()


def test_every_test_that_is_marked_service_is_where_make_looks_for_it():
    """Its targets import their own files only."""
    looks = [ROOT / path for path in re.findall(r"-m service (\S+)", (ROOT / "Makefile").read_text())]
    marked = [
        p
        for p in (ROOT / "tests").rglob("test_*.py")
        if re.search(r"^(pytestmark.*|@)pytest\.mark\.service", p.read_text(), re.M)
    ]
    assert len(marked) > 5
    assert [str(p) for p in marked if not any(p.is_relative_to(path) for path in looks)] == []


def test_every_variable_that_is_named_is_read_somewhere():
    read = {f"TUNEYARD_{name.upper()}" for name in Settings.model_fields}
    read |= set(re.findall(r"TUNEYARD_[A-Z_]+[A-Z]", "".join(p.read_text() for p in [*SOURCES, *(ROOT / "tests").rglob("*.py")])))
    for page in PAGES:
        named = set(re.findall(r"TUNEYARD_[A-Z0-9_]+[A-Z0-9]", page.read_text()))
        assert named <= read, page.name


def test_every_file_that_is_named_exists():
    ours = ("serve_app/", "train_loop/", "tests/", "examples/", "benchmarks/", "docs/", "deploy/", ".ci/")
    named = {(p.name, s) for p in PAGES for s in spans(p.read_text()) if s.startswith(ours) and not set(s) & set(" <>*…{")}
    assert len(named) > 10
    assert {(page, path) for page, path in named if not (ROOT / path.partition("::")[0].rstrip("/")).exists()} == set()


# --- what goes wrong ---------------------------------------------------------------------------------------------


def rendered(node):
    """A text as the code has it, `…` for what is filled in; None for what is no text."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values)
    return None


def texts(node):
    """Every text below a node, each as a whole; no docstrings."""
    if (text := rendered(node)) is not None:
        yield text
    elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
        for child in ast.iter_child_nodes(node):
            yield from texts(child)


@cache
def trees():
    return [ast.parse(path.read_text()) for path in SOURCES]


def calls(*names):
    for tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                if called in names:
                    yield node


def tables(header):
    """First cells of the page's tables whose header begins so, each code span of them."""
    cells = []
    for table in re.findall(r"(?:^\|.*\n)+", TROUBLES, re.MULTILINE):
        head, _, *rows = table.splitlines()
        if head.startswith(f"| {header} |"):
            cells += [span for row in rows for span in re.findall(r"`([^`]+)`", row.split(" | ")[0])]
    assert cells
    return cells


def plain(text):
    """Without what differs, so that a message may be quoted with less or more filled in."""
    return [part for part in re.split(r"\s*…\s*|\s*\{[a-z_]+\}\s*", text) if part.strip(" :.,()")]


def says(message, text):
    """Whether the code's text has all parts of the message, in their order."""
    at = 0
    for part in plain(message):
        if (found := text.find(part, at)) < 0:
            return False
        at = found + len(part)
    return True


def test_every_message_of_troubleshooting_is_said_somewhere():
    said = {text for tree in trees() for text in texts(tree)}
    messages = tables("message")
    assert len(messages) > 120
    assert [m for m in messages if not any(says(m, text) for text in said)] == []


def codes():
    """Every `error_code` that a job can end with: causes of faults, classes' own, and what is given where errors are made."""
    found = {str(cause) for cause in Cause} | {UserError.code} | {kind.code for kind in UserError.__subclasses__()}
    for node in calls("UserError", "DatasetError", "ModelError", "TrainingError", "finish"):
        given = {k.arg: k.value for k in node.keywords}
        for value in (given.get("code"), given.get("error_code")):
            found |= {n.value for n in ast.walk(value) if isinstance(n, ast.Constant)} if value is not None else set()
    # The shorthands of secrets and AWS, and of a job that can never run.
    found |= {node.args[0].value for node in calls("_error") if isinstance(node.args[0], ast.Constant)}
    found |= {node.args[1].value for node in calls("refuse") if isinstance(node.args[1], ast.Constant)}
    return found


def test_every_error_code_is_in_troubleshooting_and_no_other():
    assert {"too_large", "max_runtime_exceeded", "secret_not_found", "loss_not_finite", "dataset_error"} <= codes()
    assert set(tables("`error_code`")) == codes()


def test_every_cause_of_a_fault_is_told_with_what_is_done_about_it():
    told = re.findall(r"^\| `([a-z_]+)` \|", (DOCS / "faults.md").read_text(), re.MULTILINE)
    assert sorted(told) == sorted(map(str, Cause))


def test_every_reason_for_rejecting_a_row_is_in_troubleshooting():
    reasons = {text for node in calls("RowRejected") for text in texts(node) if len(" ".join(plain(text)).split()) > 1}
    assert len(reasons) > 50
    section = tables("message")
    assert [r for r in sorted(reasons) if not any(says(m, r) for m in section)] == []


@pytest.mark.parametrize("page", [p for p in PAGES if p.parent == DOCS], ids=lambda p: p.stem)
def test_a_page_begins_with_its_title(page):
    assert re.match(r"# \S", page.read_text())
