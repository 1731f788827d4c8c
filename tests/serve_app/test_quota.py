"""The window of requests, against a count over all that were let in."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app import quota
from serve_app.errors import ApiError


@given(st.lists(st.tuples(st.floats(0, 30), st.sampled_from(["a", "b"])), max_size=60))
def test_no_minute_has_more_requests_than_the_rate_and_none_is_refused_without_need(asked):
    now = 1000.0
    let_in = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quota, "time", SimpleNamespace(monotonic=lambda: now))
        limit = quota.RateLimit("5/minute")
        for pause_s, org in asked:
            now += pause_s
            of_the_minute = [at for at, who in let_in if who == org and at > now - 60]
            try:
                limit.check(org)
            except ApiError as error:
                assert len(of_the_minute) == 5
                wait_s = int(error.headers["Retry-After"])
                assert wait_s - 1 <= of_the_minute[0] + 60 - now <= wait_s
            else:
                assert len(of_the_minute) < 5
                let_in.append((now, org))
