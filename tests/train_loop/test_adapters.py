"""What adapter_config says is what is trained, and what is saved or merged computes what was trained."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import TINY
from tests.train_loop.models import run, samples
from train_loop import weights
from train_loop.data.packing import collate
from train_loop.errors import ModelError
from train_loop.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from train_loop.loss import supervised_loss
from train_loop.model.adapters import add_adapter, parameter_groups
from train_loop.model.load import load_base
from train_loop.model.merge import write_merged
from train_loop.model.source import ModelPlaces, model_folder
from train_loop.optim import build_optimizer, set_learning_rate
from train_loop.spec import JobSpec

CPU = torch.device("cpu")
ADAPTER = "train_config.adapter_config"
FLOAT = {"model_details.quantization": None}
NF4 = {"model_details.quantization": {"quant_bits": 4}}
INT8 = {"model_details.quantization": {"quant_bits": 8}}
FP4 = {"model_details.quantization": {"quant_bits": 4, "quant_type": "fp4", "double_quant": False}}


@pytest.fixture
def spec_of(local_job):
    def make(changes, base="tuneyard/smollm"):
        usual = {"model_details.base_model": base, f"{ADAPTER}.dropout": 0.0, f"{ADAPTER}.r": 4, f"{ADAPTER}.alpha": 8}
        return JobSpec.model_validate(local_job({"train_config.torch_dtype": "float32"} | usual | changes))

    return make


def load(spec, bases):
    return load_base(spec, model_folder(spec.model_details, ModelPlaces(str(bases))), CPU).model


def batch_of(tokenizer):
    return collate(samples(tokenizer), capacity=128, pad_id=0)


def train(model, spec, batch, steps=3):
    """A few optimizer steps, as the loop takes them; the losses."""
    optimizer = build_optimizer(parameter_groups(model, spec.train_config), spec.train_config.hyperparameters)
    losses = []
    for _ in range(steps):
        loss = supervised_loss(model.train(), batch) / batch.num_supervised
        loss.backward()
        set_learning_rate(optimizer, 0.01)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


@torch.no_grad()
def logits(model, batch):
    return model.eval()(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits.float()


def dequantised(spec, bases):
    """The base in float32, with the numbers that its quantised layers stand for."""
    from peft.utils.integrations import dequantize_module_weight

    details = spec.model_details
    plain = load(spec.model_copy(update={"model_details": details.model_copy(update={"quantization": None})}), bases)
    quantised = dict(load(spec, bases).named_modules())
    with torch.no_grad():
        for name, layer in plain.named_modules():
            if type(quantised[name]) is not type(layer):
                layer.weight.copy_(dequantize_module_weight(quantised[name]))
    return plain


def plain_peft(spec, bases, folder):
    """The saved adapter on the original base, as anyone would load it."""
    from peft import PeftModel

    return PeftModel.from_pretrained(load(spec, bases), folder)


MAKES = {
    "lora": {},
    "rslora": {f"{ADAPTER}.use_rslora": True},
    "dora": {f"{ADAPTER}.use_dora": True},
    "pissa": {f"{ADAPTER}.init": "pissa"},
    "pissa rslora dora": {f"{ADAPTER}.init": "pissa", f"{ADAPTER}.use_rslora": True, f"{ADAPTER}.use_dora": True},
    "loftq": {f"{ADAPTER}.init": "loftq"},
    "loftq dora": {f"{ADAPTER}.init": "loftq", f"{ADAPTER}.use_dora": True},
    "tied ends": {f"{ADAPTER}.modules_to_save": ["embed_tokens", "lm_head"]},
    "head": {f"{ADAPTER}.modules_to_save": ["lm_head"]},
    "embeddings of a tied base": {f"{ADAPTER}.targets": ["embed_tokens", "q_proj"]},
    "experts": {f"{ADAPTER}.targets": ["q_proj", "experts.gate_up_proj", "experts.down_proj"]},
}


@pytest.mark.parametrize(
    ("make", "base"),
    [(m, FLOAT) for m in MAKES if "loftq" not in m]
    + [(m, NF4) for m in MAKES if m not in ("rslora", "head", "experts", "embeddings of a tied base")]
    + [("lora", INT8), ("dora", INT8), ("lora", FP4)],
)
def test_saved_and_merged_adapters_compute_what_was_trained(make, base, spec_of, bases, tokenizer, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    spec_base = "tuneyard/qwen3_moe" if make == "experts" else "tuneyard/smollm"
    spec = spec_of(base | MAKES[make], spec_base)
    model, batch = add_adapter(load(spec, bases), spec), batch_of(tokenizer)
    start = logits(model, batch)
    train(model, spec, batch)
    ours = logits(model, batch)
    assert (ours - start).abs().max() > 0.1

    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    names = load_file(tmp_path / "adapter/adapter_model.safetensors")
    of_modules = re.compile(r"base_model\.model\.(.+?)\.(lora_[AB]\.weight|lora_embedding_[AB]|lora_magnitude_vector|weight)")
    found = {name: of_modules.fullmatch(name) for name in names}
    assert all(found.values()), "what servers of adapters look for: " + str(names.keys() - {n for n, m in found.items() if m})
    modules = {name for name, _ in load(spec, bases).named_modules()}
    assert {m[1].removesuffix(".base_layer") for m in found.values()} <= modules
    theirs = plain_peft(spec, bases, tmp_path / "adapter")
    torch.testing.assert_close(logits(theirs, batch), ours, rtol=1e-4, atol=1e-4)
    if base is NF4 and make == "lora":
        # PEFT's own merge rounds the sum to 4 bits again: it loses by that what ours doesn't.
        again = logits(plain_peft(spec, bases, tmp_path / "adapter").merge_and_unload(), batch)
        lost_by_peft = (again - ours).abs().max()
    if base is FLOAT and make != "embeddings of a tied base":  # PEFT adds what the embeddings learned to the head too
        torch.testing.assert_close(logits(theirs.merge_and_unload(), batch), ours, rtol=1e-3, atol=1e-3)

    write_merged(tmp_path / "merged", spec, model, tokenizer, tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    if base is NF4 and make == "lora":
        assert (logits(whole, batch) - ours).abs().max() < 0.1 * lost_by_peft
    assert whole.config.tie_word_embeddings == (make != "embeddings of a tied base" and spec_base != "tuneyard/qwen3_moe")
    if base is INT8:  # LLM.int8() rounds activations too, which the merged model doesn't
        ours = logits(PeftModel.from_pretrained(dequantised(spec, bases), tmp_path / "adapter"), batch)
    torch.testing.assert_close(logits(whole, batch), ours, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("make", MAKES)
def test_an_adapter_is_written_as_peft_writes_it(make, spec_of, bases, tmp_path):
    spec_base = "tuneyard/qwen3_moe" if make == "experts" else "tuneyard/smollm"
    spec = spec_of((NF4 if "loftq" in make else FLOAT) | MAKES[make], spec_base)
    model = add_adapter(load(spec, bases), spec)
    tensors = weights.handed_out(model, keep=True)
    (tmp_path / "ours").mkdir()
    weights.FileFormat.of(model).write(tmp_path / "ours", tensors)
    model.save_pretrained(tmp_path / "theirs", state_dict=tensors, save_embedding_layers=False)
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()


def test_pissa_trains_what_pefts_own_does(spec_of, bases, tokenizer):
    from peft import get_peft_model

    from train_loop.model.adapters import lora_config

    spec, batch = spec_of(FLOAT | {f"{ADAPTER}.init": "pissa"}), batch_of(tokenizer)
    config = lora_config(spec.train_config.adapter_config, load(spec, bases), "tuneyard/smollm")
    config.r, config.lora_alpha, config.init_lora_weights = 4, 8, "pissa"
    theirs = get_peft_model(load(spec, bases), config)
    ours = add_adapter(load(spec, bases), spec)
    assert train(ours, spec, batch, 4) == pytest.approx(train(theirs, spec, batch, 4), rel=1e-4)
    torch.testing.assert_close(logits(ours, batch), logits(theirs, batch), rtol=1e-3, atol=1e-3)


def test_pissa_starts_at_the_base_and_trains_one_half_of_its_ranks(spec_of, bases, tokenizer):
    spec, batch = spec_of(NF4 | {f"{ADAPTER}.init": "pissa"}), batch_of(tokenizer)
    base = load(spec, bases)
    before = logits(base, batch)
    model = add_adapter(base, spec)
    torch.testing.assert_close(logits(model, batch), before, rtol=1e-4, atol=1e-4)
    a = next(p for n, p in model.named_parameters() if "lora_A" in n)
    start = a.detach().clone()
    train(model, spec, batch)
    assert not torch.equal(a[:4], start[:4])
    assert torch.equal(a[4:], start[4:])


@pytest.mark.parametrize("base", [NF4, INT8])
def test_loftq_starts_nearer_to_the_unquantised_base(base, spec_of, bases, tokenizer):
    batch = batch_of(tokenizer)
    exact = logits(load(spec_of(FLOAT), bases), batch)
    spec = spec_of(base | {f"{ADAPTER}.init": "loftq", f"{ADAPTER}.r": 16})
    model = add_adapter(load(spec, bases), spec)
    with model.disable_adapter():
        lost = (logits(model, batch) - exact).norm()
    assert (logits(model, batch) - exact).norm() < 0.8 * lost


def test_gaussian_init_draws_a_normal_with_the_rank_as_its_width(spec_of, bases):
    def a_of(init):
        model = add_adapter(load(spec := spec_of(FLOAT | {f"{ADAPTER}.init": init, f"{ADAPTER}.r": 8}), bases), spec)
        return torch.cat([p.flatten() for n, p in model.named_parameters() if "lora_A" in n])

    assert a_of("gaussian").std().item() == pytest.approx(1 / 8, rel=0.1)
    assert a_of("gaussian").abs().max() > 3 / 8  # a uniform has no tail
    assert a_of("default").abs().max() < 2.5 * a_of("default").std()


def test_lora_plus_trains_b_faster_and_nothing_else(spec_of, bases, tokenizer):
    batch = batch_of(tokenizer)

    def moved(ratio):
        spec = spec_of(FLOAT | {f"{ADAPTER}.lora_plus_ratio": ratio})
        model = add_adapter(load(spec, bases), spec)
        start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        train(model, spec, batch, 1)
        return {n: (p - start[n]).abs().max().item() for n, p in model.named_parameters() if n in start}

    plain, plus = moved(None), moved(8.0)
    for name, distance in plus.items():
        assert distance == pytest.approx(plain[name] * (8 if "lora_B" in name else 1), rel=1e-4, abs=1e-9)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({f"{ADAPTER}.targets": ["q_proj", "v_prjo"]}, "no layer is named v_prjo"),
        ({f"{ADAPTER}.targets": ["q_proj", "lm_head"]}, "train it whole by modules_to_save"),
        ({f"{ADAPTER}.modules_to_save": ["nothing"]}, "modules_to_save names no module"),
        (NF4 | {f"{ADAPTER}.modules_to_save": ["q_proj"]}, "quantised module"),
        ({f"{ADAPTER}.targets": ["input_layernorm"]}, "the adapter doesn't fit"),
    ],
)
def test_what_does_not_fit_the_model_is_said(changes, said, spec_of, bases):
    spec = spec_of(FLOAT | changes)
    with pytest.raises(ModelError, match=said):
        add_adapter(load(spec, bases), spec)


@pytest.mark.parametrize("base", ["smollm", "qwen3_moe"])
def test_modules_to_save_are_named_in_whole_parts(base, spec_of, bases):
    spec = spec_of(FLOAT | {f"{ADAPTER}.modules_to_save": ["norm"]}, f"tuneyard/{base}")
    model = add_adapter(load(spec, bases), spec)
    learns = {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}
    assert learns == {"base_model.model.model.norm.modules_to_save.default.weight"}  # and no input_layernorm


def test_experts_take_an_adapter_when_named_but_not_with_dropout(spec_of, bases):
    spec = spec_of(FLOAT | MAKES["experts"] | {f"{ADAPTER}.dropout": 0.1}, "tuneyard/qwen3_moe")
    with pytest.raises(ModelError, match="lora_dropout"):
        add_adapter(load(spec, bases), spec)
    everything = add_adapter(load(spec := spec_of(FLOAT, "tuneyard/qwen3_moe"), bases), spec)
    assert {n.split(".")[-4] for n, p in everything.named_parameters() if p.requires_grad} == {
        *("q_proj", "k_proj", "v_proj", "o_proj"),
    }


def test_every_setting_of_quantisation_gives_other_weights(spec_of, bases):
    from peft.utils.integrations import dequantize_module_weight

    def weight(**settings):
        model = load(spec_of({"model_details.quantization": settings}), bases)
        layer = model.model.layers[0].mlp.down_proj
        return dequantize_module_weight(layer).float(), getattr(layer.weight, "quant_state", None)

    exact = load(spec_of(FLOAT), bases).model.layers[0].mlp.down_proj.weight
    (nf4, nested), (fp4, _), (single, plain), (int8, none) = (
        weight(quant_bits=4),
        weight(quant_bits=4, quant_type="fp4"),
        weight(quant_bits=4, double_quant=False),
        weight(quant_bits=8),
    )
    assert (nested.quant_type, nested.nested, plain.nested, none) == ("nf4", True, False, None)
    error = {name: (w - exact).norm().item() for name, w in (("nf4", nf4), ("fp4", fp4), ("single", single), ("int8", int8))}
    assert error["int8"] < 0.2 * error["nf4"]
    assert error["single"] != error["nf4"]
    assert error["nf4"] < error["fp4"]  # on normal weights, for which nf4 is made


def test_training_goes_on_from_the_adapter_of_another_job(local_job, tmp_path, bases):
    usual = {
        "model_details.base_model": "tuneyard/smollm",
        f"{ADAPTER}.r": 4,
        "train_config.hyperparameters.max_steps": 2,
        "train_config.torch_dtype": "float32",
        "dataset_config.split.ratios": [0.5, 0.5],
    }
    first = run(local_job(usual, 12), tmp_path, bases, "first")
    told = json.loads((tmp_path / "first/adapter/adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == "tuneyard/smollm"
    for name in ("first", str(tmp_path / "first/adapter")):
        again = run(local_job(usual | {f"{ADAPTER}.init_from": name}, 12), tmp_path, bases, f"again-{name[-5:]}")
        assert again["metrics"]["eval_loss_before"] == pytest.approx(first["metrics"]["eval_loss_after"], rel=1e-6)
    for changes, said in (
        ({f"{ADAPTER}.r": 8}, "adapter with r 4"),
        ({f"{ADAPTER}.alpha": 32}, "adapter with alpha 16"),
        ({f"{ADAPTER}.use_rslora": True}, "adapter with use_rslora False"),
        ({f"{ADAPTER}.use_dora": True}, "adapter with use_dora False"),
        ({f"{ADAPTER}.targets": ["q_proj"]}, "other layers"),
        ({"model_details.base_model": TINY}, "adapter of tuneyard/smollm"),
        ({f"{ADAPTER}.init_from": "nothing"}, "there is no adapter"),
    ):
        job = local_job(usual | {f"{ADAPTER}.init_from": "first"} | changes, 12)
        mirror = tmp_path / "both"
        mirror.mkdir(exist_ok=True)
        with pytest.raises(ModelError, match=said):
            run(job, tmp_path, bases if changes.get("model_details.base_model") is None else _with_tiny(mirror, bases), "no")


def _with_tiny(mirror, bases):
    """A mirror with the tied model under the tiny one's name."""
    import shutil

    shutil.copytree(bases / "tuneyard/smollm", mirror / TINY)
    return mirror
