"""The arithmetic of the simulated clusters, against textbook formulas and what must hold whatever the numbers."""

import math
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig

from benchmarks.chart import Line, chart
from benchmarks.flops import useful_flops
from benchmarks.network import Cluster, Link, all_reduce, all_reduces, fit, gather, gathers, ring_all_reduce, tree_all_reduce
from benchmarks.simulation import (
    ADAPTER_RANK,
    CAUSES,
    DDP,
    DDP_4BIT,
    FREE,
    FSDP,
    FSDP_FULL,
    Base,
    Gpu,
    cpu_step_s,
    dealt,
    losses,
    makespan,
    step_s,
    striped,
    work,
)

BASE = Base.of(LlamaConfig(hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, vocab_size=1000))
DOCUMENTS = [(100, 40), (700, 650), (30, 10), (350, 100), (512, 500), (64, 1), (900, 30), (222, 111)]
CLUSTER = Cluster(Link(3e-6, 300e9), Link(12e-6, 40e9))
GPU = Gpu(flops=1e14)
WAYS = [DDP, DDP_4BIT, FSDP, FSDP_FULL]
MB = 1_000_000

links = st.builds(Link, st.floats(0, 1e-3), st.floats(1e6, 1e12))
clusters = st.builds(Cluster, links, links)
sizes = st.floats(1, 1e10)
counts = st.sampled_from([2**k for k in range(11)])


def test_a_ring_takes_what_the_textbook_says():
    # 6 messages of a quarter of 8 MB over 1 GB/s: 2 ms each, and a latency each.
    assert ring_all_reduce(8 * MB, 4, Link(1e-6, 1e9)) == pytest.approx(6 * (1e-6 + 2e-3))


def test_two_trees_take_twice_the_message_and_a_latency_for_each_level():
    assert tree_all_reduce(8 * MB, 8, Link(1e-6, 1e9)) == pytest.approx(2 * (3 * 1e-6 + 8e-3))


def test_a_ring_over_nodes_crosses_between_them_once_a_node():
    # 2 nodes of 4: of 14 hops 2 are between nodes; four rings share one link inside, each has its own between.
    cluster = Cluster(Link(1e-6, 10e9), Link(5e-6, 1e9), per_node=4)
    assert all_reduces(8 * MB, 8, cluster)["ring"] == pytest.approx(12 * 1e-6 + 2 * 5e-6 + 14 / 8 * 8 * MB / 4e9)


def test_a_hierarchy_reduces_inside_then_its_part_between_nodes():
    cluster = Cluster(Link(1e-6, 10e9), Link(5e-6, 1e9), per_node=4)
    inside, between = 2 * 3 * (1e-6 + 2 * MB / 10e9), 2 * (5e-6 + MB / 1e9)
    assert all_reduces(8 * MB, 8, cluster)["hierarchical ring"] == pytest.approx(inside + between)


def test_an_all_reduce_is_a_reduce_scatter_and_an_all_gather():
    assert all_reduces(MB, 64, CLUSTER)["ring"] == pytest.approx(2 * gathers(MB, 64, CLUSTER)["ring"])


def test_trees_win_where_latency_counts_and_rings_where_bytes_do():
    small, large = all_reduces(8, 1024, CLUSTER), all_reduces(1e10, 16, CLUSTER)
    assert "tree" in min(small, key=small.__getitem__)
    assert "ring" in min(large, key=large.__getitem__)


@given(sizes, sizes, counts, clusters)
def test_more_bytes_never_take_less_time(a, b, ranks, cluster):
    for collective in (all_reduce, gather):
        assert collective(min(a, b), ranks, cluster) <= collective(max(a, b), ranks, cluster)


@given(sizes, counts, counts, clusters)
def test_more_ranks_never_take_less_time(size, a, b, cluster):
    for collective in (all_reduce, gather):
        few, many = (collective(size, ranks, cluster) for ranks in sorted((a, b)))
        assert few <= many * (1 + 1e-9)


def test_one_rank_sends_nothing():
    assert all_reduce(MB, 1, CLUSTER) == gather(MB, 1, CLUSTER) == 0


def test_ranks_that_fill_no_whole_node_are_refused():
    with pytest.raises(ValueError, match="12 ranks"):
        all_reduce(MB, 12, CLUSTER)


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_link_of_timed_messages_is_found(ranks):
    link = Link(5e-5, 2e9)
    found = fit([(size, ring_all_reduce(size, ranks, link)) for size in (4, 4096, 4 * MB)], ranks)
    assert (found.alpha_s, found.bytes_per_s) == (pytest.approx(link.alpha_s), pytest.approx(link.bytes_per_s))


def test_work_is_what_is_useful_and_the_recomputed_forward():
    forward, backward, head = work(BASE, DDP, DOCUMENTS).sum(0)
    useful = sum(useful_flops(BASE.shape, DOCUMENTS, ADAPTER_RANK).values())
    assert forward + backward + head == pytest.approx(useful + forward)


