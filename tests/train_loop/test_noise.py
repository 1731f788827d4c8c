"""NEFTune noise: its size per document, and only while training."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.conftest import TINY
from tests.train_loop.models import make_base
from train_loop.noise import add_noise, document_lengths


def test_a_document_ends_where_positions_start_again():
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]])
    assert document_lengths(positions).tolist() == [[3, 3, 3, 2, 2], [1, 4, 4, 4, 4]]


def test_noise_is_uniform_within_alpha_over_the_root_of_a_documents_size_and_absent_in_evaluation(mirror):
    model = AutoModelForCausalLM.from_pretrained(mirror / TINY, dtype=torch.float32)
    add_noise(model, 5.0)
    seen = []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    ids = torch.arange(3, 103)[None]
    positions = torch.cat([torch.arange(90), torch.arange(10)])[None]
    for training in (False, True):
        model.train(training).model(input_ids=ids, position_ids=positions, use_cache=False)
    clean, noisy = seen
    assert torch.equal(clean, model.get_input_embeddings().weight[ids])
    noise = (noisy - clean)[0]
    for part, tokens in ((noise[:90], 90), (noise[90:], 10)):
        size = 5.0 / (tokens * 64) ** 0.5
        assert 0.95 * size < part.abs().max().item() <= size * 1.001
        assert part.std().item() == pytest.approx(size / 3**0.5, rel=0.1)


@pytest.mark.parametrize("architecture", ["falcon", "gemma2", "phi3"])
def test_noise_reaches_whatever_an_architecture_calls_its_model(architecture, tmp_path, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tmp_path / make_base(architecture, tmp_path, tokenizer), dtype=torch.float32)
    add_noise(model, 50.0)
    ids, positions = torch.arange(3, 13)[None], torch.arange(10)[None]
    clean, noisy = (
        model.train(training).base_model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
        for training in (False, True)
    )
    assert not torch.allclose(clean, noisy)
