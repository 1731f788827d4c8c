"""bitsandbytes in a process that trains."""

import subprocess
import sys

TRAIN = """
import sys, torch
import train_loop.loop, peft
from transformers import LlamaConfig, LlamaForCausalLM

config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
model = LlamaForCausalLM(config)
adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad])
print(torch.compile.__module__, *(name for name in ("bitsandbytes", "torch._inductor.compile_fx") if name in sys.modules))
"""


def test_a_process_that_trains_has_bitsandbytes_but_no_compiler_and_no_advice_about_packages():
    said = subprocess.run([sys.executable, "-c", TRAIN], check=True, capture_output=True, text=True)
    assert said.stdout.split() == ["torch", "bitsandbytes"]
    assert "pip install" not in said.stderr
