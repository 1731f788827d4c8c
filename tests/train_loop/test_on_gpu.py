"""What only a GPU can show: its kernels compute what the CPU's do, and its optimizer pages. Skipped where there is none.

The other tests of this folder run on a GPU too, where there is one: a run takes what it finds.
"""

import json

import pytest
import torch

from tests.train_loop.models import ARCHITECTURES, config_of, make_base, save_base
from train_loop.model import attention, layers
from train_loop.model.load import load_base
from train_loop.model.norms import fuse_norms
from train_loop.optim import build_optimizer, page_again
from train_loop.spec import Hyperparameters, JobSpec

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = torch.device("cuda")
HP = "train_config.hyperparameters"
PLAIN = {"train_config.adapter_config.dropout": 0.0, "model_details.quantization": None}


def losses(folder):
    points = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [point["loss"] for point in points if "loss" in point]


@pytest.mark.parametrize("window", [-1, 40])
@pytest.mark.parametrize("lengths", [[5, 1, 130, 164], [5, 1, 130, 164, 300]], ids=["joined", "rows"])
def test_the_flash_kernel_attends_by_document(lengths, window):
    seq, rows = 300, sum(lengths) // 300
    edges = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    edges.longest, edges.window, edges.filled = max(lengths), window, torch.tensor([seq] * rows)
    torch.manual_seed(0)
    tensors = [torch.randn(rows, h, seq, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for h in (4, 2, 2)]
    mine = attention._flash_attention(*tensors, edges, scaling=0.2)
    mask = torch.zeros(rows, 1, seq, seq, dtype=torch.bool, device="cuda")
    for r, spans in enumerate(attention._of_edges(edges, seq)):
        for start, end, sees in spans:
            mask[r, :, start:end, start:end] = torch.ones(end - start, end - start).tril() if sees is None else sees
    query, key, value = (t.float() for t in tensors)
    key, value = (t.repeat_interleave(2, dim=1) for t in (key, value))
    theirs = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.2).transpose(1, 2)
    torch.testing.assert_close(mine.float(), theirs, atol=2e-2, rtol=2e-2)
    for a, b in zip(*(torch.autograd.grad(out.float().square().sum(), tensors) for out in (mine, theirs)), strict=True):
        torch.testing.assert_close(a.float(), b.float(), atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize("width", [16, 20])
def test_heads_of_any_width_are_attended_to(width, local_job, tmp_path, tokenizer):
    """The flash kernel takes multiples of 8."""
    config = config_of("llama", len(tokenizer))
    config.head_dim = width
    base = save_base(config, "llama", tmp_path, tokenizer)
    model = load_base(JobSpec.model_validate(local_job({"model_details.base_model": base} | PLAIN)), tmp_path / base, GPU).model
    ids, positions = torch.arange(3, 43, device=GPU)[None], torch.cat([torch.arange(30), torch.arange(10)])[None].to(GPU)
    with torch.no_grad():
        together = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        apart = torch.cat([model(input_ids=part, use_cache=False).logits for part in (ids[:, :30], ids[:, 30:])], dim=1)
    assert (together - apart).float().square().mean() < 1e-2 * apart.float().square().mean()


def test_an_adapter_drops_what_has_no_gradient():
    torch.manual_seed(0)
    x, a, b, of_y = torch.randn(2000, 64), torch.randn(8, 64), torch.randn(32, 8), torch.randn(2000, 32)
    x, a, b, of_y = (t.cuda().requires_grad_() for t in (x, a, b, of_y))
    dropped, mask, gain, share = layers._dropped(x.detach(), 0.3)
    torch.testing.assert_close(dropped, x * mask / 0.7)
    assert gain / share == pytest.approx(1 / 0.7)
    assert mask.float().mean().item() == pytest.approx(0.7, abs=0.01)

    torch.manual_seed(1)
    y = layers._LoraLinear.apply(x, torch.zeros(32, 64, device="cuda"), None, None, a, b, 1.5, 0.3)
    torch.manual_seed(1)
    plain = 1.5 * layers._dropped(torch.ones_like(x), 0.3)[0] * x @ a.t() @ b.t()
    torch.testing.assert_close(y, plain, atol=1e-4, rtol=1e-4)
    for mine, theirs in zip(*(torch.autograd.grad(out, (x, a, b), of_y) for out in (y, plain)), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("name", "fuses"), [("llama", True), ("qwen3", True), ("gemma2", False)])
def test_norms_are_one_kernel_where_it_computes_the_same(name, fuses, tmp_path, tokenizer):
    from transformers import AutoModelForCausalLM

    folder = tmp_path / make_base(name, tmp_path, tokenizer)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to("cuda").requires_grad_(False)
    norm = model.base_model.layers[0].input_layernorm
    torch.nn.init.normal_(norm.weight)
    x, seen = torch.randn(3, 50, norm.weight.numel(), device="cuda", dtype=torch.bfloat16), []
    for _ in range(2):
        seen.append([y := norm(own := x.clone().requires_grad_()), *torch.autograd.grad(y.float().square().sum(), own)])
        fuse_norms(model)
    for a, b in zip(*seen, strict=True):
        assert (a - b).float().norm() < 1e-2 * b.float().norm()
    assert ("FusedRmsNorm" in str(seen[1][0].grad_fn)) == fuses


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_architecture_computes_on_a_gpu_what_it_does_on_a_cpu(name, local_job, tmp_path, tokenizer):
    """In bf16, with the flash kernel where it can be: documents packed in a row. Rounding may send a token to another expert."""
    base = make_base(name, tmp_path, tokenizer)
    spec = JobSpec.model_validate(local_job({"model_details.base_model": base} | PLAIN))
    exact = JobSpec.model_validate(local_job({"model_details.base_model": base, "train_config.torch_dtype": "float32"} | PLAIN))
    mine, theirs = (load_base(s, tmp_path / base, torch.device(d)).model.eval() for s, d in ((spec, "cuda"), (exact, "cpu")))
    ids, positions = torch.arange(3, 43)[None], torch.cat([torch.arange(30), torch.arange(10)])[None]
    with torch.no_grad():
        a, b = (
            m(input_ids=ids.to(m.device), position_ids=positions.to(m.device), use_cache=False).logits.float().cpu()
            for m in (mine, theirs)
        )
    assert (a - b).square().mean() < 1e-2 * b.square().mean()


@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit", "paged_adamw_8bit"])
def test_every_optimizer_trains_every_kind_of_base(bits, optim, local_job, launch, tmp_path):
    changes = PLAIN | {"model_details.quantization": bits and {"quant_bits": bits}}
    changes |= {f"{HP}.optim": optim, f"{HP}.max_steps": 6, f"{HP}.learning_rate": 0.01, f"{HP}.logging_steps": 1}
    launch(local_job(changes))
    seen = losses(tmp_path / "run")
    assert len(seen) == 6
    assert seen[-1] < seen[0]


def test_paged_steps_are_those_of_the_8_bit_optimizer(local_job, launch, tmp_path):
    for optim in ("adamw_8bit", "paged_adamw_8bit"):
        launch(local_job(PLAIN | {f"{HP}.optim": optim, f"{HP}.max_steps": 6, f"{HP}.logging_steps": 1}), optim)
    assert losses(tmp_path / "adamw_8bit") == pytest.approx(losses(tmp_path / "paged_adamw_8bit"), rel=1e-3)


def test_an_optimizer_pages_after_it_was_loaded_too():
    saved, loaded = (build_optimizer(large_group(), Hyperparameters(optim="paged_adamw_8bit")) for _ in range(2))
    (before,), (after,) = (optimizer.param_groups[0]["params"] for optimizer in (saved, loaded))
    before.grad = torch.randn_like(before)
    saved.step()
    loaded.load_state_dict(saved.state_dict())
    page_again(loaded)
    after.data.copy_(before.data)
    assert loaded.state[after]["state1"].is_paged
    assert loaded.state[after]["state2"].is_paged
    before.grad = after.grad = torch.randn_like(before)
    for optimizer in (saved, loaded):
        optimizer.step()
    assert torch.equal(before, after)


def large_group():
    return [{"params": [torch.nn.Parameter(torch.ones(400, 400, device=GPU))], "lr_factor": 1.0}]


def test_a_run_on_a_gpu_follows_the_one_on_a_cpu(local_job, launch, tmp_path, monkeypatch):
    job = local_job(PLAIN | {"train_config.torch_dtype": "float32", f"{HP}.max_steps": 6, f"{HP}.logging_steps": 1})
    launch(job, "gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    launch(job, "cpu")
    assert losses(tmp_path / "gpu") == pytest.approx(losses(tmp_path / "cpu"), rel=1e-3)
