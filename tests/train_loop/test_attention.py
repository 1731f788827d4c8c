"""Attention document by document sees what the whole mask lets it see, and multiplies nothing else."""

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from train_loop.model import attention
from train_loop.model.attention import attend_by_document

HEADS, WIDTH = 4, 8


def mask_of(*rows, seq=None):
    """[rows, 1, seq, seq] of documents of these lengths, one after another; what is left of a row is padding, which sees the
    documents as transformers lets it."""
    seq = seq or max(map(sum, rows))
    mask = torch.zeros(len(rows), 1, seq, seq, dtype=torch.bool)
    for row, lengths in zip(mask, rows, strict=True):
        at = 0
        for n in lengths:
            row[0, at : at + n, at : at + n] = torch.ones(n, n, dtype=torch.bool).tril()
            at += n
        row[0, at:, :at] = True
    return mask


def module():
    """What transformers tells attention of its layer."""
    layer = torch.nn.Module()
    layer.num_key_value_groups, layer.is_causal = 2, True
    return layer


def attend(mask, *, seed=0, rows=None, dtype=torch.float32):
    """Query, key and value, and what by-document attention makes of them; two query heads share one of keys."""
    torch.manual_seed(seed)
    rows, seq = rows or len(mask), mask.shape[-1]
    shapes = [(rows, heads, seq, WIDTH) for heads in (HEADS, HEADS // 2, HEADS // 2)]
    tensors = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    return tensors, attention._attention(module(), *tensors, mask)[0]


def whole(query, key, value, mask):
    """[rows, seq, heads, width], by torch's kernel and the whole mask."""
    key, value = (t.repeat_interleave(2, dim=1) for t in (key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


some_rows = pytest.mark.parametrize(
    "rows",
    [
        [(300,)],
        [(200, 150, 260)],
        [(5, 1, 1, 40, 200, 3, 4, 129)],
        [(128, 1, 127)],
        [(200, 20), (150, 10, 1), (3,)],
    ],
    ids=["one", "long", "short and long", "at the edge", "padded rows"],
)


@some_rows
def test_values_and_gradients_are_those_of_the_whole_mask(rows):
    mask = mask_of(*rows)
    tensors, mine = attend(mask)
    theirs = whole(*tensors, mask)
    for r, lengths in enumerate(rows):
        torch.testing.assert_close(mine[r, : sum(lengths)], theirs[r, : sum(lengths)])
    real = torch.stack([torch.arange(mask.shape[-1]) < sum(lengths) for lengths in rows])
    gradients = [torch.autograd.grad(out[real].square().sum(), tensors) for out in (mine, theirs)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@some_rows
def test_in_bf16_they_are_as_near_to_those_of_float32_as_torchs_own(rows, monkeypatch):
    monkeypatch.setattr(attention, "SCORES", HEADS * 300 * 70)  # several blocks of queries
    mask = mask_of(*rows)
    tensors, mine = attend(mask, dtype=torch.bfloat16)
    real = torch.stack([torch.arange(mask.shape[-1]) < sum(lengths) for lengths in rows])
    exact = [t.detach().float().requires_grad_() for t in tensors]
    outputs = mine, whole(*tensors, mask), whole(*exact, mask)
    weight = torch.randn_like(outputs[2])[real]

    def found(out, tensors):
        return [out[real], *torch.autograd.grad((out[real] * weight).sum(), tensors)]

    its = [found(out, of) for out, of in zip(outputs, (tensors, tensors, exact), strict=True)]
    for a, b, c in zip(*its, strict=True):
        mine_off, torchs_off = ((t.float() - c).norm() / c.norm() for t in (a, b))
        assert mine_off < max(2 * torchs_off, 5e-3)


@pytest.mark.parametrize("masked", [False, True])
def test_products_have_the_value_and_the_gradients_of_torchs_kernel(masked, monkeypatch):
    monkeypatch.setattr(attention, "SCORES", HEADS * 7 * 3)  # blocks of three positions
    torch.manual_seed(0)
    tensors = [
        torch.randn(1, heads, 7, width, dtype=torch.float64, requires_grad=True)
        for heads, width in ((HEADS, 3), (HEADS // 2, 3), (HEADS // 2, 5))
    ]
    mask = seen_first(sliding(mask_of((7,)), 2), 3) if masked else None

    def value(*tensors):
        return attention._by_products(*tensors, mask, 0.7)

    theirs = F.scaled_dot_product_attention(*tensors, attn_mask=mask, is_causal=mask is None, scale=0.7, enable_gqa=True)
    torch.testing.assert_close(value(*tensors), theirs.transpose(1, 2))
    assert torch.autograd.gradcheck(value, tensors)


@pytest.mark.parametrize(("dtype", "by_products"), [(torch.float32, 0), (torch.bfloat16, 2)])
def test_products_are_for_what_torchs_kernel_is_slow_at(dtype, by_products, monkeypatch):
    seen, real = [], attention._by_products
    monkeypatch.setattr(attention, "_by_products", lambda *a: seen.append(a) or real(*a))
    attend(mask_of((200, 150)), dtype=dtype)
    assert len(seen) == by_products
    # A document a row: transformers makes no mask.
    tensors = [torch.randn(2, heads, 9, WIDTH).to(dtype) for heads in (HEADS, HEADS // 2, HEADS // 2)]
    mine, _ = attention._attention(module(), *tensors, None)
    assert len(seen) == 2 * by_products
    torch.testing.assert_close(mine, whole(*tensors, mask_of((9,), (9,))), rtol=2e-2, atol=2e-2)


def test_documents_of_all_lengths_are_attended_to_by_products_of_few_sizes():
    """For each size that it meets, oneDNN compiles a product and keeps it."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Products(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.sizes = set()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.baddbmm):
                self.sizes.add((function, *(a.shape for a in args if isinstance(a, torch.Tensor))))
            return function(*args, **(kwargs or {}))

    def attended(lengths):
        with Products() as products:
            for length in lengths:
                tensors = [torch.randn(1, heads, length, WIDTH).bfloat16().requires_grad_() for heads in (HEADS, 2, 2)]
                attention._by_products(*tensors, None, None).sum().backward()
        return products.sizes

    assert attended([1024])
    assert attended(range(900, 1024, 31)) == attended([1024])
    assert attended([600, 700, 800, 900]) <= attended([1024])
    assert attended([49, 50, 64]) == attended([64])


def test_one_mask_may_serve_all_rows():
    mask = mask_of((150, 60))
    tensors, mine = attend(mask, rows=3)
    torch.testing.assert_close(mine, whole(*tensors, mask))


def sliding(mask, window=20):
    """The mask, with nothing seen that lies further back than so many positions."""
    return mask & ~torch.ones_like(mask).tril(-window)


def seen_first(mask, prompt=10):
    """The mask, with a prompt of so many tokens that see each other."""
    mask = mask.clone()
    mask[..., :prompt, :prompt] = True
    return mask


def padded_left(mask):
    mask = mask.clone()
    mask[..., :30] = False
    mask[..., :30, :] = False
    return mask


@pytest.mark.parametrize(
    ("changed", "spans"),
    [
        (sliding, [(0, 150, False), (150, 210, False)]),
        (seen_first, [(0, 150, False), (150, 210, True)]),
        (padded_left, None),
    ],
)
def test_other_masks_go_to_the_kernel_as_they_are_by_document_where_there_are_any(changed, spans):
    mask = changed(mask_of((150, 60)))
    found = attention._found(mask)
    assert (found and [[(start, end, part is None) for start, end, part in row] for row in found]) == (spans and [spans])
    tensors, mine = attend(mask)
    theirs = whole(*tensors, mask)
    torch.testing.assert_close(mine[:, 30:], theirs[:, 30:])


def test_no_call_is_longer_than_a_document_or_a_few_short_ones(monkeypatch):
    from transformers.integrations import sdpa_attention

    seen, real = [], sdpa_attention.sdpa_attention_forward
    monkeypatch.setattr(
        sdpa_attention, "sdpa_attention_forward", lambda m, q, *a, **k: seen.append(q.shape[2]) or real(m, q, *a, **k)
    )
    monkeypatch.setattr(attention, "FEW_TOKENS", 128)
    attend(mask_of((200, 30, 40, 50, 20, 300)))
    assert seen == [200, 120, 20, 300]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_only_a_model_that_attends_by_torchs_kernel_is_changed(implementation):
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.train_loop.models import SIZES

    config = LlamaConfig(**SIZES, vocab_size=32)
    model = LlamaForCausalLM._from_config(config, attn_implementation=implementation)
    attend_by_document(model)
    ids, positions = torch.arange(1, 9)[None], torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    mine = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    assert model.config._attn_implementation == {"eager": "eager", "sdpa": attention.NAME}[implementation]
    apart = [model(input_ids=ids[:, part], use_cache=False).logits for part in (slice(3), slice(3, 8))]
    torch.testing.assert_close(mine, torch.cat(apart, dim=1))


def model_that_attends_by_edges(**config):
    """And the same as transformers makes it. The flash kernel is told the same edges on a GPU."""
    from transformers import MistralConfig, MistralForCausalLM

    from tests.train_loop.models import SIZES

    torch.manual_seed(0)
    plain, model = (MistralForCausalLM._from_config(MistralConfig(**SIZES, vocab_size=32, **config)) for _ in range(2))
    model.load_state_dict(plain.state_dict())
    attend_by_document(model)
    assert (plain.config._attn_implementation, model.config._attn_implementation) == ("sdpa", attention.NAME)
    return plain.eval(), model.eval()


PACKED = {"position_ids": torch.tensor([[0, 1, 2, 0, 0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 6, 7, 8, 0]])}
PADDED = {"attention_mask": torch.tensor([[1] * 10, [1] * 4 + [0] * 6])}


PADDED_LEFT = {"attention_mask": torch.tensor([[1] * 10, [0] * 6 + [1] * 4])}


@pytest.mark.parametrize("together", [0, 4, 128])
@pytest.mark.parametrize("window", [None, 3], ids=["all", "sliding"])
@pytest.mark.parametrize("rows", [PACKED, PADDED, PADDED_LEFT, {}], ids=["packed", "padded", "padded left", "plain"])
def test_edges_say_of_documents_what_a_mask_says(monkeypatch, rows, window, together):
    monkeypatch.setattr(attention, "FEW_TOKENS", together)
    plain, model = model_that_attends_by_edges(sliding_window=window)
    ids = torch.arange(20).view(2, 10) + 1
    real = rows.get("attention_mask", torch.ones_like(ids)).bool()
    theirs, mine = (m(input_ids=ids, use_cache=False, **rows).logits[real] for m in (plain, model))
    torch.testing.assert_close(mine, theirs)


def test_the_kernel_is_told_each_document_and_its_window_once(monkeypatch):
    _, model = model_that_attends_by_edges(sliding_window=3)
    masks, spans = [], attention._spans
    monkeypatch.setattr(attention, "_spans", lambda edges, *tensors: masks.append(edges) or spans(edges, *tensors))
    model(input_ids=torch.arange(20).view(2, 10) + 1, use_cache=False, **PACKED)
    assert len({id(edges) for edges in masks}) == 1
    assert len(masks) == model.config.num_hidden_layers
    edges = masks[0]
    assert (edges.tolist(), edges.dtype, edges.longest, edges.window) == ([0, 3, 4, 10, 19, 20], torch.int32, 9, 3)


def test_nothing_as_large_as_a_mask_is_made_of_a_long_row():
    """Of 2^15 tokens it would be a gigabyte."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(out):
                self.numel = max(self.numel, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
            return out

    _, model = model_that_attends_by_edges(sliding_window=64)
    lengths = [200, 100, 50, 2, 1] * 6
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    with torch.no_grad(), Largest() as largest:
        model.base_model(input_ids=torch.ones_like(positions), position_ids=positions, use_cache=False)
    assert largest.numel < positions.numel() ** 2 / 8


def test_writing_goes_on_with_a_cache_that_edges_know_nothing_of():
    plain, model = model_that_attends_by_edges(sliding_window=None)
    ids = torch.arange(1, 6)[None]
    written = [m.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0) for m in (plain, model)]
    assert torch.equal(*written)


def test_a_prompt_that_sees_itself_is_masked_as_before():
    from transformers.masking_utils import blockwise_overlay, causal_mask_function, or_masks, sdpa_mask

    block = torch.tensor([[0, 0, 0, -1, -1, -1]])
    sees = or_masks(causal_mask_function, blockwise_overlay(block))
    told = {"mask_function": sees, "device": torch.device("cpu"), "allow_is_causal_skip": False}
    mine = attention._edges(1, 6, 6, **told)
    torch.testing.assert_close(mine, sdpa_mask(1, 6, 6, **told))
