"""The Kubernetes manifests, rendered by kubectl and held against Kubernetes's schemas, Ray's own readers and our code."""

import base64
import ipaddress
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import typer.main
import yaml
from cryptography.fernet import Fernet
from ray._private.services import get_address
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.dashboard.http_server_agent import PUBLIC_EXACT_PATHS
from ray.scripts.scripts import cli as ray_cli
from ray.serve.schema import ServeDeploySchema

from serve_app.auth import Verifier
from serve_app.cli import app
from serve_app.cluster import bundle_of
from serve_app.deployment import APPLICATION
from serve_app.proxy import CALLBACK
from serve_app.scheduler import Room
from serve_app.secrets import SecretVault
from serve_app.settings import Settings
from serve_app.store.jobs import JobStore
from train_loop.__main__ import main as train_loop_main
from train_loop.spec import JobSpec

ROOT = Path(__file__).parents[2]
SERVE_YAML = ROOT / "deploy/serve.yaml"
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
KUBECTL = Path(sys.executable).parent / "kubectl"
KUBERAY = yaml.safe_load((Path(__file__).parent / "kuberay.yaml").read_text())
PLACES = ("overlays/gpu", "overlays/cpu", "rayjob")
AGENT, GCS, DASHBOARD, CLIENT, METRICS, SERVE = 52365, 6379, 8265, 10001, 8080, 8000
UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


