"""Training teaches: a task that the tiny model can't do, it does after a few dozen steps, however the base is held."""

import itertools

import pytest
import torch

from tests.conftest import write_jsonl
from tests.train_loop.models import make_base, run
from train_loop.data.tokenize import ChatTokenizer
from train_loop.model.load import load_base
from train_loop.model.tokenizer import load_tokenizer
from train_loop.spec import JobSpec

# Which word comes next is told by the one before: chance is 1 in 8.
NEXT = dict(itertools.pairwise(["red", "blue", "green", "black", "white", "brown", "pink", "gold", "red"]))
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}:{% endif %}{% endfor %}"
)
HP = "train_config.hyperparameters"
HELD = {
    "lora": {"model_details.quantization": None},
    "qlora-4": {"model_details.quantization": {"quant_bits": 4}},
    "qlora-8": {"model_details.quantization": {"quant_bits": 8}},
    "dora": {"model_details.quantization": None, "train_config.adapter_config.use_dora": True},
}


def accuracy(model, spec, tokenizer):
    chat = ChatTokenizer.of(spec, tokenizer)
    right = 0
    for word, answer in NEXT.items():
        messages = [{"role": "user", "content": word}, {"role": "assistant", "content": answer}]
        sample = chat.encode({"messages": messages})
        first = int((torch.tensor(sample.labels) >= 0).nonzero()[0])
        with torch.no_grad():
            logits = model.eval()(input_ids=torch.tensor(sample.input_ids).long()[None]).logits[0, first - 1]
        right += int(logits.argmax()) == int(sample.input_ids[first])
    return right / len(NEXT)


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer):
    mirror = tmp_path_factory.mktemp("mirror")
    make_base("llama", mirror, tokenizer)
    return mirror


@pytest.mark.parametrize("held", HELD)
def test_accuracy_goes_from_chance_to_nearly_all(held, local_job, tmp_path, base):
    from peft import PeftModel

    usual = {
        "model_details.base_model": "tuneyard/llama",
        "train_config.torch_dtype": "float32",
        "train_config.adapter_config.dropout": 0.0,
        "train_config.adapter_config.alpha": 32,
        "dataset_config.split": {"type": "none"},
        f"{HP}.gradient_checkpointing": False,
        # Few tokens besides the words: the vocabulary makes each dear.
        "dataset_config.preprocessing.prompt.template": TEMPLATE,
        f"{HP}.max_steps": 60,
        f"{HP}.learning_rate": 0.02,
    }
    job = local_job(usual | HELD[held])
    rows = [{"conversations": [{"from": "human", "value": w}, {"from": "gpt", "value": a}]} for w, a in NEXT.items()]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    spec = JobSpec.model_validate(job)
    tokenizer = load_tokenizer(base / "tuneyard/llama")
    bare = load_base(spec, base / "tuneyard/llama", torch.device("cpu")).model
    assert accuracy(bare, spec, tokenizer) <= 0.25
    run(job, tmp_path, base)
    assert accuracy(PeftModel.from_pretrained(bare, tmp_path / "run/adapter"), spec, tokenizer) > 0.95
