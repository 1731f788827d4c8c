import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import TINY
from train_loop.data.packing import NO_LIMIT, collate, pack
from train_loop.data.sampler import BatchPlan, deal
from train_loop.data.tokenize import Sample
from train_loop.loss import CHUNK_TOKENS, Head, head_loss, supervised_loss
from train_loop.model import attention
from train_loop.model.load import load_base
from train_loop.spec import JobSpec


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 120))
def test_packing_loses_nothing_and_overfills_nothing(lengths, capacity):
    bins = pack(lengths, capacity)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in b) <= capacity for b in bins)
    # First fit: no two bins could have been one.
    sizes = sorted(sum(lengths[i] for i in b) for b in bins)
    assert len(sizes) < 2 or sizes[0] + sizes[1] > capacity


def test_a_document_over_the_capacity_is_refused():
    with pytest.raises(ValueError, match="51 tokens"):
        pack([51], 50)


def samples(count, seed=0):
    random = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        ids = random.integers(10, 1000, random.integers(2, 40)).astype(np.int32)
        labels = np.where(random.random(len(ids)) < 0.5, ids, -100).astype(np.int32)
        labels[-1] = ids[-1]
        made.append(Sample(ids, labels))
    return made


@given(st.lists(st.integers(1, 50), min_size=1, max_size=20))
def test_a_row_that_takes_all_has_no_padding(lengths):
    of = [Sample(np.full(n, n, dtype=np.int32), np.full(n, n, dtype=np.int32)) for n in lengths]
    batch = collate(of, capacity=NO_LIMIT, pad_id=0)
    assert batch.input_ids.shape == (1, batch.num_tokens) == (1, sum(lengths))
    assert batch.input_ids.all()
    assert (batch.position_ids == 0).sum() == len(lengths)
    assert batch.num_supervised == sum(lengths) - len(lengths)
    assert batch.attention_mask is None


@pytest.fixture(params=[1, attention.FEW_TOKENS], ids=["each document by itself", "short ones together"])
def model(request, mirror, local_job, monkeypatch):
    """As a run loads it."""
    monkeypatch.setattr(attention, "FEW_TOKENS", request.param)
    spec = JobSpec.model_validate(local_job({"train_config.torch_dtype": "float32", "model_details.quantization": None}))
    return load_base(spec, mirror / TINY, torch.device("cpu")).model.eval()


def layouts(of):
    """Joined, packed and padded."""
    return [collate(of, capacity=capacity, pad_id=2) for capacity in (NO_LIMIT, 64, None)]


def test_packed_padded_and_single_samples_give_the_same_loss(model):
    of = samples(9)
    joined, packed, padded = layouts(of)
    assert 1 == joined.input_ids.shape[0] < packed.input_ids.shape[0] < padded.input_ids.shape[0]
    assert joined.num_supervised == packed.num_supervised == padded.num_supervised
    single = sum(supervised_loss(model, collate([s], capacity=None, pad_id=2)).item() for s in of)
    assert supervised_loss(model, joined).item() == pytest.approx(single, rel=1e-5)
    assert supervised_loss(model, packed).item() == pytest.approx(single, rel=1e-5)
    assert supervised_loss(model, padded).item() == pytest.approx(single, rel=1e-5)


def token_losses(model, batch):
    """The loss of each supervised position, row after row."""
    with torch.no_grad():
        out = model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=batch.attention_mask, use_cache=False
        )
    keep = batch.labels != -100
    return torch.nn.functional.cross_entropy(out.logits[keep], batch.labels[keep], reduction="none")


