"""What is taken out of a run's words before anybody writes them down."""

import pytest

from tests.conftest import CANARY
from train_loop.redact import Redactor


def test_values_that_were_told_are_taken_out_the_longest_first():
    hide = Redactor()
    hide.hide(CANARY, CANARY + "-and-more", None, "", "abc")
    assert hide(f"a {CANARY}-and-more b {CANARY}, abc") == "a [redacted] b [redacted], abc"


@pytest.mark.parametrize(
    "looks",
    [
        "AKIA" + "A1" * 8,
        "ASIA" + "Z9" * 8,
        "hf_" + "aB3" * 8,
        "Bearer " + "x.y-z" * 5,
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJ4In0.c2lnbmVk",
    ],
)
def test_what_looks_like_a_key_is_taken_out_whoevers_it_is(looks):
    assert Redactor()(f"before {looks} after") == "before [redacted] after"


def test_ordinary_lines_stay_as_they_are():
    line = "step 5/120 loss 2.1200, AKIA is no key, hf_home, Bearer of news"
    assert Redactor()(line) == line


def test_what_a_run_says_can_be_written_down_by_every_database():
    hide = Redactor()
    hide.hide("hunter22hunter22")
    assert hide("a\0b\ud800c hunter22hunter22") == "a\ufffdb?c [redacted]"
