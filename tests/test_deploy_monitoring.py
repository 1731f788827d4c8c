"""What deploy/ has for Prometheus and Grafana; that its queries return data is in tests/service/test_whole_jobs.py."""

import json
import re
import subprocess

import pytest
import yaml

from serve_app.metrics import METRICS, PREFIX
from tests.observed import ALERTS, DASHBOARDS, REPO, dashboard_queries, rules, tool, tuneyard_names

SUFFIXES = {"gauge": ("",), "counter": ("_total",), "histogram": ("_bucket", "_count", "_sum")}
EXPORTED = {f"{PREFIX}{metric.name}{suffix}": metric for metric in METRICS for suffix in SUFFIXES[metric.kind]}
QUERIES = [expr for dashboard in DASHBOARDS for _, expr in dashboard_queries(dashboard)] + [rule["expr"] for rule in rules()]


def promtool(*arguments):
    return subprocess.run([tool("promtool"), *arguments], capture_output=True, text=True, check=False)


def test_prometheus_accepts_the_rules_and_the_configuration():
    checked = promtool("check", "config", ALERTS.parent / "prometheus.yml")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"{len(rules())} rules found" in checked.stdout


def test_each_alert_fires_on_what_it_is_for():
    tests = REPO / "tests/alerts_test.yml"
    tested = promtool("test", "rules", tests)
    assert tested.returncode == 0, tested.stdout + tested.stderr
    fired = {
        t["alertname"] for test in yaml.safe_load(tests.read_text())["tests"] for t in test["alert_rule_test"] if t["exp_alerts"]
    }
    assert fired == {rule["alert"] for rule in rules() if "alert" in rule}


@pytest.mark.parametrize("query", QUERIES)
def test_a_query_names_only_metrics_and_labels_that_there_are(query):
    assert tuneyard_names(query) <= EXPORTED.keys()
    for name, selector in re.findall(r"\b(ray_tuneyard_\w+)\{([^}]*)\}", query):
        assert set(re.findall(r"(\w+)\s*[=!]", selector)) <= {*EXPORTED[name].labels, "le"}, query


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_is_whole(dashboard):
    board = json.loads(dashboard.read_text())
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert {v["name"] for v in board["templating"]["list"]} == {
        "datasource",
        *re.findall(r"\$(request_id)", dashboard.read_text()),
    }
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells)  # no panel is over another
    assert max(x for x, _ in cells) < 24
    assert all(panel["description"] for panel in panels if panel["type"] != "row")


def test_every_metric_is_shown_or_watched():
    used = {EXPORTED[name].name for query in QUERIES for name in tuneyard_names(query)}
    assert used == {metric.name for metric in METRICS}


def metric_row(metric):
    """The metric's line in docs/observability.md."""
    name = f"{PREFIX}{metric.name}" + ("_total" if metric.kind == "counter" else "")
    return f"| `{name}` | {metric.kind} | {', '.join(metric.labels)} | {metric.help} |"


def test_the_page_lists_every_metric_and_says_what_to_do_for_every_alert():
    page = (REPO / "docs/observability.md").read_text()
    table = page.partition("<!-- metrics -->")[2].partition("<!-- end of metrics -->")[0]
    assert [line for line in table.splitlines() if line.startswith("| `")] == [metric_row(metric) for metric in METRICS]
    assert re.findall(r"^### (Tuneyard\w+)$", page, re.MULTILINE) == [rule["alert"] for rule in rules() if "alert" in rule]
