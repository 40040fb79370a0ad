"""Memory over a step, from hand-made traces with known answers."""

from profiles.memory import memory_curve
from tests.profiles.test_trace import memory, span, step, write


def test_curve_rises_above_the_level_at_the_steps_start(tmp_path):
    events = [step(1, 0, 50), step(2, 100, 100), memory(90, 40), memory(125, 340), memory(150, 90)]
    curve = memory_curve(write(tmp_path, events), "cpu", points=4)
    assert curve == [[0.0, 0.0], [25.0, 300.0], [50.0, 300.0], [75.0, 50.0], [100.0, 50.0]]


def test_a_short_peak_survives_few_points(tmp_path):
    events = [step(1, 0, 100), memory(-1, 10), memory(51, 810), memory(52, 10), memory(99, 30)]
    curve = memory_curve(write(tmp_path, events), "cpu", points=2)
    assert curve == [[0.0, 0.0], [50.0, 0.0], [100.0, 800.0]]


def test_a_gpus_curve_counts_its_own_memory(tmp_path):
    events = [step(1, 0, 10), memory(1, 999, device=0), memory(2, 70, device=1)]
    assert max(v for _, v in memory_curve(write(tmp_path, events), "cuda", points=5)) == 70


def test_no_step_or_no_allocations_give_no_curve(tmp_path):
    assert memory_curve(write(tmp_path / "a", [memory(1, 5)]), "cpu") == []
    assert memory_curve(write(tmp_path / "b", [step(1, 0, 9), span("x", 1, 1)]), "cpu") == []
