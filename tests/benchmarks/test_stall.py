"""The arithmetic of what checkpoints cost a run's steps."""

import dataclasses

import pytest

from benchmarks.stall import Setting, Times, told, took

SETTING = Setting("a/model", 128, every=3, saves=4)


def test_all_saves_are_among_the_steps_that_are_timed_and_neither_the_first_nor_the_last():
    ended, at = {}, 0.0
    for step in range(SETTING.last + 1):
        at += 1.0 + 0.25 * (step > 1 and step % SETTING.every == 1)  # held after every third
        ended[step] = at
    assert took(ended, SETTING) == pytest.approx(SETTING.every * SETTING.saves + 0.25 * SETTING.saves)


def test_a_save_holds_the_loop_from_its_phase_to_the_next():
    times = Times()
    for phase in ("training", "saving", "training", "saving", "training", "exporting"):
        times.on_phase(phase)
    assert len(times.held) == 2


def test_the_line_tells_what_a_save_costs_of_the_steps_before_it():
    found = {
        "setting": dataclasses.asdict(SETTING),
        "with": [13.2, 12.4, 12.6],
        "without": [12.0, 12.0, 12.0],
        "held": [0.01, 0.02, 0.03],
    }
    assert told(found) == "| a/model | 1000.0 | 20.0 | 2.00% | 150 | 5.00% of 3 | 0.030% |"
