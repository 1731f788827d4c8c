"""Small servers that answer as Google's storage and the experiment trackers do."""

import base64
import gzip
import http.server
import json
import re
import urllib.parse

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from tests.conftest import CANARY


class Server(http.server.BaseHTTPRequestHandler):
    """Base of all: answers JSON, or bytes by range."""

    protocol_version = "HTTP/1.1"

    @classmethod
    def of(cls, **state):
        """A handler that all connections of one server share the state of."""
        return type(cls.__name__, (cls,), state)

    def log_message(self, *args):
        return None

    def body(self):
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data

    @property
    def question(self):
        """For a refusal, which may well quote what it was sent."""
        return f"who is {self.headers.get('Authorization')}?"

    def answer(self, value, status=200, **headers):
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def answer_range(self, data, **headers):
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked is None:
            return self.answer(data, **headers)
        start, end = int(asked[1]), min(int(asked[2] or len(data) - 1), len(data) - 1)
        where = {"Content_Range": f"bytes {start}-{end}/{len(data)}"}
        return self.answer(data[start : end + 1], 206, **headers, **where)


class Google(Server):
    """Google's storage with one bucket, and its tokens, of which CANARY is the right one."""

    files = {}
    authorization = f"Bearer {CANARY}"

    def do_POST(self):
        body = self.body().decode()
        assert "grant_type=urn%3Aietf%3Aparams%3Aoauth%3Agrant-type%3Ajwt-bearer" in body
        self.answer({"access_token": CANARY, "expires_in": 3600, "token_type": "Bearer"})

    def do_GET(self):
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        if self.headers.get("Authorization") != self.authorization:
            return self.answer({"error": {"code": 401, "message": self.question}}, 401)
        name = urllib.parse.unquote(url.path.rpartition("/o/")[2]) if "/o/" in url.path else None
        if name is None:
            return self.answer({"items": [self.about(n) for n in sorted(self.files) if n.startswith(query["prefix"])]})
        if name not in self.files:
            return self.answer({"error": {"code": 404, "message": "Not Found"}}, 404)
        if query.get("alt") == "media":
            return self.answer_range(self.files[name])
        return self.answer(self.about(name))

    def about(self, name):
        at = "2026-01-02T03:04:05.678Z"
        made = {"kind": "storage#object", "bucket": "bucket", "timeCreated": at, "updated": at, "generation": "1"}
        return made | {"name": name, "size": str(len(self.files[name]))}


def google_account(url):
    """The key of a service account, whose tokens come from the server at `url`."""
    private = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pkcs8, plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    pem = private.private_bytes(serialization.Encoding.PEM, pkcs8, plain).decode()
    return {"type": "service_account", "client_email": "a@b.c", "private_key": pem, "token_uri": f"{url}/token"}


class Hub(Server):
    """The hub with one dataset, org/rows, for those with the token CANARY."""

    files = {}
    authorization = f"Bearer {CANARY}"

    def do_GET(self):
        url = urllib.parse.urlsplit(self.path)
        if self.headers.get("Authorization") != self.authorization:
            return self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound", X_Error_Message=self.question)
        if url.path.startswith("/datasets/org/rows/resolve/main/"):
            name = url.path.removeprefix("/datasets/org/rows/resolve/main/")
            return self.answer_range(self.files[name], X_Repo_Commit="c" * 40, ETag='"e"')
        if url.path.startswith("/api/datasets/org/rows/tree/main"):
            below = url.path.removeprefix("/api/datasets/org/rows/tree/main").strip("/")
            return self.answer(self.listing(below, "recursive=true" in url.query.lower()))
        if url.path.startswith("/api/datasets/org/rows"):
            return self.answer({"id": "org/rows", "sha": "c" * 40, "siblings": []})
        return self.answer({"error": "Not found"}, 404, X_Error_Code="RepoNotFound")

    def do_HEAD(self):
        self.do_GET()

    def do_POST(self):
        asked = dict(urllib.parse.parse_qsl(self.rfile.read(int(self.headers["Content-Length"])).decode()))
        self.answer([e for e in self.listing("", True) if e["path"] == asked.get("paths")])

    def listing(self, below, recursive):
        found = {}
        for name, data in self.files.items():
            if name.startswith(below):
                found[name] = {"type": "file", "path": name, "size": len(data), "oid": "a" * 40}
                folder = name.rpartition("/")[0]
                while folder and folder != below:
                    found[folder] = {"type": "directory", "path": folder, "size": 0, "oid": "b" * 40}
                    folder = folder.rpartition("/")[0]
        depth = below.count("/") + bool(below)
        return [e for e in found.values() if recursive or e["path"].count("/") == depth]


