"""Sampling: greedy, seeded, top-k, window and errors."""

import pytest
import torch
from torch import nn

from hc_compile.models import generate


class Successor(nn.Module):
    """Scores token t + 1 highest, t + 2 second; remembers the lengths it saw."""

    def __init__(self, vocab=7):
        super().__init__()
        self.vocab, self.lengths = vocab, []

    def forward(self, tokens):
        self.lengths.append(tokens.shape[1])
        one_hot = nn.functional.one_hot
        return (
            3.0 * one_hot((tokens + 1) % self.vocab, self.vocab)
            + 2.0 * one_hot((tokens + 2) % self.vocab, self.vocab)
        ).float()


PROMPT = torch.tensor([[0], [4]])


def test_greedy_takes_the_largest_logit_and_keeps_the_prompt():
    out = generate(Successor(), PROMPT, 4, max_seq_len=8, temperature=0)
    assert out.tolist() == [[0, 1, 2, 3, 4], [4, 5, 6, 0, 1]]


def test_a_seed_repeats_and_another_differs():
    def draw(seed):
        return generate(Successor(), PROMPT, 30, max_seq_len=8, seed=seed)

    assert draw(1).equal(draw(1))
    assert not draw(1).equal(draw(2))


def test_top_k_keeps_to_the_best():
    out = generate(Successor(), PROMPT, 60, max_seq_len=8, top_k=2, temperature=5.0, seed=0)
    hops = {int(hop) for hop in ((out[:, 1:] - out[:, :-1]) % 7).flatten()}
    assert hops == {1, 2}


def test_the_model_sees_at_most_max_seq_len():
    model = Successor()
    generate(model, PROMPT, 5, max_seq_len=3)
    assert model.lengths == [1, 2, 3, 3, 3]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (dict(steps=-1), "steps must be at least 0, got -1"),
        (dict(temperature=-1.0), "temperature must be at least 0, got -1.0"),
        (dict(top_k=0), "top_k must be at least 1 or None, got 0"),
        (dict(tokens=torch.ones(3, dtype=torch.int64)), r"tokens must be \[B, S\]"),
    ],
)
def test_errors(options, text):
    arguments = dict(tokens=PROMPT, steps=1, max_seq_len=4) | options
    with pytest.raises(ValueError, match=text):
        generate(Successor(), arguments.pop("tokens"), arguments.pop("steps"), **arguments)