def render(folder, *arguments):
    return subprocess.run([KUBECTL, "kustomize", folder, *arguments], capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture(scope="module")
def deploy(tmp_path_factory):
    """A copy of the manifests with the keys that whoever applies them makes first."""
    copy = tmp_path_factory.mktemp("deploy") / "kubernetes"
    shutil.copytree(ROOT / "deploy/kubernetes", copy, ignore=shutil.ignore_patterns("keys", "keys.json", "redis-password"))
    subprocess.run([copy / "overlays/cpu/make-keys.sh"], check=True, capture_output=True, timeout=60)
    shutil.copy(copy / "overlays/gpu/keys.example.json", copy / "overlays/gpu/keys.json")
    (copy / "overlays/gpu/redis-password").write_text("secret")
    return copy


@pytest.fixture(scope="module")
def rendered(deploy):
    """What kubectl would apply, by place."""
    found = {}
    for place in PLACES:
        done = render(deploy / place)
        assert (done.returncode, done.stderr) == (0, "")
        found[place] = list(yaml.safe_load_all(done.stdout))
    return found


@pytest.fixture(params=PLACES)
def objects(request, rendered):
    return rendered[request.param]


def of_kind(objects, kind):
    return [o for o in objects if o["kind"] == kind]


def named(objects, kind, name):
    (found,) = [o for o in of_kind(objects, kind) if o["metadata"]["name"] == name]
    return found


def service_of(objects):
    (found,) = of_kind(objects, "RayService")
    return found


def cluster_of(objects):
    """The Ray cluster of what is rendered."""
    (found,) = [o["spec"] for o in objects if o["kind"] in ("RayService", "RayJob")]
    return found.get("rayClusterConfig") or found["rayClusterSpec"]


def ray_groups(objects):
    """Head and worker groups, and the type that KubeRay labels their pods with."""
    cluster = cluster_of(objects)
    return [("head", cluster["headGroupSpec"]), *(("worker", group) for group in cluster["workerGroupSpecs"])]


def pods(objects):
    """Every pod template, with the labels that its pods will have."""
    for kind, group in ray_groups(objects):
        template = group["template"]
        yield template["metadata"]["labels"] | {"ray.io/node-type": kind}, template
    for deployment in of_kind(objects, "Deployment"):
        yield deployment["spec"]["template"]["metadata"]["labels"], deployment["spec"]["template"]


def containers(template):
    return [*template["spec"].get("initContainers", ()), *template["spec"]["containers"]]


def size(quantity):
    number, unit = re.fullmatch(r"(\d+)(Ki|Mi|Gi)?", str(quantity)).groups()
    return int(number) * UNITS.get(unit, 1)


def check(thing):
    kubernetes_validate.validate(thing, kubernetes_validate.latest_version(), strict=True)


def test_kubernetes_accepts_every_object(objects):
    core = [o for o in objects if not o["apiVersion"].startswith("ray.io/")]
    core += [{"apiVersion": "v1", "kind": "PodTemplate", "template": group["template"]} for _, group in ray_groups(objects)]
    core += [{"apiVersion": "v1", "kind": "Service"} | s["spec"]["serveService"] for s in of_kind(objects, "RayService")]
    for thing in core:
        check(thing)


def test_kubernetes_would_refuse_a_misspelt_field(rendered):
    template = json.loads(json.dumps(cluster_of(rendered["overlays/gpu"])["headGroupSpec"]["template"]))
    template["spec"]["containers"][0]["livenessprobe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="livenessprobe"):
        check({"apiVersion": "v1", "kind": "PodTemplate", "template": template})


def test_kuberay_knows_every_field(objects):
    (custom,) = [o for o in objects if o["apiVersion"].startswith("ray.io/")]
    jsonschema.validate(custom, KUBERAY)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(custom | {"spec": custom["spec"] | {"rayVersion": "2.60.0"}}, KUBERAY)


def test_kuberay_has_what_it_demands_of_a_cluster(objects):
    cluster = cluster_of(objects)
    # Its operator refuses both in one group, and tokens without a version.
    for _, group in ray_groups(objects):
        params = group["rayStartParams"]
        assert not (group.get("resources") and {"num-cpus", "num-gpus", "memory", "resources"} & set(params))
        assert group["template"]["spec"].get("restartPolicy", "Never") == "Never"
        assert group["template"]["spec"]["containers"][0]["name"].startswith("ray-")
    assert cluster["authOptions"] == {"mode": "token"}
    lock = (ROOT / "requirements.lock").read_text().splitlines()
    assert f"ray=={cluster['rayVersion']}" in lock


def test_serve_accepts_its_configuration(rendered):
    texts = {service_of(rendered[place])["spec"]["serveConfigV2"] for place in PLACES[:2]}
    config = ServeDeploySchema.model_validate(yaml.safe_load(texts.pop()))
    assert not texts
    (application,), head = config.applications, cluster_of(rendered["overlays/gpu"])["headGroupSpec"]["template"]
    assert (application.name, application.route_prefix) == (APPLICATION, "/")
    assert (config.http_options.host, config.http_options.port) == ("0.0.0.0", SERVE)
    assert application.args["release"] == VERSION
    # What stands before the proxy, in the process that has the proxy: on the head alone.
    assert config.proxy_location.value == "HeadOnly"
    variables = {v["name"]: v.get("value") for v in head["spec"]["containers"][0]["env"]}
    assert variables.items() >= CALLBACK.items()


def test_serve_s_configuration_is_the_one_of_serve_deploy(rendered):
    text = service_of(rendered["overlays/gpu"])["spec"]["serveConfigV2"]
    assert yaml.safe_load(text) == yaml.safe_load(SERVE_YAML.read_text())


def loaded(objects, home, monkeypatch):
    """The settings as the head's processes read them: the ConfigMap's in the environment, the Secret's as a file."""
    for name in [n for n in os.environ if n.startswith("TUNEYARD_")]:
        monkeypatch.delenv(name)
    given = named(objects, "ConfigMap", "tuneyard-settings")["data"]
    assert set(given) <= {f"TUNEYARD_{name.upper()}" for name in Settings.model_fields}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TUNEYARD_HOME", str(home))
    keys = secret(objects, "tuneyard-keys")
    assert set(json.loads(keys["settings.json"])) <= set(Settings.model_fields)
    (home / "settings.json").write_text(keys["settings.json"])
    return Settings.load()


def secret(objects, name):
    return {k: base64.b64decode(v).decode() for k, v in named(objects, "Secret", name)["data"].items()}


def test_a_try_out_s_settings_and_keys_are_sound(rendered, tmp_path, monkeypatch):
    settings = loaded(rendered["overlays/cpu"], tmp_path, monkeypatch)
    assert settings.storage_secret_access_key is not None
    settings.require_shared_store(3)
    Verifier.from_settings(settings)
    Fernet(settings.secret_key.get_secret_value())
    identity = json.loads(secret(rendered["overlays/cpu"], "try-out-keys")["s3.json"])["identities"][0]
    keys = {"accessKey": settings.storage_access_key_id, "secretKey": settings.storage_secret_access_key.get_secret_value()}
    assert identity["credentials"] == [keys]
    password = secret(rendered["overlays/cpu"], "try-out-keys")["postgres-password"]
    assert f":{password}@postgres/" in settings.database_url


def test_placeholders_that_are_left_are_refused(rendered, tmp_path, monkeypatch):
    settings = loaded(rendered["overlays/gpu"], tmp_path, monkeypatch)
    settings.require_shared_store(3)
    Verifier.from_settings(settings)
    with pytest.raises(RuntimeError, match="TUNEYARD_SECRET_KEY isn't a Fernet key"):
        SecretVault.from_settings(JobStore.open("sqlite://"), settings)


def test_without_keys_nothing_is_rendered():
    for place, file in (("gpu", "keys.json"), ("cpu", "keys/settings.json")):
        done = render(ROOT / "deploy/kubernetes/overlays" / place)
        if not (ROOT / "deploy/kubernetes/overlays" / place / file).exists():
            assert done.returncode != 0
            assert file in done.stderr


def test_the_autoscaler_can_make_room_for_every_profile(rendered, tmp_path, monkeypatch):
    for place in PLACES[:2]:
        (tmp_path / place).mkdir(parents=True)
        settings = loaded(rendered[place], tmp_path / place, monkeypatch)
        cr = {"metadata": {"name": "tuneyard", "namespace": "tuneyard"}, "spec": cluster_of(rendered[place])}
        config = _derive_autoscaling_config_from_ray_cr(cr)
        kinds = config["available_node_types"]
        assert kinds["headgroup"]["resources"]["CPU"] == 0
        for profile in settings.profiles.values():
            counts = [
                min(Room.of([kind["resources"]]).count(bundle_of(profile)), profile.gpus_per_node) * kind["max_workers"]
                for kind in kinds.values()
            ]
            assert sum(counts) == profile.max_workers
        assert all(kind["min_workers"] == 0 for kind in kinds.values())


def test_the_job_without_a_service_has_the_machines_it_asks_for(rendered, capsys):
    objects = rendered["rayjob"]
    (job,), (group,) = of_kind(objects, "RayJob"), cluster_of(objects)["workerGroupSpecs"]
    spec = JobSpec.model_validate_json(named(objects, "ConfigMap", "train-job")["data"]["job.json"])
    gpus = int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    assert group["replicas"] * gpus == spec.infra_config.num_workers
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"]

    python, module, name, file, *options = shlex.split(job["spec"]["entrypoint"])
    assert (python, module, name) == ("python", "-m", "train_loop")
    with pytest.raises(SystemExit, match="0"):
        train_loop_main(["--help"])
    assert all(option in capsys.readouterr().out for option in options if option.startswith("--"))
    head = cluster_of(objects)["headGroupSpec"]["template"]["spec"]
    (mount,) = [m for m in head["containers"][0]["volumeMounts"] if m["name"] == "job"]
    assert Path(file) == Path(mount["mountPath"]) / "job.json"


def test_every_pod_is_contained(objects):
    autoscaler = cluster_of(objects).get("autoscalerOptions")
    found = [c for _, template in pods(objects) for c in containers(template)] + ([autoscaler] if autoscaler else [])
    for container in found:
        context = container["securityContext"]
        assert context == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert set(container["resources"]["limits"]) >= {"cpu", "memory"}
        assert set(container["resources"]["requests"]) >= {"cpu", "memory"}
    for _, template in pods(objects):
        spec = template["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        assert all("hostPath" not in volume for volume in spec.get("volumes", ()))


def test_ray_s_pods_have_what_the_image_writes_to(objects):
    dockerfile = (ROOT / "deploy/image/Dockerfile").read_text()
    home, state = (re.search(rf"\b{name}=(\S+)", dockerfile).group(1) for name in ("HOME", "TUNEYARD_HOME"))
    uid = int(re.search(r"^USER (\d+):\1$", dockerfile, re.MULTILINE).group(1))
    for kind, group in ray_groups(objects):
        spec = group["template"]["spec"]
        context = spec["securityContext"]
        assert {context[who] for who in ("runAsUser", "runAsGroup", "fsGroup")} == {uid}
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        ray = spec["containers"][0]
        writable = {
            mount["mountPath"]
            for mount in ray["volumeMounts"]
            if "emptyDir" in volumes[mount["name"]] and not mount.get("readOnly")
        }
        assert writable == {"/tmp", "/dev/shm", home} | ({state} if kind == "head" else set())
        for container in containers(group["template"]):
            assert all(mount["name"] in volumes for mount in container["volumeMounts"])
        shared = size(volumes["shm"]["emptyDir"]["sizeLimit"])
        assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
        assert int(group["rayStartParams"]["object-store-memory"]) <= shared / 1.9
        assert shared < size(ray["resources"]["limits"]["memory"]) / 2
        # What fills a volume must not have the pod evicted before the volume is full.
        disk = sum(size(v["emptyDir"]["sizeLimit"]) for v in spec["volumes"] if "emptyDir" in v) - shared
        assert disk <= size(ray["resources"]["limits"]["ephemeral-storage"])


def test_settings_are_on_the_head_alone_and_their_file_is_where_they_are_read(rendered):
    for place in PLACES[:2]:
        for kind, group in ray_groups(rendered[place]):
            spec = group["template"]["spec"]
            text = json.dumps(spec)
            assert ("tuneyard-keys" in text, "tuneyard-settings" in text) == ((kind == "head"),) * 2
            for container in containers(group["template"]) if kind == "head" else ():
                (mount,) = [m for m in container["volumeMounts"] if m["name"] == "keys"]
                assert (mount["mountPath"], mount["subPath"]) == ("/var/lib/tuneyard/settings.json", "settings.json")
                assert mount["readOnly"] is True
            # Keys are in no process's environment: what Ray is handed, it shows.
            assert not re.search(r'"name": "TUNEYARD_', text)


def references(thing):
    """The Secrets and ConfigMaps that are named anywhere in it, with the key where one is named."""
    if isinstance(thing, list):
        for inner in thing:
            yield from references(inner)
    elif isinstance(thing, dict):
        for name, inner in thing.items():
            if name in ("secretKeyRef", "configMapKeyRef"):
                yield name[:3], inner["name"], inner["key"]
            elif name in ("secretRef", "configMapRef"):
                yield name[:3], inner["name"], None
            elif name in ("secret", "configMap") and isinstance(inner, dict):
                for item in inner.get("items", [{"key": None}]):
                    yield name[:3], inner.get("secretName") or inner["name"], item["key"]
            else:
                yield from references(inner)


def test_every_secret_and_config_map_that_is_named_is_there(objects):
    made = {
        (kind[:3].lower(), o["metadata"]["name"]): o.get("data", {})
        for kind in ("Secret", "ConfigMap")
        for o in of_kind(objects, kind)
    }
    # Kubernetes's own, in every namespace; and the one that docs and the kustomization tell how to make.
    made |= {("con", "kube-root-ca.crt"): {"ca.crt"}, ("sec", "train-keys"): {}}
    named_here = set(references(objects))
    assert named_here
    for kind, name, key in named_here:
        assert (kind, name) in made
        assert key is None or key in made[kind, name]


def test_only_the_autoscaler_may_talk_to_kubernetes(objects):
    accounts = {o["metadata"]["name"]: o for o in of_kind(objects, "ServiceAccount")}
    for kind, group in ray_groups(objects):
        spec = group["template"]["spec"]
        account = spec.get("serviceAccountName")
        assert account is None or accounts[account]["automountServiceAccountToken"] is False
        tokens = [v["name"] for v in spec["volumes"] if "serviceAccountToken" in json.dumps(v)]
        assert not {m["name"] for c in containers(group["template"]) for m in c["volumeMounts"]} & set(tokens)
        if kind == "head" and cluster_of(objects).get("enableInTreeAutoscaling"):
            mounts = {m["name"]: m["mountPath"] for m in cluster_of(objects)["autoscalerOptions"]["volumeMounts"]}
            assert mounts[tokens[0]] == "/var/run/secrets/kubernetes.io/serviceaccount"
            assert set(mounts.values()) >= {"/tmp", "/home/tuneyard"}
        else:
            assert tokens == []


def selects(selector, labels):
    assert set(selector) <= {"matchLabels"}
    return selector.get("matchLabels", {}).items() <= labels.items()


def peers(rules, port, pod, namespace, address, way):
    """Whether one of the rules lets this peer through: a pod of a namespace (None: the policy's own), or an address."""
    for rule in rules:
        ports = rule.get("ports")
        if ports is not None and port not in {entry["port"] for entry in ports}:
            continue
        for peer in rule[way]:
            if "ipBlock" in peer:
                block = peer["ipBlock"]
                inside = address and address in ipaddress.ip_network(block["cidr"])
                if inside and not any(address in ipaddress.ip_network(cut) for cut in block.get("except", ())):
                    return True
            elif address is None:
                inside = selects(peer["namespaceSelector"], namespace or {}) if "namespaceSelector" in peer else namespace is None
                if inside and selects(peer.get("podSelector", {}), pod):
                    return True
    return False


def allowed(objects, target, port, *, pod=None, namespace=None, address=None, way="from"):
    """Whether the policies let this peer reach (or, way "to", be reached from) the pod with the labels `target`."""
    kind = {"from": "ingress", "to": "egress"}[way]
    bound = [p["spec"] for p in of_kind(objects, "NetworkPolicy") if selects(p["spec"]["podSelector"], target)]
    assert all(p["policyTypes"] == ["Ingress", "Egress"] for p in bound)
    assert bound, "a pod without a policy is open"
    address = address and ipaddress.ip_address(address)
    return any(peers(p.get(kind, ()), port, pod or {}, namespace, address, way) for p in bound)


def test_ray_s_ports_are_open_to_its_own_pods_and_the_operator_only(objects):
    own = [labels for labels, _ in pods(objects) if "ray.io/node-type" in labels]
    head = next(labels for labels in own if labels["ray.io/node-type"] == "head")
    operator = {"app.kubernetes.io/component": "kuberay-operator"}
    kuberay = {"kubernetes.io/metadata.name": "kuberay"}
    elsewhere = {"kubernetes.io/metadata.name": "elsewhere"}
    # KubeRay puts this name on every pod of every Ray cluster.
    ray_of_others = {"ray.io/is-ray-node": "yes", "app.kubernetes.io/name": "kuberay", **operator}
    for target in own:
        for port in (GCS, DASHBOARD, CLIENT, AGENT, METRICS, 12345):
            assert all(allowed(objects, target, port, pod=labels) for labels in own)
            assert not allowed(objects, target, port, pod={"app": "stranger"})
            assert not allowed(objects, target, port, pod=ray_of_others, namespace=elsewhere)
            assert not allowed(objects, target, port, pod=head, namespace=elsewhere)
    assert allowed(objects, head, DASHBOARD, pod=operator, namespace=kuberay)
    assert not allowed(objects, head, GCS, pod=operator, namespace=kuberay)
    assert not allowed(objects, head, CLIENT, pod=operator, namespace=kuberay)


def test_users_reach_serve_s_port_of_the_head_and_nothing_else(rendered):
    objects = rendered["overlays/gpu"]
    by_type = {labels["ray.io/node-type"]: labels for labels, _ in pods(objects)}
    before, prometheus = {"tuneyard-ingress": "allowed"}, {"tuneyard-metrics": "allowed"}
    reached = {
        (who, kind, port)
        for who, namespace in (("before", before), ("prometheus", prometheus), ("operator", {"kubernetes.io/metadata.name": "x"}))
        for kind, labels in by_type.items()
        for port in (GCS, DASHBOARD, CLIENT, AGENT, METRICS, SERVE)
        if allowed(objects, labels, port, pod={"app": "any"}, namespace=namespace)
    }
    assert reached == {("before", "head", SERVE), ("prometheus", "head", METRICS), ("prometheus", "worker", METRICS)}


def test_ray_s_pods_reach_what_they_need_and_no_more(rendered):
    objects = rendered["overlays/gpu"]
    by_type = {labels["ray.io/node-type"]: labels for labels, _ in pods(objects)}
    far, metadata = "203.0.113.7", "169.254.169.254"
    open_ports = {
        (kind, port)
        for kind, labels in by_type.items()
        for port in (22, 80, 443, 5432, 6379, 6443, 8000)
        if allowed(objects, labels, port, address=far, way="to")
    }
    assert open_ports == {("head", 443), ("head", 5432), ("head", 6379), ("head", 6443), ("worker", 443)}
    dns = {"pod": {"k8s-app": "kube-dns"}, "namespace": {"kubernetes.io/metadata.name": "kube-system"}}
    for labels in by_type.values():
        assert not any(allowed(objects, labels, port, address=metadata, way="to") for port in (80, 443))
        assert allowed(objects, labels, 53, way="to", **dns)
        assert all(allowed(objects, labels, GCS, pod=other, way="to") for other in by_type.values())


def test_a_try_out_s_pods_reach_what_stands_beside_them(rendered):
    objects = rendered["overlays/cpu"]
    ray = [(labels, template) for labels, template in pods(objects) if "ray.io/node-type" in labels]
    settings = named(objects, "ConfigMap", "tuneyard-settings")["data"]
    for service in of_kind(objects, "Service"):
        (port,) = service["spec"]["ports"]
        ((_, template),) = [p for p in pods(objects) if service["spec"]["selector"].items() <= p[0].items()]
        assert [{"containerPort": port["port"]}] == [
            {"containerPort": p["containerPort"]} for p in template["spec"]["containers"][0]["ports"]
        ]
        if service["metadata"]["name"] == "s3":
            beside = template["metadata"]["labels"]
            assert all(allowed(objects, labels, port["port"], pod=beside, way="to") for labels, _ in ray)
    assert settings["TUNEYARD_STORAGE_ENDPOINT_URL"] == "http://s3:8333"
    fault_tolerance = cluster_of(objects)["gcsFaultToleranceOptions"]
    assert get_address(fault_tolerance["redisAddress"]) == ("redis", "6379", False)


def test_only_the_head_is_behind_the_service(rendered):
    for place in PLACES[:2]:
        objects = rendered[place]
        service = service_of(objects)["spec"]["serveService"]
        (port,) = service["spec"]["ports"]
        # KubeRay takes the ports so named from the head's container; a pod without a port of this name gets no traffic.
        assert port == {"name": "serve", "port": SERVE, "targetPort": "serve"}
        serving = [
            kind
            for kind, group in ray_groups(objects)
            if "serve" in json.dumps(group["template"]["spec"]["containers"][0].get("ports"))
        ]
        assert serving == ["head"]
    ingress = named(rendered["overlays/gpu"], "Ingress", "tuneyard")["spec"]
    backend = ingress["rules"][0]["http"]["paths"][0]["backend"]["service"]
    assert backend == {"name": service["metadata"]["name"], "port": {"name": port["name"]}}
    assert ingress["tls"][0]["hosts"] == [ingress["rules"][0]["host"]]


def test_a_budget_keeps_the_head_and_lets_workers_go(rendered):
    for place in PLACES[:2]:
        (budget,) = of_kind(rendered[place], "PodDisruptionBudget")
        kept = [labels for labels, _ in pods(rendered[place]) if selects(budget["spec"]["selector"], labels)]
        assert [labels["ray.io/node-type"] for labels in kept] == ["head"]
        assert budget["spec"]["minAvailable"] == 1


def test_probes_ask_ray_and_leave_it_time_to_start(rendered):
    assert "/api/healthz" in PUBLIC_EXACT_PATHS  # for which Ray asks no token
    for place in PLACES[:2]:
        for _, group in ray_groups(rendered[place]):
            container = group["template"]["spec"]["containers"][0]
            for name in ("startupProbe", "livenessProbe", "readinessProbe"):
                assert container[name]["httpGet"] == {"path": "/api/healthz", "port": AGENT}
            startup = container["startupProbe"]
            assert startup["periodSeconds"] * startup["failureThreshold"] >= 300


def test_a_pod_that_goes_tells_ray_and_leaves_a_run_time_to_save(objects):
    for kind, group in ray_groups(objects):
        if kind == "head":
            continue
        spec = group["template"]["spec"]
        *_, script = spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        drain, sleep = (shlex.split(part) for part in script.split(";"))
        assert drain[:2] == ["ray", "drain-node"]
        with ray_cli.commands["drain-node"].make_context("drain-node", drain[2:]) as context:
            assert context.params["reason"] == "DRAIN_NODE_REASON_PREEMPTION"
            deadline = context.params["deadline_remaining_seconds"]
        assert sleep == ["sleep", str(deadline)]
        assert 60 <= deadline <= spec["terminationGracePeriodSeconds"] - 10


def test_the_schema_is_brought_up_to_date_before_the_head_starts(rendered):
    for place in PLACES[:2]:
        spec = cluster_of(rendered[place])["headGroupSpec"]["template"]["spec"]
        (migrate,) = spec["initContainers"]
        assert migrate["image"] == spec["containers"][0]["image"]
        command, *words = migrate["command"]
        assert command == "tuneyard"
        found = typer.main.get_command(app)
        for word in words:
            found = found.commands[word]
        assert found.name == "upgrade"


def test_images_are_of_one_version(objects):
    images = {c["image"] for _, group in ray_groups(objects) for c in containers(group["template"])}
    assert images in ({f"registry.example.com/tuneyard:{VERSION}-cuda"}, {"tuneyard:cpu"})
