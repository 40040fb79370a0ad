"""What the launchers know of a device."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from custom_ops.kernels.launch import memory_speed
from custom_ops.kernels.pre_dx import SWIFT

# kHz, bits and, by the makers' data sheets, bytes a second.
MEMORIES = {"H100 SXM": (2_619_000, 5120, 3.35e12), "H200": (3_201_000, 6144, 4.8e12)}


@pytest.mark.parametrize("name", MEMORIES)
def test_memory_speed(name, monkeypatch):
    clock, width, expected = MEMORIES[name]
    properties = SimpleNamespace(memory_clock_rate=clock, memory_bus_width=width)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    speed = memory_speed(torch.device("cuda"))
    assert speed == pytest.approx(expected, rel=0.03)
    assert (speed > SWIFT) == (name == "H200")


def test_a_cpu_counts_as_an_h100():
    assert memory_speed(torch.device("cpu")) == 3.35e12
