"""How often a graph repeats what it times."""

import pytest

from profiles.timing import GRAPH_CALLS, GRAPH_MS, graph_ms, measure, repeats


def test_a_short_call_is_repeated_until_a_graphs_start_is_small():
    assert repeats(2 * GRAPH_MS) == 1
    assert repeats(GRAPH_MS / 4) == 4
    assert repeats(GRAPH_MS / 3.5) == 4
    assert repeats(GRAPH_MS / 1000) == GRAPH_CALLS


@pytest.mark.gpu
def test_a_graphs_start_is_not_counted():
    import torch

    from profiles.timing import capture_graph, measuring, median_ms

    x = torch.zeros(64, device="cuda")
    with measuring("cuda"):
        once = median_ms(capture_graph(lambda: x.add_(1.0)).replay, "cuda")
        assert graph_ms(lambda: x.add_(1.0), "cuda") < 0.7 * once


def test_on_a_cpu_there_is_no_graph():
    calls = []
    cost = measure(lambda: calls.append(1), "cpu")
    assert cost.graph_ms is None
    assert len(calls) > 1
