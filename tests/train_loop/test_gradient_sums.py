"""Gradients of several workers are summed, however many are sent at once."""

import torch

from tests.train_loop.group import on_workers
from train_loop import parallel
from train_loop.parallel import sync_gradients


def test_gradients_of_all_sizes_and_missing_ones_are_summed_with_the_loss(tmp_path):
    on_workers("tests.train_loop.test_gradient_sums:add_up", tmp_path, 2, tmp_path, None)


def add_up(ctx, _):
    sizes = [(3,), (5, 2), (40,), (1,), (2, 2), (30,)]
    for bucket_bytes in (1 << 20, 80, 1):  # all at once, a few at a time, each by itself
        parallel.BUCKET_BYTES = bucket_bytes
        parameters = [torch.nn.Parameter(torch.zeros(size, device=ctx.device)) for size in sizes]
        for i, p in enumerate(parameters):
            if ctx.rank == 0 or i % 2:  # no sample of the other rank reached these
                p.grad = torch.arange(1.0, 1 + p.numel(), device=p.device).view_as(p) * 10**ctx.rank * (i + 1)
        assert sync_gradients(parameters, 0.25 + ctx.rank, ctx) == 1.5
        for i, p in enumerate(parameters):
            expected = torch.arange(1.0, 1 + p.numel(), device=p.device).view_as(p) * (11 if i % 2 else 1) * (i + 1)
            assert torch.equal(p.grad, expected), (bucket_bytes, i)
