"""The container image's recipe: there is no builder here, so all that it names is looked up."""

import json
import re
import shlex
import subprocess
import tomllib
from importlib.metadata import distribution
from pathlib import Path

import pytest
from docker.utils.build import exclude_paths
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from typer.main import get_command

from serve_app.cli import app

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "deploy/image/Dockerfile"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = {canonicalize_name(line.split("==")[0]): line for line in (ROOT / "requirements.lock").read_text().split()}
TARGETS = ("cpu", "cuda")


def instructions():
    """(instruction, rest) of every one, continued lines joined."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if line.strip() and not line.startswith("#")]
    text = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines()]


def stages():
    """By name, what each is made from and its own instructions."""
    found, own = {}, []
    for instruction, rest in instructions():
        if instruction == "FROM":
            base, _, name = rest.split()
            own = []
            found[name] = (base, own)
        else:
            own.append((instruction, rest))
    return found


def whole(target):
    """The instructions of a stage after those of the stages that it is made from."""
    base, own = stages()[target]
    return own if base == "${BASE}" else [*whole(base), *own]


@pytest.fixture(scope="module")
def context():
    """The files that a builder is sent."""
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    return {name for name in exclude_paths(str(ROOT), ignored) if (ROOT / name).is_file()}


def test_a_builder_is_sent_the_two_packages_and_what_installs_them(context):
    code = {name for name in context if name.startswith(("serve_app/", "train_loop/"))}
    assert context - code == {"pyproject.toml", "requirements.lock", ".dockerignore"} & context | {
        "pyproject.toml",
        "requirements.lock",
    }
    tracked = subprocess.run(["git", "ls-files", "serve_app", "train_loop"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert code >= set(tracked.stdout.split())
    assert not [name for name in code if name.endswith(".pyc") or "test" in Path(name).name]


def test_what_is_copied_is_in_the_context_or_in_another_stage(context):
    found = stages()
    copies = [(name, shlex.split(rest)) for name, (_, own) in found.items() for kind, rest in own if kind == "COPY"]
    assert copies
    for _, (*sources, _) in copies:
        if sources[0].startswith("--from="):
            stage = sources[0].removeprefix("--from=")
            assert any(kind == "RUN" and sources[1] in rest for kind, rest in whole(stage))
        else:
            assert all(source in context or any(name.startswith(f"{source}/") for name in context) for source in sources)
    assert not [rest for kind, rest in instructions() if kind == "ADD"]


def test_every_stage_stands_on_the_one_base_that_an_argument_pins():
    (kind, argument), *_ = instructions()
    assert kind == "ARG"
    name, _, image = argument.partition("=")
    assert (name, re.fullmatch(r"python:3\.\d+-[a-z-]+", image) is not None) == ("BASE", True)
    at_least = PROJECT["requires-python"].removeprefix(">=")
    assert image.startswith(f"python:{at_least}-")
    found = stages()
    assert set(TARGETS) <= set(found)
    assert {base for base, _ in found.values()} <= {"${BASE}", *found}


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_runs_as_one_that_is_not_root(target):
    made = whole(target)
    (uid,) = [rest for kind, rest in made if kind == "USER"]
    assert uid == "10001:10001"
    last = dict(made)
    assert "--uid 10001 --gid 10001" in next(rest for kind, rest in made if kind == "RUN" and "useradd" in rest)
    assert "org.opencontainers.image.version" in last["LABEL"]
    (program, *words) = json.loads(last["CMD"])
    assert program in PROJECT["scripts"]
    assert words == ["--help"]
    assert get_command(app).get_help_option(get_command(app).make_context("tuneyard", [], resilient_parsing=True))


def test_the_health_check_asks_what_ray_answers():
    from ray.dashboard.http_server_agent import PUBLIC_EXACT_PATHS

    (check,) = [rest for kind, rest in instructions() if kind == "HEALTHCHECK"]
    program, option, code = json.loads(check[check.index("[") :])
    assert (program, option) == ("python", "-c")
    compile(code, "healthcheck", "exec")
    assert any(f"http://127.0.0.1:52365{path}'" in code for path in PUBLIC_EXACT_PATHS)


def needed(requirement):
    """The names of all packages that a requirement brings."""
    found, todo = set(), [(Requirement(requirement), {""})]
    while todo:
        wanted, _ = todo.pop()
        key = (canonicalize_name(wanted.name), *sorted(wanted.extras))
        if key in found:
            continue
        found.add(key)
        for inner in map(Requirement, distribution(wanted.name).requires or ()):
            if inner.marker is None or any(inner.marker.evaluate({"extra": extra}) for extra in wanted.extras | {""}):
                todo.append((inner, set()))
    return {key[0] for key in found}


def test_the_lock_says_the_version_of_all_that_is_installed():
    runs = [rest for kind, rest in instructions() if kind == "RUN"]
    installs = [command for run in runs for command in re.split(r"\s&&\s", run) if command.startswith("pip install")]
    extras = set()
    for command in installs:
        words = shlex.split(command)
        projects = [word for word in words if word == "." or word.startswith(".[")]
        extras |= {e for word in projects for e in word[1:].strip("[]").split(",") if e}
        # Either all versions come from the lock, or nothing but what is named is installed.
        assert words[words.index("--constraint") + 1] == "requirements.lock" if "--constraint" in words else "--no-deps" in words
    assert extras == {"wandb"}
    assert all(
        canonicalize_name(name) in LOCK for run in runs for name in re.findall(r"grep \^([\w-]+)== requirements\.lock", run)
    )
    asked = [*PROJECT["dependencies"], *(r for extra in extras for r in PROJECT["optional-dependencies"][extra])]
    assert set().union(*map(needed, asked)) <= set(LOCK)
