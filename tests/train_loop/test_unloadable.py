"""A base model that can't be trained as asked ends the job with a ModelError that says why, whatever is wrong with it."""

import json

import pytest
import torch

from tests.train_loop.models import make_base
from train_loop.errors import ModelError
from train_loop.model.load import load_base
from train_loop.model.tokenizer import load_tokenizer
from train_loop.spec import JobSpec

FLOAT = {"model_details.quantization": None}
FULL = FLOAT | {"train_config.train_type": "full"}
GPTQ = {"quant_method": "gptq", "bits": 4}


@pytest.fixture
def folder(tmp_path, tokenizer):
    return tmp_path / make_base("llama", tmp_path, tokenizer)


def load(folder, local_job, changes):
    spec = JobSpec.model_validate(local_job({"model_details.base_model": "tuneyard/llama"} | changes))
    return load_base(spec, folder, torch.device("cpu"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (FLOAT, "can't be loaded: .*(?i:gptq)"),
        (FULL, "is quantised already: train an adapter"),
        ({"model_details.quantization": {"quant_bits": 4}}, "is quantised already: leave quantization out"),
    ],
)
def test_a_base_that_is_quantised_already(folder, local_job, changes, said):
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": GPTQ}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=said) as caught:
        load(folder, local_job, changes)
    assert caught.value.field == "model_details.base_model"


def test_weights_that_were_cut_off(folder, local_job):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ModelError, match="base model tuneyard/llama can't be loaded: "):
        load(folder, local_job, FLOAT)


@pytest.mark.parametrize("text", ["{}", "not JSON", '{"model": {"type": "BPE", "vocab": 1}}'])
def test_a_tokenizer_that_can_not_be_read(folder, text):
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(ModelError, match="the base model's tokenizer can't be loaded: "):
        load_tokenizer(folder)
