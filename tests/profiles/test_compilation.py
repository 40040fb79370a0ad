"""Counting graphs, graph breaks and recompilations, and the phases of compile time."""

from types import SimpleNamespace

import pytest
import torch

from profiles.compilation import PHASES, compilation, phases


def test_one_graph_without_breaks():
    with compilation() as found:
        torch.compile(lambda t: t.sin() + 1, backend="eager")(torch.ones(3))
    told = found.to_json()
    assert (told["graphs"], told["graph_breaks"], told["recompiles"]) == (1, 0, 0)
    assert told["phases"]["dynamo"] > 0 and list(told["phases"]) == list(PHASES)


def test_breaks_and_recompilations_are_counted_with_their_reasons():
    def broken(t):
        t = t.sin()
        torch._dynamo.graph_break()
        return t.cos()

    run = torch.compile(broken, backend="eager", dynamic=False)
    with compilation() as found:
        run(torch.ones(3))
        run(torch.ones(4))
    assert found.graphs == 4
    assert sum(found.breaks.values()) >= 1 and all("\n" not in why for why in found.breaks)
    assert len(found.recompiles) == 2 and any("size" in why for why in found.recompiles)


def test_a_block_counts_only_what_is_compiled_inside():
    with compilation():
        torch.compile(lambda t: t.sin(), backend="eager")(torch.ones(3))
    with compilation() as nothing:
        pass
    assert nothing.to_json()["graphs"] == 0 and sum(nothing.phases.values()) == 0


def test_nested_times_become_own_times():
    forward = SimpleNamespace(
        dynamo_cumulative_compile_time_us=10e6,
        aot_autograd_cumulative_compile_time_us=8e6,
        inductor_cumulative_compile_time_us=5e6,
        triton_compile_time_us=1e6,
    )
    backward = SimpleNamespace(
        dynamo_cumulative_compile_time_us=None,
        backward_cumulative_compile_time_us=4e6,
        inductor_cumulative_compile_time_us=3e6,
        triton_compile_time_us=2e6,
    )
    found = phases([forward, backward])
    assert found == pytest.approx({"dynamo": 2, "aot": 4, "inductor": 5, "kernels": 3})
    assert sum(found.values()) == pytest.approx(10 + 4)  # all of both, each second once
