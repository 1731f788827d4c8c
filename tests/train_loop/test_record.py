"""What a run on Ray keeps for a service that may come and ask."""

import json

import pytest

from tests.conftest import CANARY
from train_loop.__main__ import Console
from train_loop.data.sources import Credentials
from train_loop.errors import Cause, DatasetError, RunFault, Stopped
from train_loop.record import COMES_S, KEPT, MAX_NOTES, READS_S, About, Record, completed, cut_short
from train_loop.run_files import Keys

ABOUT = About("an id", "my-run", {"org": "an org"})


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def answer(record, cursor=""):
    told = json.loads(record.since(cursor))
    return told, [(kind, value) for note in told["notes"] for kind, value in note.items()]


def test_a_reader_gets_each_note_once_in_their_order_and_the_last_state():
    record = Record(ABOUT)
    record.phase("training")
    record.event("prepared", "9 rows")
    record.progress({"step": 1, "total_steps": 4, "points": [{"step": 1, "loss": 2.0}], "unknown": 1})
    told, notes = answer(record)
    assert (told["request_id"], told["ray_job"], told["spec"]) == ("an id", "my-run", {"org": "an org"})
    assert told["live"] == {"phase": "training", "step": 1, "total_steps": 4}
    assert notes == [("event", ["prepared", "9 rows"]), ("point", {"step": 1, "loss": 2.0})]
    record.lines(1, [(5.0, "hello")])
    again, fresh = answer(record, told["cursor"])
    assert fresh == [("line", [1, 5.0, "hello"])]
    assert answer(record, told["cursor"])[1] == fresh  # a reader that died over them asks again
    assert answer(record, again["cursor"])[1] == []


def test_a_cursor_of_another_record_is_from_the_beginning():
    before, record = Record(ABOUT), Record(ABOUT)
    before.event("a", "1")
    record.event("b", "2")
    assert answer(record, answer(before)[0]["cursor"])[1] == [("event", ["b", "2"])]


def test_what_nobody_reads_is_kept_within_bounds_and_told_in_pieces():
    record = Record(ABOUT)
    for number in range(KEPT["line"] + 10):
        record.lines(0, [(0.0, str(number))])
    record.event("late", "but kept")
    cursor, read = "", []
    while True:
        told, notes = answer(record, cursor)
        if not notes:
            break
        assert len(notes) <= MAX_NOTES
        cursor, read = told["cursor"], read + notes
    assert [value[2] for kind, value in read if kind == "line"] == [str(n) for n in range(10, KEPT["line"] + 10)]
    assert read[-1] == ("event", ["late", "but kept"])


def test_a_loss_that_is_no_number_is_null():
    record = Record(ABOUT)
    record.progress({"points": [{"loss": float("nan")}]})
    assert answer(record)[1] == [("point", {"loss": None})]


def test_a_run_s_keys_are_in_nothing_that_it_tells():
    keys = Keys(storage=Credentials(access_key_id="an id of a key", secret_access_key=CANARY))
    console = Console(keys, about=ABOUT)
    console.on_event("storage_away", f"with {CANARY} and an id of a key")
    console.on_log(0, [(1.0, f"{CANARY}\0")])
    console.on_end(cut_short(DatasetError(f"no {CANARY}")), {})
    told = console.since("")
    assert CANARY.encode() not in told
    assert told.count(b"[redacted]") == 5
    assert b"\\u0000" not in told


def test_the_end_waits_for_a_reader_that_is_there_and_for_no_other():
    clock = Clock()
    record = Record(ABOUT, clock)
    record.end({"status": "COMPLETED"}, {})
    assert not record.is_read()  # one that is there comes within seconds
    clock.now += COMES_S + 1
    assert record.is_read()
    told, _ = answer(record)
    assert not record.is_read()  # it was told, but isn't known to have it
    clock.now += READS_S + 1
    assert record.is_read()
    answer(record)
    answer(record, told["cursor"])
    assert record.is_read()


def test_a_run_that_was_not_submitted_to_ray_waits_for_nobody():
    for record in (Record(), Record(About("an id", None, {}))):
        record.end({"status": "COMPLETED"}, {})
        assert record.is_read()


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (Stopped(), "CANCELED", None),
        (KeyboardInterrupt(), "CANCELED", None),
        (DatasetError("no rows", code="dataset_empty"), "FAILED", "dataset_empty"),
        (RunFault(Cause.HANG, "no step"), "FAILED", "hang"),
        (KeyError("x"), "FAILED", "internal"),
    ],
)
def test_every_way_to_be_cut_short_has_a_status_and_a_sentence(error, status, code):
    said = cut_short(error)
    assert (said["status"], said.get("error_code")) == (status, code)
    assert said["message"]


def test_the_end_of_a_run_that_merged_names_the_model():
    manifest = {
        "adapter_uri": None,
        "adapter_files": [],
        "merged_uri": "s3://b/m",
        "merged_files": [1, 2],
        "steps": 3,
        "metrics": {},
    }
    said, live = completed(manifest)
    assert said == {"message": "Model saved: 2 files at s3://b/m.", "output_model_path": "s3://b/m"}
    assert (live["step"], live["progress"], live["phase"]) == (3, 1.0, "done")
