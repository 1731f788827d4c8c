"""The window of requests, against a count over all that were let in."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app import quota
from serve_app.errors import ApiError

RATE = 5


@pytest.mark.parametrize("processes", [1, 2, 5])
@given(st.lists(st.tuples(st.floats(0, 30), st.sampled_from(["a", "b"]), st.integers(0, 4)), max_size=60))
def test_no_minute_has_more_requests_than_the_rate_and_none_is_refused_without_need(processes, asked):
    now = 1000.0
    let_in = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quota, "time", SimpleNamespace(monotonic=lambda: now))
        limits = [quota.RateLimit(f"{RATE}/minute", processes) for _ in range(processes)]
        for pause_s, org, dealt in asked:
            now += pause_s
            of_the_minute = [at for at, who, _ in let_in if who == org and at > now - 60]
            here = [at for at, who, where in let_in if (who, where) == (org, dealt % processes) and at > now - 60]
            try:
                limits[dealt % processes].check(org)
            except ApiError as error:
                assert len(here) == RATE // processes
                wait_s = int(error.headers["Retry-After"])
                assert wait_s - 1 <= here[0] + 60 - now <= wait_s
            else:
                assert len(of_the_minute) < RATE
                let_in.append((now, org, dealt % processes))
