"""What several tests of a run share."""

import pytest

from tests.train_loop.models import make_base
from tests.train_loop.test_resume import Watcher
from train_loop.launch import launch_local
from train_loop.run_files import Keys, RunFiles
from train_loop.spec import JobSpec


@pytest.fixture
def launch(tmp_path, mirror):
    """Run a job in this process, in a folder of the given name; the manifest."""

    def start(job, name="run", monitor=None):
        files = RunFiles(str(tmp_path / name), str(mirror), lambda: Keys())
        return launch_local(JobSpec.model_validate(job), name, files, monitor or Watcher())

    return start


@pytest.fixture(scope="session")
def bases(tmp_path_factory, tokenizer):
    """A mirror with a tied model and one of experts."""
    mirror = tmp_path_factory.mktemp("mirror")
    for name in ("smollm", "qwen3_moe"):
        make_base(name, mirror, tokenizer)
    return mirror
