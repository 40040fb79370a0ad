"""Each example does what it prints."""

import math

from scripts import example_usage


def test_trains_and_counts_on():
    losses, continued = example_usage.example_1_train_and_generate()
    assert losses[0] > 2 and losses[-1] < 0.2
    assert continued == [6, 7, 8, 9, 10, 11]


def test_every_variant_learns():
    found = example_usage.example_2_variants_and_rates()
    assert len(found) == 9
    assert all(loss < math.log(16) for loss in found.values())


def test_block_alone_and_sizes(capsys):
    out, largest = example_usage.example_3_block_alone()
    assert out.shape == (2, 10, 24) and largest > 0
    found = example_usage.example_4_sizes()
    assert found == {"small": 125_337_456, "base": 356_167_904, "large": 987_543_680}
    assert "125,337,456" in capsys.readouterr().out
