"""Every architecture that is promised, with tiny random weights: all-linear, isolation of packed rows, the loop, plain PEFT."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.train_loop.models import ARCHITECTURES, SIZES, config_of, make_base, random_model, run, samples
from train_loop.data.packing import NO_LIMIT, collate
from train_loop.data.tokenize import Sample
from train_loop.errors import ModelError
from train_loop.loss import keeps_documents_apart, supervised_loss
from train_loop.model.adapters import linear_layers, trainable
from train_loop.model.attention import attend_by_document
from train_loop.model.load import BaseModel, load_base
from train_loop.model.tokenizer import load_tokenizer
from train_loop.spec import JobSpec
from train_loop.trainee import make_trainable, row_capacity

ADAPTER, PRE = "train_config.adapter_config", "dataset_config.preprocessing"
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}
LINEAR = {
    "qwen3_moe": ATTENTION,
    "phi3": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
    "falcon": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
}


def plain(folder, adapter=None):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return (base if adapter is None else PeftModel.from_pretrained(base, adapter)).eval()


def eval_loss(model, tokenizer, job, manifest):
    """Of the run's own eval rows, from plain logits, one row at a time."""
    from train_loop.data.formats import to_conversation
    from train_loop.data.tokenize import ChatTokenizer

    chat = ChatTokenizer.of(JobSpec.model_validate(job), tokenizer)
    lines = Path(job["dataset_details"]["dataset_path"]).read_text().splitlines()
    total = count = 0
    for number in manifest["dataset"]["eval_lines"]:
        sample = chat.encode(to_conversation(json.loads(lines[number - 1]), "sharegpt"))
        labels = torch.tensor(sample.labels[1:]).long()
        with torch.no_grad():
            logits = model(input_ids=torch.tensor(sample.input_ids).long()[None]).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        count += int((labels >= 0).sum())
    return total / count


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_trains_in_isolation_and_plain_peft_has_the_same_loss(name, local_job, tmp_path, tokenizer):
    mirror = tmp_path / "mirror"
    base_model = make_base(name, mirror, tokenizer)
    model = plain(mirror / base_model)
    assert {n.rpartition(".")[2] for n in linear_layers(model)} == LINEAR.get(name, ATTENTION | MLP)

    batch = samples(tokenizer, (3, 9, 30))  # the longest is past the window of those that have one
    with torch.no_grad():
        packed, padded = (supervised_loss(model, collate(batch, capacity=capacity, pad_id=0)).item() for capacity in (128, None))
        alone = sum(supervised_loss(model, collate([s], capacity=None, pad_id=0)).item() for s in batch)
    assert padded == pytest.approx(alone, rel=1e-5)
    # What can't keep packed documents apart must be found out, so that it isn't packed.
    assert keeps_documents_apart(model) == (packed == pytest.approx(alone, rel=1e-5)) == (name != "falcon")

    changes = {
        "model_details": {"base_model": base_model},
        "train_config.torch_dtype": "float32",
        "train_config.hyperparameters.max_steps": 2,
        "train_config.adapter_config.r": 4,
    }
    job = local_job(changes, num_rows=20)
    manifest = run(job, tmp_path, mirror)
    adapter = tmp_path / "run/adapter"
    assert not any("lm_head" in n or "router" in n or ".gate." in n for n in load_file(adapter / "adapter_model.safetensors"))
    metrics = manifest["metrics"]
    assert metrics["eval_loss_after"] != pytest.approx(metrics["eval_loss_before"], abs=1e-3)
    theirs = eval_loss(plain(mirror / base_model, adapter), load_tokenizer(adapter), job, manifest)
    assert theirs == pytest.approx(metrics["eval_loss_after"], rel=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_all_samples_in_one_row_give_the_gradients_of_each_in_its_own(name, local_job):
    model = random_model(config_of(name, 200))
    attend_by_document(model)
    changes = {"model_details.quantization": None, f"{ADAPTER}.dropout": 0.0, f"{ADAPTER}.r": 4, f"{PRE}.prompt.max_length": 64}
    spec, base = JobSpec.model_validate(local_job(changes)), BaseModel(model, torch.float32, "")
    # Gemma 2 bends attention as torch's kernels don't: transformers computes it with a mask.
    assert row_capacity(spec, base) == {"falcon": None, "gemma2": 64}.get(name, NO_LIMIT)
    if name == "falcon":
        return
    model = make_trainable(base, spec).train()
    for p in trainable(model):
        torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(p.numel()))
    drawn = np.random.default_rng(0).integers(3, 200, (2, 190)).astype(np.int32)
    labels = np.where(drawn[1] % 2, drawn[0], -100)
    of = [Sample(drawn[0, a:b], labels[a:b]) for a, b in itertools.pairwise([0, 1, 12, 14, 76, 101, 126, 190])]

    def step(capacity):
        batch = collate(of, capacity=capacity, pad_id=0)
        loss = supervised_loss(model, batch)
        loss.backward()
        gradients = [p.grad for p in trainable(model)]
        model.zero_grad()
        return batch.input_ids.shape, [loss.detach(), *gradients]

    (shape, joined), (_, packed), (_, padded) = (step(capacity) for capacity in (NO_LIMIT, 64, None))
    assert shape == (1, 190), "no padding"
    assert min(g.abs().max() for g in joined) > 1e-2
    for mine, *others in zip(joined, packed, padded, strict=True):
        for other in others:
            assert (mine - other).abs().max() < 1e-5 * other.abs().max()


@pytest.mark.parametrize(
    ("kind", "router", "sizes"),
    [
        ("Qwen2Moe", "shared_expert_gate", {"shared_expert_intermediate_size": 16, "decoder_sparse_step": 1}),
        ("Afmoe", "gate", {"num_dense_layers": 1}),
    ],
)
def test_all_linear_leaves_routers_as_they_are_also_where_they_are_layers(kind, router, sizes):
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = getattr(transformers, f"{kind}Config")(vocab_size=64, **SIZES, **experts, **sizes)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert {name.rpartition(".")[2] for name in linear - linear_layers(model).keys()} == {router, "lm_head"}


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
        (
            "Jamba",
            {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "attn_layer_period": 2,
                "attn_layer_offset": 1,
                "num_experts": 2,
                "mamba_d_state": 8,
            },
        ),
    ],
)
def test_what_leaks_a_little_between_documents_is_found_out_too(kind, sizes):
    """Small random weights leak little: attention that doesn't go by positions, and a state that goes on over them."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(vocab_size=64, pad_token_id=0, **sizes)
    assert not keeps_documents_apart(transformers.AutoModelForCausalLM.from_config(config).eval())


@pytest.mark.parametrize("bits", [4, 8])
def test_a_model_whose_layers_stay_as_they_are_is_not_called_quantised(bits, local_job, tmp_path, tokenizer):
    base_model = make_base("falcon", tmp_path, tokenizer)
    spec = JobSpec.model_validate(local_job({"model_details": {"base_model": base_model, "quantization": {"quant_bits": bits}}}))
    with pytest.raises(ModelError, match=r"\(falcon\) can be quantised: leave quantization out") as caught:
        load_base(spec, tmp_path / base_model, torch.device("cpu"))
    assert caught.value.field == "model_details.quantization"
