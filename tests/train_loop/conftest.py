"""What several tests of a run share."""

import pytest

from tests.train_loop.models import make_base, run
from tests.train_loop.runs import Watcher


@pytest.fixture
def launch(tmp_path, mirror):
    """Run a job in this process, in a folder of the given name; the manifest."""

    def start(job, name="run", monitor=None):
        return run(job, tmp_path, mirror, name, monitor or Watcher())

    return start


@pytest.fixture(scope="session")
def bases(tmp_path_factory, tokenizer):
    """A mirror with a tied model and one of experts."""
    mirror = tmp_path_factory.mktemp("mirror")
    for name in ("smollm", "qwen3_moe"):
        make_base(name, mirror, tokenizer)
    return mirror
