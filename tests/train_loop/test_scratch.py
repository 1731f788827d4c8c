"""Scratch folders of runs that ended, and of those that were killed."""

import os
import subprocess
import sys
import tempfile

from train_loop.scratch import scratch_folder


def test_a_killed_runs_folder_goes_when_the_next_run_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = "import os; from train_loop.scratch import scratch_folder; run = scratch_folder(); run.__enter__(); os._exit(9)"
    env = {"TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run([sys.executable, "-c", code], env=env, check=False)
    assert killed.returncode == 9
    (tmp_path / "somebody-elses").mkdir()
    assert len(list(tmp_path.iterdir())) == 2
    with scratch_folder() as first, scratch_folder() as second:
        assert {p.name for p in tmp_path.iterdir()} == {"somebody-elses", first.name, second.name}
    assert [p.name for p in tmp_path.iterdir()] == ["somebody-elses"]
