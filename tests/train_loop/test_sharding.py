"""What a sharded model is on each of its workers."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import TINY
from tests.train_loop.group import on_workers
from tests.train_loop.models import ARCHITECTURES, VISION, make_base, samples
from train_loop.data.packing import collate
from train_loop.loss import supervised_loss
from train_loop.model.adapters import add_adapter, trainable
from train_loop.model.load import META, load_base
from train_loop.model.mirror import SMOLLM2
from train_loop.model.tokenizer import load_tokenizer
from train_loop.sharding import is_sharded, whole
from train_loop.spec import JobSpec
from train_loop.trainee import load_trainee, load_whole
from train_loop.weights import handed_out

FULL = {"train_config.train_type": "full", "model_details.quantization": None}
WHAT = {"lora": {"model_details.quantization": None}, "nf4": {}, "full": FULL}


@pytest.mark.parametrize("what", WHAT)
def test_each_worker_keeps_its_slice_and_only_the_first_what_is_gathered(what, local_job, tmp_path, mirror):
    changes = {"train_config.distributed.type": "fsdp", "infra_config": {"gpu_type": "cpu", "gpu_count": 2}}
    job = local_job(changes | WHAT[what])
    if what != "full":
        spec = JobSpec.model_validate(job)
        before = add_adapter(load_base(spec, mirror / TINY, torch.device("cpu")).model, spec)
        for parameter in trainable(before):
            torch.nn.init.normal_(parameter)
        before.save_pretrained(tmp_path / "start")
    on_workers("tests.train_loop.test_sharding:look", tmp_path, 2, mirror / TINY, job)


def look(ctx, job):
    spec = JobSpec.model_validate(job)
    start = Path(ctx.run_path) / "start"
    trainee = load_trainee(spec, dataclasses.replace(ctx, start=start if start.exists() else None))
    model = trainee.model
    parameters = list(model.parameters())
    assert all(is_sharded(p) for p in parameters)
    mine, all_of_it = sum(p.to_local().numel() for p in parameters), sum(p.numel() for p in parameters)
    assert 0.4 * all_of_it < mine < 0.6 * all_of_it, (mine, all_of_it)

    trained = handed_out(model, keep=ctx.rank == 0)
    sizes = {p.numel() for p in trained.values()}
    assert sum(t.numel() for t in trained.values()) > 0 if ctx.rank == 0 else sizes == {0}
    if ctx.rank == 0 and start.exists():
        given = load_file(start / "adapter_model.safetensors")
        assert {name.replace(".default", ""): tensor.tolist() for name, tensor in trained.items()} == {
            name: tensor.tolist() for name, tensor in given.items()
        }

    weights = {name: whole(p.detach()) for name, p in model.named_parameters()}
    if ctx.rank == 0 and spec.train_config.train_type == "lora":
        again = dict(load_whole(spec, ctx, trainee, trained).named_parameters())
        assert {p.to_local().untyped_storage().nbytes() for p in parameters} == {0}
        assert again.keys() == weights.keys()
        for name, weight in weights.items():  # of a 4-bit one the codes
            assert torch.equal(weight.view(-1).view(torch.uint8), again[name].data.view(-1).view(torch.uint8)), name


def test_only_the_first_worker_ever_holds_the_whole_base(local_job, tmp_path, mirror):
    changes = {"train_config.distributed.type": "fsdp", "infra_config": {"gpu_type": "cpu", "gpu_count": 2}}
    job = local_job(changes | WHAT["full"] | {"model_details.base_model": SMOLLM2})
    on_workers("tests.train_loop.test_sharding:load_and_weigh", tmp_path, 2, mirror / SMOLLM2, job)


def load_and_weigh(ctx, job):
    spec = JobSpec.model_validate(job)
    load_base(spec, ctx.model_folder, ctx.device, at=META)  # what is imported for it is no weight
    before = peak_bytes()
    model = load_trainee(spec, ctx).model
    grown, whole = peak_bytes() - before, sum(p.numel() for p in model.parameters()) * 4
    assert (grown > whole) == (ctx.rank == 0), (grown, whole)
    # And each has its part of the same weights as anyone who loads them.
    loaded = handed_out(model, keep=True)
    for name, weight in load_base(spec, ctx.model_folder, ctx.device).model.named_parameters():
        assert torch.equal(loaded[name], weight), name


def test_a_model_of_every_architecture_is_itself_after_it_was_dealt_out(local_job, tmp_path, tokenizer):
    changes = {"train_config.distributed.type": "fsdp", "infra_config": {"gpu_type": "cpu", "gpu_count": 2}}
    job = local_job(changes | WHAT["lora"] | {"train_config.torch_dtype": "float32"})
    jobs = [job | {"model_details": {"base_model": make_base(name, tmp_path, tokenizer)}} for name in (*ARCHITECTURES, *VISION)]
    on_workers("tests.train_loop.test_sharding:compare", tmp_path, 2, tmp_path, jobs)


def compare(ctx, jobs):
    for job in jobs:
        spec = JobSpec.model_validate(job)
        folder = ctx.model_folder / spec.model_details.base_model
        plain = load_base(spec, folder, ctx.device).model
        sharded = load_trainee(spec, dataclasses.replace(ctx, model_folder=folder)).model
        batch = collate(samples(load_tokenizer(folder)), capacity=None, pad_id=0)
        with torch.no_grad():
            mine, reference = (float(supervised_loss(model.eval(), batch)) for model in (sharded, plain))
        assert mine == pytest.approx(reference, rel=1e-5), folder.name


def peak_bytes():
    """Not getrusage's, which begins with what the process that started this one had."""
    (peak,) = (line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(peak) << 10
