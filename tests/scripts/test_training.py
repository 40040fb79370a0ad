"""The training loop: repeatable, equal batches on every path, honest measurements."""

import itertools

import pytest
import torch

import hc_compile as hc
from hc_compile.models import Transformer, TransformerConfig
from scripts.text import load_corpus
from scripts.train import main
from scripts.training import (
    StepClock,
    TrainConfig,
    held_out_loss,
    learning_rate_scale,
    resident_bytes,
    train,
)

CFG = TrainConfig(steps=6, batch=2, length=16)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "words.txt"
    file.write_text("the streams mix, the branch reads, the streams write. " * 200)
    return load_corpus(file)


def model(implementation="plain"):
    torch.manual_seed(0)
    cfg = hc.HCConfig(dim=16, implementation=implementation)
    return Transformer(
        TransformerConfig(dim=16, layers=1, heads=2, ffn_dim=24, max_seq_len=16, hc=cfg)
    )


def test_the_same_seed_gives_the_same_curve(corpus):
    one, two = model(), model()
    first, second = train(one, one, corpus, CFG), train(two, two, corpus, CFG)
    assert first.losses == second.losses
    assert first.first_logits.equal(second.first_logits)


def test_ops_and_plain_functions_give_one_curve(corpus):
    plain, ops = model(), model("ops")
    first, second = train(plain, plain, corpus, CFG), train(ops, ops, corpus, CFG)
    torch.testing.assert_close(second.first_logits, first.first_logits, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        torch.tensor(second.losses), torch.tensor(first.losses), rtol=1e-4, atol=1e-5
    )


def test_training_lowers_both_losses(corpus):
    net = model()
    before = held_out_loss(net, corpus, CFG)
    result = train(net, net, corpus, TrainConfig(steps=40, batch=4, length=16))
    assert result.final_loss < 0.8 * result.losses[0]
    assert held_out_loss(net, corpus, CFG) < 0.8 * before


def test_measurements(corpus):
    net = model()
    result = train(net, net, corpus, CFG)
    assert len(result.losses) == len(result.step_seconds) == CFG.steps
    assert min(result.step_seconds) > 0
    assert result.first_logits.shape == (2, 16, 256)
    assert result.peak_bytes is None
    weights = sum(p.numel() * 4 for p in net.parameters())
    assert 3 * weights <= result.resident_bytes < 3.5 * weights  # weights and Adam's two moments
    assert all(parameter.grad is None for parameter in net.parameters())


def test_resident_bytes_counts_what_the_optimizer_keeps():
    layer = torch.nn.Linear(3, 2, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    assert resident_bytes(layer, optimizer) == 24
    layer(torch.ones(3)).sum().backward()
    optimizer.step()
    assert resident_bytes(layer, optimizer) == 48


def test_learning_rate_warms_up_then_falls_to_a_tenth():
    scale = [learning_rate_scale(step, 100) for step in range(101)]
    assert scale[0] == pytest.approx(0.1) and scale[9] == scale[10] == pytest.approx(1.0)
    assert all(a >= b for a, b in itertools.pairwise(scale[10:]))
    assert scale[100] == pytest.approx(0.1)


def test_clock_gives_the_time_between_marks():
    clock = StepClock("cpu")
    clock.marks = [1.0, 1.5, 3.5]
    assert clock.seconds() == [0.5, 2.0]


def test_no_steps_is_an_error(corpus):
    net = model()
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        train(net, net, corpus, TrainConfig(steps=0))


def test_train_command(tmp_path, capsys):
    (tmp_path / "t.txt").write_text("abc " * 2000)
    saved = tmp_path / "weights.pt"
    size = "--dim 16 --heads 2 --layers 1 --length 16 --batch 2 --steps 4".split()
    main([*size, "--device", "cpu", "--text", str(tmp_path / "t.txt"), "--save", str(saved)])
    assert "held out" in capsys.readouterr().out
    assert "blocks.0.hc_attn.coefficients.phi" in torch.load(saved)
