"""What docs/kubernetes.md has people type, as far as it can be tried here."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import yaml
from typer.main import get_command

from serve_app.cli import app
from serve_app.settings import Settings

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/kubernetes.md").read_text()
BLOCKS = re.findall(r"^```\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
OF_DOCKER = {"--file", "--sbom", "--provenance", "--tag", "--push"}


def test_every_path_on_the_page_is_there():
    written = set(re.findall(r"(?:deploy|examples|docs)/[\w./-]*\w", PAGE))
    made = {"deploy/kubernetes/overlays/acme"}
    assert len(written) > 8
    assert not [path for path in written - made if not (ROOT / path).exists()]


def test_every_setting_on_the_page_is_one():
    elsewhere = {"TUNEYARD_URL", "TUNEYARD_ORG", "TUNEYARD_TOKEN", "TUNEYARD_HOME"}
    written = set(re.findall(r"TUNEYARD_[A-Z_]+[A-Z]", PAGE)) - elsewhere
    assert written
    assert written <= {f"TUNEYARD_{name.upper()}" for name in Settings.model_fields}


def test_the_image_is_built_by_targets_and_arguments_that_it_has():
    dockerfile = (ROOT / "deploy/image/Dockerfile").read_text()
    targets, arguments = (set(re.findall(p, dockerfile, re.MULTILINE)) for p in (r"^FROM \S+ AS (\w+)$", r"^ARG (\w+)"))
    (build,) = [shlex.split(line, comments=True) for line in COMMANDS if line.startswith("docker buildx build")]
    assert build[build.index("--target") + 1] in targets
    given = [build[i + 1].partition("=")[0] for i, word in enumerate(build) if word == "--build-arg"]
    assert set(given) <= arguments
    assert {word.partition("=")[0] for word in build if word.startswith("--")} == OF_DOCKER | {"--target", "--build-arg"}
    assert set(re.findall(r"make image TARGET=(\w+)", PAGE)) <= targets
    assert "TORCH_CPU_INDEX" in arguments


def test_our_commands_have_the_options_that_they_are_given():
    ours = [found[0] for line in COMMANDS if (found := re.search(r"(?<=-- )tuneyard .*|^tuneyard .*", line))]
    assert len(ours) >= 4
    for line in ours:
        words = shlex.split(line.rstrip(")"), comments=True)[1:]
        command = get_command(app)
        while hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known


def test_an_organisation_s_own_copy_is_in_its_own_namespace(tmp_path):
    shutil.copytree(ROOT / "deploy/kubernetes", tmp_path / "deploy/kubernetes")
    (block,) = [block for block in BLOCKS if "overlays/acme" in block]
    subprocess.run(["sh", "-ec", block], cwd=tmp_path, check=True, timeout=60)
    acme = tmp_path / "deploy/kubernetes/overlays/acme"
    for source, target in (("keys.example.json", "keys.json"), ("settings.env", "redis-password")):
        shutil.copy(acme / source, acme / target)
    kubectl = Path(sys.executable).parent / "kubectl"
    done = subprocess.run([kubectl, "kustomize", acme], capture_output=True, text=True, check=True, timeout=60)
    objects = list(yaml.safe_load_all(done.stdout))
    assert {o["metadata"]["name" if o["kind"] == "Namespace" else "namespace"] for o in objects} == {"tuneyard-acme"}
    # A peer without a namespaceSelector is a pod of the policy's own namespace.
    peers = [peer for o in objects if o["kind"] == "NetworkPolicy" for rule in o["spec"]["ingress"] for peer in rule["from"]]
    selected = [peer["namespaceSelector"]["matchLabels"] for peer in peers if "namespaceSelector" in peer]
    assert {"tuneyard-ingress": "allowed"} in selected
    assert not any("tuneyard" in value for labels in selected for value in labels.values())
