"""How many processes are to be started, so that enough wait for the next job."""

import pytest

from serve_app.ready import START_S, Found, Pool

HELPER, WORKER = "{}", '{"env_vars": {}}'


def found(waiting=(), taken=(), environment=HELPER):
    return [Found(p, environment, True) for p in waiting] + [Found(p, environment, False) for p in taken]


@pytest.fixture
def pool():
    return Pool({HELPER: 2})


def test_what_is_still_starting_is_not_asked_for_again(pool):
    assert pool.ask(found(), 0.0) == {HELPER: 2}
    assert pool.ask(found(), 3.0) == {}
    assert pool.ask(found("a"), 6.0) == {}
    assert pool.ask(found("ab"), 9.0) == {}


def test_what_jobs_have_taken_is_asked_for_at_once_however_lately_it_came(pool):
    assert pool.ask(found(), 0.0) == {HELPER: 2}
    assert pool.ask(found("ab"), 3.0) == {}
    assert pool.ask(found("b", taken="a"), 6.0) == {HELPER: 1}
    assert pool.ask(found(taken="abc"), 9.0) == {HELPER: 2}  # c has come, and was taken before anybody saw it wait
    assert pool.ask(found(), 12.0) == {}  # that they have ended changes nothing


def test_what_has_not_come_by_the_time_that_ray_gives_it_is_asked_for_again(pool):
    pool.ask(found(), 0.0)
    assert pool.ask(found("a"), START_S - 1) == {}
    assert pool.ask(found("a"), START_S) == {HELPER: 1}
    assert pool.ask(found("a"), START_S + 1) == {}
    assert pool.ask(found("a"), 2 * START_S) == {HELPER: 1}


def test_one_environment_is_none_of_the_other_s():
    pool = Pool({HELPER: 1, WORKER: 2})
    assert pool.ask(found("a"), 0.0) == {WORKER: 2}
    assert pool.ask(found(taken="a") + found("b", environment=WORKER), 3.0) == {HELPER: 1}


def test_one_after_the_other_while_the_machine_has_other_work():
    pool = Pool({HELPER: 2, WORKER: 1})
    assert pool.ask(found(), 0.0, one_by_one=True) == {HELPER: 1}
    assert pool.ask(found(), 3.0, one_by_one=True) == {}
    assert pool.ask(found("a"), 6.0, one_by_one=True) == {HELPER: 1}
    assert pool.ask(found("ab"), 9.0, one_by_one=True) == {WORKER: 1}
    assert pool.ask(found("ab") + found("c", environment=WORKER), 12.0, one_by_one=True) == {}


def test_more_than_wanted_are_left_alone(pool):
    assert pool.ask(found("abc"), 0.0) == {}
