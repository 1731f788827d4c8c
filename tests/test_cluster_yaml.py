from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from serve_app.proxy import CALLBACK

CONFIG = yaml.safe_load((Path(__file__).parent.parent / "cluster.yaml").read_text())


def test_ray_accepts_the_cluster_file():
    validate_config(prepare_config(CONFIG))


def test_ray_would_refuse_a_broken_one():
    with pytest.raises(ValueError, match="head_node_type"):
        validate_config(prepare_config(CONFIG | {"head_node_type": "missing"}))


def test_every_node_has_what_stands_before_the_proxy():
    for nodes in ("head", "worker"):
        (start,) = [command for command in CONFIG[f"{nodes}_start_ray_commands"] if " ray start " in command]
        assert all(f"{name}={value} " in start for name, value in CALLBACK.items())
