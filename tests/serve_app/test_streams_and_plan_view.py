"""The parts of client and command that need no server: the stream parser, names of downloads, the rendered plan, the plot."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from serve_app.cli.plan import show_plan
from serve_app.cli.reads import plot
from serve_app.client import ApiError, Client, DownloadError
from serve_app.client.api import is_loopback
from serve_app.client.downloads import wanted
from serve_app.client.streams import EventStream
from serve_app.progress import follow

SCALARS = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=True) | st.text(max_size=8)
NAMES = st.sampled_from(
    ["memory", "warnings", "samples", "message", "total_bytes", "time_s", "x_share", "price", "segments", "text"]
)
JSON = st.recursive(SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(NAMES, v, max_size=4), max_leaves=12)


def wire(entries: list[dict[str, Any]], line_end: str = "\n") -> bytes:
    blocks = [[f"id: {e['id']}", "event: logs", f"data: {json.dumps(e, ensure_ascii=False)}", ""] for e in entries]
    return "".join(line + line_end for block in blocks for line in block).encode()


def fed(stream: EventStream, data: bytes, cuts: list[int]) -> list[dict[str, Any]]:
    edges = [0, *sorted(min(c, len(data)) for c in cuts), len(data)]
    return [entry for a, b in itertools.pairwise(edges) for entry in stream.feed(data[a:b])]


@given(
    st.lists(st.text(st.characters(codec="utf-8"), max_size=20), max_size=5),
    st.lists(st.integers(0, 400), max_size=20),
    st.sampled_from(["\n", "\r\n", "\r"]),
)
def test_a_stream_gives_the_same_entries_however_it_is_cut(lines: list[str], cuts: list[int], line_end: str) -> None:
    entries = [{"id": i, "line": line} for i, line in enumerate(lines, 1)]
    assert fed(EventStream(), wire(entries, line_end), cuts) == entries


@pytest.mark.parametrize("line", ["a\u2028b", "a\u2029b", "a\x85b", "\ufeff"])
def test_a_log_line_may_hold_what_python_takes_for_a_line_end(line: str) -> None:
    assert fed(EventStream(), wire([{"id": 1, "line": line}]), []) == [{"id": 1, "line": line}]


def test_half_an_event_is_asked_for_again_and_leaves_nothing_behind() -> None:
    stream = EventStream()
    first, second = wire([{"id": 1}]), wire([{"id": 2}])
    assert fed(stream, first + second[:-1], []) == [{"id": 1}]
    assert stream.headers()["Last-Event-ID"] == "1"
    stream.opened(httpx.Response(200))
    assert fed(stream, second, []) == [{"id": 2}]


def test_a_stream_that_can_not_be_opened_is_given_up_and_one_that_breaks_is_not() -> None:
    broken, stream = httpx.ConnectError("refused"), EventStream()
    for _ in range(20):
        stream.opened(httpx.Response(200))
        stream.wait_s(broken)
    with pytest.raises(httpx.ConnectError):
        sum(stream.wait_s(broken) for _ in range(20))
    with pytest.raises(ApiError):
        EventStream().wait_s(ApiError(404, "no job", []))


def test_a_page_instead_of_a_stream_is_an_error() -> None:
    page = httpx.Response(200, headers={"Content-Type": "text/html"}, request=httpx.Request("GET", "http://proxy"))
    with pytest.raises(ApiError, match="didn't answer with a stream"):
        EventStream().opened(page)


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/x", "", ".", "..", "a\\..\\..\\x", "C:x", "a\n", "a\0", "link/x"])
def test_no_file_lands_outside_of_the_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "to"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    with pytest.raises(DownloadError, match="outside"):
        wanted({"files": [{"name": name, "url": "http://127.0.0.1/x", "sha256": None}]}, folder)


@pytest.mark.parametrize("name", ["adapter/model.safetensors", "a b", "..x", "größe.json"])
def test_ordinary_names_are_kept(tmp_path: Path, name: str) -> None:
    file = wanted({"files": [{"name": name, "url": "http://127.0.0.1/x", "sha256": None}]}, tmp_path)[name]
    assert file.target == tmp_path / name


@pytest.mark.parametrize(
    ("url", "here"),
    [
        ("http://127.0.0.1:1", True),
        ("http://127.8.0.1", True),
        ("http://[::1]:1", True),
        ("http://localhost", True),
        ("http://localhost.example.com", False),
        ("https://10.0.0.1", False),
        ("https://127.0.0.1.example.com", False),
    ],
)
def test_proxies_of_the_environment_count_everywhere_but_here(url: str, here: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_loopback(url) is here
    monkeypatch.setenv("ALL_PROXY", "http://proxy.invalid:3128")
    with Client(url, "a.b.c") as client:
        assert client._http.trust_env is not here


NO_URLS = ["", "example.com", "localhost:8000", "ftp://example.com", "https://", "http://a\nb", "http://a:b", "http://a:99999"]


@pytest.mark.parametrize("url", [*NO_URLS, "http://[::1", "http://[x]", "http://\u00df-.com"])
def test_what_is_no_url_is_said_at_once(url: str) -> None:
    with pytest.raises(ValueError, match="isn't the URL of a service"):
        Client(url, "a.b.c")


def shown(plan: dict[str, Any]) -> str:
    screen = io.StringIO()
    show_plan(plan, Console(file=screen, width=100))
    return screen.getvalue()


def test_a_plan_shows_its_parts_in_their_units() -> None:
    text = shown(
        {
            "message": "It would be: LoRA on [base]",
            "tokens": {"trained_on": 1234567, "truncated_share": 0.25},
            "time_s": 3720,
            "price": None,
            "memory": {"weights_bytes": 3 << 30, "total_bytes": 4 << 30, "available_bytes": 8 << 30},
            "warnings": ["it [may] fail"],
            "samples": [
                {
                    "tokens": 5,
                    "trained_tokens": 2,
                    "segments": [{"text": "Hi?", "trained": False}, {"text": "Yes", "trained": True}],
                }
            ],
            "something_new": {"of_later": 7},
        }
    )
    lines = [" ".join(line.replace("│", " ").split()) for line in text.splitlines()]
    for line in [
        "It would be: LoRA on [base]",
        "tokens trained on 1,234,567",
        "tokens truncated 25.0%",
        "time 1 h 02 min",
        "price not set",
        "weights 3.00 GiB 75%",
        "total 4.00 GiB 100%",
        "available 8.00 GiB",
        "something new of later 7",
        "warning: it [may] fail",
        "sample 1: 2 of 5 tokens trained on",
        "Hi?[[Yes]]",
    ]:
        assert line in lines


@given(st.dictionaries(NAMES, JSON, max_size=6))
def test_whatever_plan_comes_is_shown(plan: dict[str, Any]) -> None:
    shown(plan)


def test_what_is_logged_can_not_steer_the_terminal() -> None:
    assert "\x1b" not in shown({"warnings": ["\x1b[2J"], "samples": [{"segments": [{"text": "\x1b]0;x\x07", "trained": True}]}]})
    screen = io.StringIO()
    follow(iter([{"status": "FAILED", "message": "m", "error_message": "line 3: \x1b[2J isn't\na role"}]), Console(file=screen))
    assert "\x1b" not in screen.getvalue()
    assert "isn't\na role" in screen.getvalue()


def test_brackets_in_what_a_job_says_are_not_markup() -> None:
    screen = io.StringIO()
    failed = {"status": "FAILED", "phase": "training", "error_message": "s3://b/[/x] isn't [red]there"}
    follow(iter([failed]), Console(file=screen))
    assert "s3://b/[/x] isn't [red]there" in screen.getvalue()


def test_a_plot_leaves_out_what_is_no_number() -> None:
    picture = plot([{"step": 1, "loss": 2.0}, {"step": 2, "loss": None}, {"step": 3, "loss": float("nan"), "eval_loss": 1.5}])
    assert picture.splitlines()[-1] == "step 3  eval_loss 1.5"
    assert "\x1b" not in picture
    assert plot([]) == plot([{"step": 1, "loss": None}]) == "no metrics yet"
