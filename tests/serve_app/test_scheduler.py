"""Who starts when: the scheduler's promises, on queues that hypothesis makes."""

import datetime as dt
from collections import Counter
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.scheduler import AGING_S, HALF_LIFE_S, RESERVE_AFTER_S, Gang, Limits, Room, Run, Shares, decide, order

NOW = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
GPU = {"GPU": 1.0}
ANY = Limits(max_running_jobs=1000)


def gang(seq, org="a", workers=1, nodes=1, min_nodes=None, priority=0, waited_s=0.0, bundle=None):
    since = NOW - dt.timedelta(seconds=waited_s)
    return Gang(f"job-{seq}", org, seq, priority, since, bundle or GPU, workers, min_nodes or nodes, nodes)


def started(decision):
    return [(g.request_id, n) for g, n in decision.starts]


def nodes(count, gpus=8):
    return [{"GPU": float(gpus), "CPU": 32.0}] * count


gangs = st.lists(
    st.builds(
        lambda org, workers, count, fewer, priority, waited_s: gang(
            0, org, workers, count, max(1, count - fewer), priority, waited_s
        ),
        st.sampled_from("abc"),
        st.integers(1, 8),
        st.integers(1, 4),
        st.integers(0, 3),
        st.integers(-10, 10),
        st.floats(0, 3 * AGING_S),
    ),
    max_size=25,
).map(lambda found: [replace(g, seq=i, request_id=f"job-{i}") for i, g in enumerate(found)])


@given(gangs, gangs, st.integers(0, 5), st.integers(1, 30), st.none() | st.integers(1, 40))
def test_nothing_starts_beyond_room_and_limits_and_everyone_is_accounted_for(waiting, running, count, max_jobs, quota):
    running = [Run(replace(g, request_id=f"r{g.seq}"), g.min_nodes) for g in running]
    limits = Limits(max_jobs, max_workers_per_org=quota)
    made = decide(waiting, running, nodes(count), limits, Shares(), NOW)
    ids = [r for r, _ in started(made)]
    assert Counter([*ids, *made.positions]) == Counter(g.request_id for g in waiting)
    assert sorted(made.positions.values()) == list(range(1, len(made.positions) + 1))
    for g, n in made.starts:
        assert g.min_nodes <= n <= g.max_nodes  # whole gangs, or as much less as the job allows
    if ids:
        taken = sum(g.per_node * n for g, n in [*((run.gang, run.num_nodes) for run in running), *made.starts])
        assert taken <= 8 * count
        assert len(running) + len(ids) <= max_jobs
    if quota is not None:
        for org in {g.org_id for g, _ in made.starts}:
            assert (
                sum(g.per_node * n for g, n in [*((run.gang, run.num_nodes) for run in running), *made.starts] if g.org_id == org)
                <= quota
            )


@given(gangs, st.integers(1, 5))
def test_no_room_is_left_empty_that_someone_could_use(waiting, count):
    fresh = [replace(g, waiting_since=NOW) for g in waiting]
    made = decide(fresh, [], nodes(count), ANY, Shares(), NOW)
    free = Room.of(nodes(count), [(g.bundle, g.per_node * n) for g, n in made.starts]).count(GPU)
    assert all(g.per_node * g.min_nodes > free for g in fresh if g.request_id in made.positions)


@given(gangs)
def test_the_order_is_the_same_whatever_order_the_queue_is_read_in(waiting):
    there = [g.request_id for g in order(waiting, Shares(), {}, NOW)]
    assert there == [g.request_id for g in order(waiting[::-1], Shares(), {}, NOW)]


def test_priority_goes_before_age_and_waiting_makes_up_for_it():
    low, high = gang(1), gang(2, priority=1)
    assert [g.seq for g in order([low, high], Shares(), {}, NOW)] == [2, 1]
    waited = gang(1, waited_s=AGING_S)
    assert [g.seq for g in order([waited, high], Shares(), {}, NOW)] == [1, 2]


