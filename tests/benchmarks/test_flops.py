"""The count of useful work, against what PyTorch counts while it does it."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from benchmarks.flops import Shape, useful_flops
from tests.conftest import TINY

RANK, LENGTH, SUPERVISED = 4, 96, 40


def test_useful_work_is_what_a_step_multiplies(mirror):
    base = AutoModelForCausalLM.from_pretrained(mirror / TINY, dtype=torch.float32, attn_implementation="eager")
    get_peft_model(base, LoraConfig(r=RANK, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM"))
    ids = torch.randint(0, base.config.vocab_size, (1, LENGTH))

    with FlopCounterMode(display=False) as counter:
        hidden = base.base_model(input_ids=ids, use_cache=False).last_hidden_state
        base.get_output_embeddings()(hidden[0, -SUPERVISED:]).logsumexp(-1).sum().backward()

    counted = {str(operator): flops for operator, flops in counter.get_flop_counts()["Global"].items()}
    wanted = useful_flops(Shape.of(mirror / TINY), [(LENGTH, SUPERVISED)], RANK)
    attention = counted.pop("aten.bmm")  # with the small one of the rotary positions
    assert sum(counted.values()) == wanted["linear"] + wanted["adapter"] + wanted["head"]
    # Eager attention multiplies the masked half as well.
    assert attention == pytest.approx(wanted["attention"] * 2 * LENGTH / (LENGTH + 1), rel=1e-2)


def test_a_document_costs_the_same_in_whatever_company(mirror):
    shape, documents = Shape.of(mirror / TINY), [(10, 3), (50, 20)]
    alone = [useful_flops(shape, [document], RANK) for document in documents]
    together = useful_flops(shape, documents, RANK)
    assert together == {part: alone[0][part] + alone[1][part] for part in together}
