"""hc.convert: what it takes for a known layer, what it refuses, and the recipe for the rest."""

import ast
import importlib
import inspect
import textwrap

import pytest
import torch
import transformers
from torch import nn

import hc_compile as hc
from hc_compile.integrations import convert as module
from hc_compile.integrations.prenorm import LLAMA_LIKE
from tests.conftest import worst
from tests.integrations.cases import SIZES, TEXT, build, config, converted, inputs, move


def forward_of(cls):
    """A forward's statements without its docstring."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(cls.forward)))).body[0]
    return ast.unparse(ast.Module(tree.body, []))


@pytest.mark.parametrize("name", LLAMA_LIKE)
def test_every_llama_like_layer_is_llamas(name):
    """Its forward word for word, and its model does nothing between layers."""
    theirs = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    llama = importlib.import_module("transformers.models.llama.modeling_llama")
    layer = getattr(theirs, f"{LLAMA_LIKE[name]}DecoderLayer")
    assert forward_of(layer).replace("_, ", "") == forward_of(llama.LlamaDecoderLayer)
    whole = ast.parse(forward_of(getattr(theirs, f"{LLAMA_LIKE[name]}Model")))
    (loop,) = (s for s in ast.walk(whole) if isinstance(s, ast.For) and "self.layers" in
               ast.unparse(s.iter))  # fmt: skip
    assert len(loop.body) == 1
    assert ast.unparse(loop.body[0]).startswith("hidden_states = decoder_layer(hidden_states, ")


def nothing_changed(model, text, cfg=None, error=ValueError):
    """It is refused with this text and left as it was."""
    classes, keys = [type(m) for m in model.modules()], list(model.state_dict())
    with pytest.raises(error, match=text):
        hc.convert(model, config() if cfg is None else cfg)
    assert [type(m) for m in model.modules()] == classes and list(model.state_dict()) == keys


def encoder():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, batch_first=True), 2)


def bert():
    return transformers.BertModel(transformers.BertConfig(**SIZES))


def with_foreign_layer():
    model = build("llama")
    model.model.layers[1] = nn.Identity()
    return model


def with_shared_layer():
    model = build("llama")
    model.model.layers[1] = model.model.layers[0]
    return model


def with_own_forward():
    model = build("llama")
    layer = model.model.layers[1]
    layer.forward = layer.forward
    return model


def cross_attending():
    cfg = TEXT["gpt2"]()
    cfg.add_cross_attention = True
    return transformers.GPT2Model(cfg)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (encoder, "got TransformerEncoder with layers of TransformerEncoderLayer"),
        (bert, "GPT2Model.*VisionTransformer.*got BertModel with layers of BertLayer"),
        (lambda: nn.Linear(2, 2), "got Linear"),
        (with_foreign_layer, "must have layers of LlamaDecoderLayer, got Identity"),
        (with_shared_layer, "distinct layers, got none or a LlamaDecoderLayer twice"),
        (with_own_forward, "LlamaDecoderLayer must run the forward of its class"),
        (cross_attending, "alone, got crossattention: GPT2Attention"),
        (lambda: nn.ModuleList([build("llama"), build("gpt2")]), "one stack of layers"),
        (lambda: converted(build("llama")), "converted already"),
    ],
)
def test_refuses_a_model_by_the_name_of_what_it_does_not_know(make, text):
    nothing_changed(make(), text)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (dict(dim=8), "cfg.dim must be the width of LlamaModel, 16, got 8"),
        (dict(preset="mhc-v4"), "cfg.preset must equal the plain residual.*got 'mhc-v4'"),
        (dict(preset="ihc"), "cfg.preset must equal the plain residual.*got 'ihc'"),
        (dict(reduce="sum"), "cfg must start as the plain residual.*reduce='sum'"),
        (dict(reduce="head"), "cfg must start as the plain residual.*reduce='head'"),
        (dict(proposals=2), "cfg must start as the plain residual.*proposals=2"),
        (dict(iterations=0), "cfg must start as the plain residual.*iterations=0"),
        (dict(views=2), "cfg.views and cfg.branches must be 1, got 2 and 1"),
    ],
)
def test_refuses_a_configuration_that_would_lose_the_checkpoint(options, text):
    nothing_changed(build("llama"), text, hc.HCConfig(**({"dim": 16} | options)))


def test_refuses_what_is_no_configuration():
    nothing_changed(build("llama"), "cfg must be an HCConfig, got str", "mhc", TypeError)


def test_refuses_an_encoders_states():
    model = converted(build("gpt2"))
    with pytest.raises(ValueError, match="encoder_hidden_states must be None in a converted GPT2"):
        model.transformer(inputs(model), encoder_hidden_states=torch.randn(2, 3, 16).double())


class Site(nn.Module):
    """A residual block of nobody's library."""

    def __init__(self, dim):
        super().__init__()
        self.norm, self.f = nn.LayerNorm(dim), nn.Sequential(nn.Linear(dim, dim), nn.Tanh())

    def forward(self, x):
        return x + self.f(self.norm(x))


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.dim = 16
        self.blocks = nn.Sequential(*[Site(16) for _ in range(5)])

    def forward(self, x):
        return self.blocks(x)


def test_the_recipe_for_any_model():
    """The text of the module's docstring, run as it stands."""
    text = inspect.getdoc(module).split("\n\n", 2)[2]
    model, x = Plain(), torch.randn(2, 7, 16)
    before = model(x)
    exec(textwrap.dedent(text), {"nn": nn, "model": model})
    assert worst(model(x), before) <= 1e-6
    assert sum(isinstance(m, hc.HyperConnection) for m in model.modules()) == 5
    move(model)
    model(x).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