def test_orgs_take_turns():
    queue = [gang(i, org="flood") for i in range(5)] + [gang(10, org="b"), gang(11, org="c")]
    assert [g.org_id for g in order(queue, Shares(), {}, NOW)][:3] == ["flood", "b", "c"]
    had = Shares()
    had.add("b", 1, 1000.0)
    assert [g.org_id for g in order(queue, had, {}, NOW)][-1] == "b"


def test_shares_even_out_over_time():
    """Ten orgs with five jobs each, one of them on a cluster for two: in every round each org gets its turn."""
    queue = [gang(org * 5 + i, org=str(org)) for org in range(10) for i in range(5)]
    shares, began = Shares(), []
    while queue:
        made = decide(queue, [], nodes(1, gpus=2), ANY, shares, NOW)
        began += [g.org_id for g, _ in made.starts]
        shares.pass_time(30.0)
        for g, _ in made.starts:
            shares.add(g.org_id, 1, 30.0)
        queue = [g for g in queue if g not in [s for s, _ in made.starts]]
    for turn in range(5):
        assert len(set(began[10 * turn : 10 * turn + 10])) == 10


@pytest.mark.parametrize("seed", range(2))
def test_orgs_with_jobs_of_any_size_and_length_get_alike(seed):
    """Ten orgs, on a small cluster, each with more waiting than it can have: worker-seconds within a tenth of each other."""
    random = Random(seed)
    queue = [gang(i, org=str(i % 10), workers=random.choice([1, 1, 2, 4])) for i in range(800)]
    lengths = {g.request_id: random.choice([30, 60, 120, 300]) for g in queue}
    shares, running, had = Shares(), [], Counter()
    for second in range(0, 2 * 3600, 20):
        now = NOW + dt.timedelta(seconds=second)
        running = [(g, until) for g, until in running if until > second]
        made = decide(queue, [Run(g, 1) for g, _ in running], nodes(2), ANY, shares, now)
        running += [(g, second + lengths[g.request_id]) for g, _ in made.starts]
        queue = [g for g in queue if g.request_id in made.positions]
        busy = Counter()
        for g, _ in running:
            busy[g.org_id] += g.per_node
        shares.pass_time(20.0)
        for org, workers in busy.items():
            shares.add(org, workers, 20.0)
        had.update({org: 20 * workers for org, workers in busy.items()})
        assert len({g.org_id for g in queue}) == 10
    fair = had.total() / 10
    assert all(abs(had[str(org)] - fair) < 0.1 * fair for org in range(10)), had


def test_a_small_job_runs_past_a_large_one_that_has_no_room_until_that_has_waited_long():
    running = [Run(gang(0, workers=4), 1)]
    large, small = gang(1, org="b", workers=8), gang(2, org="c")
    made = decide([large, small], running, nodes(1), ANY, Shares(), NOW)
    assert started(made) == [("job-2", 1)]
    assert made.positions == {"job-1": 1}
    waited = gang(1, org="b", workers=8, waited_s=RESERVE_AFTER_S + 1)
    assert started(decide([waited, small], running, nodes(1), ANY, Shares(), NOW)) == []
    elsewhere = gang(3, org="c", bundle={"CPU": 1.0})
    assert started(decide([waited, elsewhere], running, nodes(1), ANY, Shares(), NOW)) == [("job-3", 1)]


def test_a_large_job_starts_however_many_small_ones_keep_coming():
    large = gang(0, org="big", workers=8)
    running, waited = [Run(gang(1000 + i, org="s"), 1) for i in range(8)], 0.0
    for second in range(0, 3000, 30):
        running = running[1:]  # one ends every half minute, and another one comes
        small = gang(2000 + second, org=f"s{second % 7}")
        old = replace(large, waiting_since=NOW - dt.timedelta(seconds=waited))
        made = decide([old, small], running, nodes(1), ANY, Shares(), NOW)
        running += [Run(g, n) for g, n in made.starts]
        waited += 30
        if "job-0" in [r for r, _ in started(made)]:
            return
    raise AssertionError("the large job starved")


