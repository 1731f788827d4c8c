"""What a worker logs and prints, on its way to the monitor and in its own file."""

import json
import logging
import sys

import pytest

from train_loop.worker_log import shipped

log = logging.getLogger("train_loop.somewhere")


@pytest.fixture
def own(capsys):
    """The lines of the worker's own file, since the last call."""
    return lambda: [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_each_line_of_the_workers_file_is_json_that_tells_whose_it_is(own):
    sent = []
    with shipped(sent.extend, request_id="r", rank=3):
        log.info("step %d", 1)
        log.debug("not told")
        print("a library says", "so")  # noqa: T201
        sys.stderr.write("half a line, ")
        sys.stderr.write("the rest\n\rprogress: 3/9")
    lines = own()
    said = [(line["level"], line["logger"], line["event"]) for line in lines]
    printed = [("info", "printed", text) for text in ("a library says so", "half a line, the rest")]
    assert said == [("info", "train_loop.somewhere", "step 1"), *printed]
    assert all((line["request_id"], line["rank"]) == ("r", 3) and line["timestamp"].endswith("+00:00") for line in lines)
    # A person reads these, in the job's log.
    assert [text for _, text in sent] == ["INFO train_loop.somewhere: step 1", "a library says so", "half a line, the rest"]


def test_a_traceback_is_one_line_of_the_file_and_several_of_the_log(own):
    sent = []

    with pytest.raises(ValueError, match="broken"), shipped(sent.extend, request_id="r"):
        raise ValueError("broken\nin two lines")
    (line,) = own()
    assert (line["level"], line["event"]) == ("error", "this worker failed")
    assert line["exception"].endswith("ValueError: broken\nin two lines")
    assert sent[0][1] == "ERROR train_loop: this worker failed"
    assert sent[-1][1] == "in two lines"
