"""What a sharded model is on each of its workers."""

import pytest

from tests.conftest import TINY
from tests.train_loop.group import on_workers
from train_loop.sharding import is_sharded
from train_loop.spec import JobSpec
from train_loop.trainee import load_trainee
from train_loop.weights import gathered

FULL = {"train_config.train_type": "full", "model_details.quantization": None}
WHAT = {"lora": {"model_details.quantization": None}, "nf4": {}, "full": FULL}


@pytest.mark.parametrize("what", WHAT)
def test_each_worker_keeps_its_slice_and_only_the_first_what_is_gathered(what, local_job, tmp_path, mirror):
    changes = {"train_config.distributed.type": "fsdp", "infra_config": {"gpu_type": "cpu", "gpu_count": 2}}
    on_workers("tests.train_loop.test_sharding:look", tmp_path, 2, mirror / TINY, local_job(changes | WHAT[what]))


def look(ctx, job):
    model = load_trainee(JobSpec.model_validate(job), ctx).model
    parameters = list(model.parameters())
    assert all(is_sharded(p) for p in parameters)
    mine, all_of_it = sum(p.to_local().numel() for p in parameters), sum(p.numel() for p in parameters)
    assert 0.4 * all_of_it < mine < 0.6 * all_of_it, (mine, all_of_it)

    trained = gathered(model, keep=ctx.rank == 0)
    sizes = {p.numel() for p in trained.values()}
    assert sum(t.numel() for t in trained.values()) > 0 if ctx.rank == 0 else sizes == {0}