def test_an_elastic_job_takes_what_there_is():
    elastic = gang(1, workers=8, nodes=4, min_nodes=2)
    assert started(decide([elastic], [], nodes(3), ANY, Shares(), NOW)) == [("job-1", 3)]
    assert started(decide([elastic], [], nodes(1), ANY, Shares(), NOW)) == []
    assert started(decide([elastic], [], nodes(9), ANY, Shares(), NOW)) == [("job-1", 4)]


def test_an_org_at_its_quota_holds_nobody_up():
    queue = [gang(1, org="a"), gang(2, org="a"), gang(3, org="b")]
    made = decide(queue, [], nodes(1), Limits(10, max_running_jobs_per_org=1), Shares(), NOW)
    assert started(made) == [("job-1", 1), ("job-3", 1)]
    assert made.lacking == []  # no machine more would help


def test_a_job_over_the_limit_of_all_workers_waits_for_others_to_end_and_not_for_machines():
    running, limits = [Run(gang(0, workers=4), 1)], Limits(10, max_workers=6)
    large, small = gang(1, org="b", workers=4), gang(2, org="c", workers=2)
    made = decide([large, small], running, nodes(0), limits, Shares(), NOW)
    assert (made.lacking, made.positions) == ([(small, 1)], {"job-1": 1, "job-2": 2})
    waited = gang(1, org="b", workers=4, waited_s=RESERVE_AFTER_S + 1)
    made = decide([waited, small], running, nodes(1), limits, Shares(), NOW)
    assert (made.starts, made.positions) == ([], {"job-1": 1, "job-2": 2})  # so that small ones can't starve it


@given(st.integers(0, 8), st.integers(0, 8), st.integers(1, 8), st.booleans())
def test_what_others_hold_is_no_room_and_what_a_run_holds_counts_once(others, ours, wanted, placed):
    ours = min(ours, 8 - others)
    running = [Run(gang(0, workers=ours), 1, placed)] if ours else []
    free = 8 - others - (ours if placed else 0)
    made = decide([gang(1, workers=wanted)], running, nodes(1, gpus=free), ANY, Shares(), NOW)
    assert bool(made.starts) == (wanted <= 8 - others - ours)


def test_kinds_of_machine_are_told_apart():
    a100 = {"GPU": 1.0, "accelerator_type:A100": 0.001}
    mixed = [{"GPU": 8.0, "accelerator_type:H100": 1.0}, {"GPU": 2.0, "accelerator_type:A100": 1.0}]
    made = decide([gang(1, workers=4, bundle=a100)], [], mixed, ANY, Shares(), NOW)
    assert started(made) == []
    assert [g.request_id for g, _ in made.lacking] == ["job-1"]
    assert started(decide([gang(1, workers=2, bundle=a100)], [], mixed, ANY, Shares(), NOW)) == [("job-1", 1)]


def test_what_an_org_had_fades():
    shares = Shares()
    shares.add("a", 2, 10.0)
    assert shares.of("a") == pytest.approx(20.0, rel=0.01)
    shares.add("b", 2, 10.0, ago_s=HALF_LIFE_S)
    shares.pass_time(HALF_LIFE_S)
    assert shares.of("a") == pytest.approx(10.0, rel=0.01)
    assert shares.of("b") == pytest.approx(5.0, rel=0.01)


@given(st.floats(1.0, 10 * HALF_LIFE_S), st.integers(1, 50))
def test_work_counts_alike_as_it_goes_on_and_all_at_once(seconds, count):
    as_it_goes, at_once = Shares(), Shares()
    for _ in range(count):
        as_it_goes.pass_time(seconds / count)
        as_it_goes.add("a", 3, seconds / count)
    at_once.add("a", 3, seconds)
    assert as_it_goes.of("a") == pytest.approx(at_once.of("a"))