@pytest.mark.parametrize("way", WAYS)
def test_one_gpu_takes_the_time_of_its_work(way):
    flops = striped(work(BASE, way, DOCUMENTS), 1, 2)
    assert step_s(BASE, way, GPU, CLUSTER, flops) == pytest.approx(flops.sum() / GPU.flops)


def test_one_worker_takes_what_was_measured():
    measured_s = 7.5
    flops = sum(useful_flops(BASE.shape, DOCUMENTS, ADAPTER_RANK).values()) / measured_s
    assert cpu_step_s(BASE, DOCUMENTS, 1, 1, flops, FREE) == pytest.approx(measured_s)


@pytest.mark.parametrize(("parts", "cores", "seconds"), [([3], 2, 3), ([1, 3], 2, 3), ([2, 2, 2, 2], 2, 4), ([1, 1, 1, 3], 2, 4)])
def test_workers_share_the_cores_until_the_last_is_done(parts, cores, seconds):
    assert makespan(parts, cores) == pytest.approx(seconds)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("deal", [striped, dealt])
def test_time_is_either_used_or_lost_to_a_cause(way, deal):
    batches = [deal(work(BASE, way, DOCUMENTS * 4), 16, 2)]
    found = losses(BASE, way, GPU, CLUSTER, batches, loading_s=1e-3)
    assert found["efficiency"] + sum(found[cause] for cause in CAUSES) == pytest.approx(1)
    assert all(found[cause] >= -1e-12 for cause in CAUSES)


@pytest.mark.parametrize("way", WAYS)
def test_a_slower_network_never_makes_a_faster_step(way):
    flops = striped(work(BASE, way, DOCUMENTS * 4), 32, 1)
    slower = [
        CLUSTER,
        replace(CLUSTER, between=Link(CLUSTER.between.alpha_s, CLUSTER.between.bytes_per_s / 10)),
        replace(CLUSTER, between=Link(CLUSTER.between.alpha_s * 10, CLUSTER.between.bytes_per_s / 10)),
    ]
    times = [step_s(BASE, way, GPU, cluster, flops) for cluster in slower]
    assert times == sorted(times)
    assert times[0] < times[-1]


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_lost_on_a_perfect_network_with_equal_documents(way):
    batches = [striped(work(BASE, way, [(300, 200)] * 32), 16, 2)]
    assert losses(BASE, way, GPU, Cluster(FREE, FREE), batches)["efficiency"] == pytest.approx(1)


def test_weights_that_hide_behind_compute_cost_only_their_first_block():
    flops = striped(work(BASE, FSDP, [(10_000, 100)] * 16), 16, 1)
    block, outer = (gather(size, 16, CLUSTER) for size in FSDP.gathered_bytes(BASE))
    gradients = gather(FSDP.learned_bytes(BASE)[0], 16, CLUSTER)
    exposed = 2 * (block + outer) + gradients + 2 * all_reduce(32, 16, CLUSTER)
    slow = Gpu(flops=1e12)
    assert step_s(BASE, FSDP, slow, CLUSTER, flops) == pytest.approx(flops.sum() / 16 / slow.flops + exposed)


@given(st.lists(st.tuples(st.integers(2, 2000), st.just(1)), min_size=32, max_size=32), st.sampled_from([1, 2, 4]))
def test_dealing_keeps_every_document_and_as_many_in_each_micro_batch(documents, batch_size):
    flops = work(BASE, DDP, documents)
    shared = dealt(flops, 4, batch_size)
    assert shared.shape == striped(flops, 4, batch_size).shape
    assert shared.sum((0, 1)) == pytest.approx(flops.sum(0))


def test_documents_dealt_by_length_wait_less_than_as_they_come():
    draw = np.random.default_rng(0)
    flops = work(BASE, DDP, [(int(n), 1) for n in draw.integers(2, 2000, 512)])
    longest = [deal(flops, 64, 8).sum((1, 2)).max() for deal in (dealt, striped)]
    assert flops.sum() / 64 <= longest[0] < longest[1]


def test_sharding_divides_what_a_gpu_holds():
    few, many = (FSDP_FULL.resident_bytes(BASE, ranks, 0) for ranks in (8, 1024))
    params = BASE.block_params * BASE.shape.num_blocks + BASE.outer_params
    assert few - many == pytest.approx(16 * params * (1 / 8 - 1 / 1024))


def test_the_chart_is_xml_with_every_point():
    points = [(8, 1.0), (64, 0.5)]
    root = ElementTree.fromstring(chart([("one", [Line("a & b", points)]), ("two", [Line("c", points, True)])], "GPUs", 0.9))
    drawn = [line.get("points", "").split() for line in root.iter("{http://www.w3.org/2000/svg}polyline")]
    assert [len(line) for line in drawn] == [len(points)] * 2
    assert not math.isnan(float(drawn[0][0].split(",")[1]))