class Mlflow(Server):
    """As much of MLflow's REST API as a run needs, and as strict; its statuses and refusals are those of `mlflow server` 3.17."""

    authorization = None  # that it asks for
    down = None  # the status that it answers everything with
    before = staticmethod(lambda: None)  # is called before each answer

    @classmethod
    def new(cls, **state):
        return cls.of(experiments={}, runs=[], **state)

    def do_GET(self):
        url = urllib.parse.urlsplit(self.path)
        self.reply(url.path, dict(urllib.parse.parse_qsl(url.query)))

    def do_POST(self):
        self.reply(self.path, json.loads(self.body()))

    def reply(self, path, asked):
        self.before()
        if self.down:
            return self.answer({"message": self.question}, self.down)
        if self.headers.get("Authorization") != self.authorization:
            return self.answer(self.question.encode(), 401, WWW_Authenticate='Basic realm="mlflow"')
        call = path.removeprefix("/api/2.0/mlflow/")
        try:
            self.answer(getattr(self, re.sub(r"\W", "_", call))(**asked))
        except LookupError as error:
            (code,) = error.args
            self.answer({"error_code": code, "message": self.question}, 404 if code == "RESOURCE_DOES_NOT_EXIST" else 400)

    def experiments_get_by_name(self, experiment_name):
        if experiment_name not in self.experiments:
            raise LookupError("RESOURCE_DOES_NOT_EXIST")
        return {"experiment": {"experiment_id": self.experiments[experiment_name], "name": experiment_name}}

    def experiments_create(self, name):
        return {"experiment_id": self.experiments.setdefault(name, str(len(self.experiments) + 1))}

    def runs_create(self, experiment_id, run_name, start_time, tags):
        info = {"run_id": f"run{len(self.runs)}", "run_name": run_name, "experiment_id": experiment_id, "status": "RUNNING"}
        self.runs.append({"info": info, "tags": {t["key"]: t["value"] for t in tags}, "params": {}, "metrics": []})
        return {"run": {"info": info, "data": {}}}

    def runs_search(self, experiment_ids, filter, max_results):
        wanted = re.fullmatch(r"tags\.request_id = '([^']*)'", filter)[1]
        found = [r for r in self.runs if r["tags"]["request_id"] == wanted and r["info"]["experiment_id"] in experiment_ids]
        latest = [list({m["key"]: m for m in sorted(r["metrics"], key=lambda m: m["step"])}.values()) for r in found]
        return {"runs": [{"info": r["info"], "data": {"metrics": m}} for r, m in zip(found, latest, strict=True)][:max_results]}

    def runs_update(self, run_id, status, end_time=None):
        (run,) = [r for r in self.runs if r["info"]["run_id"] == run_id]
        run["info"]["status"] = status
        return {"run_info": run["info"]}

    def runs_log_batch(self, run_id, metrics=(), params=()):
        (run,) = [r for r in self.runs if r["info"]["run_id"] == run_id]
        for param in params:
            if run["params"].setdefault(param["key"], param["value"]) != param["value"] or len(param["value"]) > 500:
                raise LookupError("INVALID_PARAMETER_VALUE")
        if len(metrics) > 1000 or len(params) > 100:
            raise LookupError("INVALID_PARAMETER_VALUE")
        run["metrics"] += metrics
        return {}


class Wandb(Server):
    """As much of W&B's server as its client asks for."""

    key = CANARY * 3  # its client wants 40 letters
    authorization = "Basic " + base64.b64encode(f"api:{key}".encode()).decode()
    down = None

    @classmethod
    def new(cls, **state):
        return cls.of(runs={}, **state)

    def do_PUT(self):
        self.body()
        self.answer({})

    def do_POST(self):
        asked = json.loads(self.body())
        if self.down:
            return self.answer({}, self.down)
        if self.headers.get("Authorization") != self.authorization:
            return self.answer({"errors": [{"message": self.question}]}, 401)
        if self.path != "/graphql":
            return self.stream(self.runs[self.path.split("/")[4]], asked)
        call = asked["operationName"]
        project = {"id": "p", "name": "project", "entity": {"id": "e", "name": "team"}}
        told = asked["variables"]
        if call == "RunResumeStatus":
            found = self.runs.get(told["name"])
            self.answer({"data": {"model": project | {"bucket": found and self.resumed(found)}}})
        elif call == "UpsertBucket":
            inserted = told["name"] not in self.runs
            run = self.runs.setdefault(told["name"], {"history": {}, "exit_codes": [], "name": told["name"]})
            run |= {k: told[k] for k in ("displayName", "tags", "config") if told[k] is not None}
            bucket = {"id": "b", "name": told["name"], "displayName": run["displayName"], "config": "{}", "project": project}
            self.answer({"data": {"upsertBucket": {"bucket": bucket | {"historyLineCount": 0}, "inserted": inserted}}})
        elif call == "CreateRunFiles":
            url = f"http://{self.headers['Host']}/upload/"
            files = [{"name": name, "uploadUrl": url + name} for name in told["files"]]
            self.answer({"data": {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}})
        else:
            self.answer({"data": {}})

    def stream(self, run, asked):
        lines = asked.get("files", {}).get("wandb-history.jsonl", {"offset": 0, "content": []})
        run["history"] |= {lines["offset"] + i: json.loads(line) for i, line in enumerate(lines["content"])}
        if asked.get("complete"):
            run["exit_codes"].append(asked["exitcode"])
        self.answer({})

    def resumed(self, run):
        tail = json.dumps([json.dumps(line) for line in list(run["history"].values())[-1:]])
        counts = {"historyLineCount": len(run["history"]), "eventsLineCount": 0, "logLineCount": 0}
        rest = {"summaryMetrics": "{}", "eventsTail": "[]", "config": run["config"], "tags": run["tags"], "notes": ""}
        rest["wandbConfig"] = '{"t": 1}'
        return counts | rest | {"id": "b", "name": run["name"], "displayName": run["displayName"], "historyTail": tail}