def test_packed_padded_and_single_samples_give_each_token_the_same_loss(model):
    of = samples(9)
    joined, packed, padded = layouts(of)
    alone = [token_losses(model, collate([s], capacity=None, pad_id=2)) for s in of]
    for batch, capacity in ((joined, NO_LIMIT), (packed, 64)):
        in_rows = torch.cat([alone[i] for row in pack([len(s.input_ids) for s in of], capacity) for i in row])
        torch.testing.assert_close(token_losses(model, batch), in_rows, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(token_losses(model, padded), torch.cat(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changed", range(5))
def test_packed_documents_do_not_see_each_other(model, changed):
    of = samples(5, seed=1)

    def logits(of):
        batch = collate(of, capacity=40, pad_id=2)
        assert len(batch.input_ids) > 1
        with torch.no_grad():
            out = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
        rows = pack([len(s.input_ids) for s in of], 40)
        ends = [np.cumsum([len(of[i].input_ids) for i in row]).tolist() for row in rows]
        return {
            i: out[r, end - len(of[i].input_ids) : end] for r, row in enumerate(rows) for i, end in zip(row, ends[r], strict=True)
        }

    before = logits(of)
    of[changed] = Sample(of[changed].input_ids + 7, of[changed].labels)
    after = logits(of)
    for i in range(5):
        assert torch.allclose(before[i], after[i], atol=1e-5) is (i != changed)


def test_the_chunked_loss_and_its_gradient_equal_plain_cross_entropy(model):
    *_, padded = layouts(samples(30, seed=2))
    hidden = torch.randn(int((padded.labels != -100).sum()), model.config.hidden_size, requires_grad=True)
    targets = padded.labels[padded.labels != -100]
    assert len(targets) > CHUNK_TOKENS
    ours = head_loss(hidden, Head.of(model), targets)
    (grad,) = torch.autograd.grad(ours * 3, hidden)
    plain = torch.nn.functional.cross_entropy(model.lm_head(hidden), targets, reduction="sum")
    (expected,) = torch.autograd.grad(plain * 3, hidden)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5)


plans = st.builds(
    BatchPlan,
    num_samples=st.integers(1, 70),
    per_device_batch_size=st.integers(1, 6),
    world_size=st.integers(1, 5),
    accumulation_steps=st.integers(1, 3),
    num_epochs=st.sampled_from([0.5, 1, 2, 2.5]),
    max_steps=st.none(),
    seed=st.integers(0, 5),
)


@given(plans, st.integers(1, 5), st.integers(0, 5))
def test_any_number_of_workers_shares_a_step_without_loss_or_overlap(plan, world_size, seed):
    sizes = np.random.default_rng(seed).integers(1, 100, plan.num_samples)
    for step in range(1, plan.total_steps + 1):
        of_ranks = [plan.micro_batches(step, rank, world_size, sizes) for rank in range(world_size)]
        assert len({len(micros) for micros in of_ranks}) == 1
        shared = [micro for micros in of_ranks for micro in micros]
        assert sorted(np.concatenate(shared)) == sorted(plan.global_batch(step))
        assert all(len(micro) <= plan.per_device_batch_size for micro in shared)


@given(plans)
def test_the_full_number_of_workers_accumulates_as_asked(plan):
    assert len(plan.micro_batches(1, 0, plan.world_size, np.ones(plan.num_samples, int))) == plan.accumulation_steps


def test_workers_have_about_as_much_to_do_as_each_other():
    """Rows as long as conversations are: most of them short, some many times as long."""
    sizes = np.random.default_rng(0).lognormal(6, 1.2, 640).clip(max=4096).astype(np.int64)
    plan = BatchPlan(640, 4, 8, 2, 1, None, 42)

    def waits(shares):
        return np.mean([max(each) / np.mean(each) for each in shares])

    as_drawn, dealt = [], []
    for step in range(1, plan.total_steps + 1):
        batch = plan.global_batch(step)
        as_drawn.append([sizes[batch[rank::8]].sum() for rank in range(8)])
        of_ranks = [plan.micro_batches(step, rank, 8, sizes) for rank in range(8)]
        dealt.append([sum(sizes[micro].sum() for micro in micros) for micros in of_ranks])
        assert {len(micro) for micros in of_ranks for micro in micros} == {4}
    assert waits(dealt) < 1.1 < 1.4 < waits(as_drawn)


@given(st.lists(st.integers(0, 50), max_size=40), st.integers(1, 9))
def test_shares_are_of_all_and_none_has_too_many(sizes, num_shares):
    shares = deal(np.array(sizes, dtype=np.int64), num_shares)
    assert sorted(i for share in shares for i in share) == list(range(len(sizes)))
    assert max(map(len, shares)) <= math.ceil(len(sizes) / num_shares)


@given(plans)
def test_an_epoch_visits_every_sample_once(plan):
    steps = range(1, plan.steps_per_epoch + 1)
    assert sorted(np.concatenate([plan.global_batch(s) for s in steps])) == list(range(plan.num_samples))


def test_each_epoch_and_each_seed_has_an_order_of_its_own():
    orders = set()
    for seed in (1, 2):
        plan = BatchPlan(100, 8, 1, 1, 3, None, seed)
        of_epochs = np.split(np.concatenate([plan.global_batch(s + 1) for s in range(plan.total_steps)]), 3)
        orders |= {tuple(order) for order in of_epochs}
    assert len(orders) == 6
    assert tuple(range(100)) not in orders


def test_the_order_does_not_depend_on_the_number_of_workers():
    def plan(batch, world, accumulation):
        return BatchPlan(100, batch, world, accumulation, 3, None, 42)

    for step in range(1, plan(8, 1, 1).total_steps + 1):
        expected = plan(8, 1, 1).global_batch(step).tolist()
        assert plan(2, 4, 1).global_batch(step).tolist() == expected
        assert plan(1, 2, 4).global_batch(step).tolist() == expected
