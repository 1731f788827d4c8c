"""The arithmetic of what a job costs besides its training."""

import pytest

from benchmarks.overhead import WAITS, step_s, table, waits

SEEN = {
    "submitted": 100.0,
    "started": 100.5,
    "preparing_data": 102.0,
    "waiting_for_resources": 105.0,
    "loading_model": 112.0,
    "training": 115.0,
    "first step": 116.0,
}


def points(steps):
    """A point for every step of a job, a tenth of a second apart."""
    return [{"step": number, "time": 1000.0 + number / 10} for number in range(1, steps + 1)]


def test_the_waits_are_all_of_the_time_to_the_first_step():
    took = waits(SEEN)
    assert sum(took.values()) == SEEN["first step"] - SEEN["submitted"]
    assert took["the workers"] == 7.0


@pytest.mark.parametrize("missed", ["started", "preparing_data", "waiting_for_resources", "loading_model", "training"])
def test_a_phase_that_was_over_before_it_was_seen_took_no_time_of_its_own(missed):
    took = waits({name: at for name, at in SEEN.items() if name != missed})
    assert took[WAITS[missed]] == 0
    assert sum(took.values()) == SEEN["first step"] - SEEN["submitted"]


def test_a_step_is_timed_between_points_however_many_there_are():
    all_of_them = points(41)
    few = [point for point in all_of_them if point["step"] == 1 or point["step"] % 10 == 0]
    assert step_s(all_of_them) == pytest.approx(step_s(few)) == pytest.approx(0.1)


def test_the_table_has_every_wait_and_the_ratios():
    names = ("first job", "later job", "later job, rows prepared before", "few points")
    found = {
        "jobs": [{"name": n, "seen": SEEN, "points": points(40), "cpu_s": 9.0} for n in names],
        "floor": {"first": 7.0, "second": 3.5},
    }
    said = table(found)
    assert all(f"| {what} |" in said for what in WAITS.values())
    assert "| CPU seconds meanwhile | 9.0 | 9.0 | 9.0 |" in said
    assert "| workers / floor | 1.00 | 2.00 | 2.00 |" in said
    assert "A step with a point each takes 100.0 ms, with a point every 10 100.0 ms: 1.000 of it." in said
