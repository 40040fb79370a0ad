"""TransformerWithHC: the six groups its users know, then twins, checkpoints and compiling."""

import pytest
import torch

import hc_compile as hc
from hc_compile.compat.with_hc import HyperConnection
from hc_compile.models import TransformerLayerWithHC, TransformerWithHC
from tests.models.cases import VARIANTS, ids, loss_of, make, move, randn

SIZES = {  # hidden size, layers, heads: all parameters, those without embeddings, nominal
    (768, 12, 12): (125_337_456, 85_167_216, 117e6),
    (1024, 24, 16): (356_167_904, 302_607_584, 350e6),
    (1536, 32, 24): (987_543_680, 907_203_200, 1e9),
}


# group 1: the block alone
@pytest.mark.parametrize("n", [1, 2, 4, 8])
@pytest.mark.parametrize("name", VARIANTS)
def test_block_writes_what_the_paper_says(name, n):
    block = HyperConnection(16, n, **VARIANTS[name], layer_index=1).double()
    x, y = randn(2, 5, n, 16), randn(2, 5, 16, seed=1)
    assert (block(y, x.mean(-2)) - (x.mean(-2) + y)).abs().max() < 1e-12  # the residual at first
    move(block)
    if n == 1:
        assert torch.equal(block(y, x), x + y.unsqueeze(-2))
        return
    c = block.core.coefficients
    pre, post, res = c.bias.split([n, n, n * n])
    pre, post, res = pre.expand(2, 5, n), post.expand(2, 5, n), res.view(n, n).expand(2, 5, n, n)
    if name != "shc":
        norm = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        z = norm @ c.phi.T  # [2, 5, n, 2 + n]: W_m, W_β and W_r of every stream
        z = torch.tanh(z) if name == "dhc" else z
        pre, post = pre + c.alpha[0] * z[..., 0], post + c.alpha[1] * z[..., 1]
        res = res + c.alpha[0] * z[..., 2:]
    expected = res.mT @ x + post.unsqueeze(-1) * y.unsqueeze(-2)  # A_rᵀ H + B yᵀ
    assert (block(y, x) - expected).abs().max() < 1e-12
    assert (block.read(x) - (pre.unsqueeze(-2) @ x).squeeze(-2)).abs().max() < 1e-12


# group 2: the layer
def test_layer_keeps_streams_and_serves_a_block_used_alone():
    layer = TransformerLayerWithHC(16, 2, 32, dropout=0.0).double()
    move(layer)
    x = randn(2, 5, 16)
    streams = layer(hc.expand_streams(x, layer.hc), is_causal=True)
    assert streams.shape == (2, 5, 4, 16)
    assert (streams - streams.mean(-2, keepdim=True)).abs().max() > 1e-3
    torch.testing.assert_close(layer(x, is_causal=True), hc.reduce_streams(streams, layer.hc))


# group 3: the model
@pytest.mark.parametrize("size", SIZES)
def test_three_sizes_have_their_exact_counts(size):
    with torch.device("meta"):
        model = TransformerWithHC(50257, *size)
    every, without, nominal = SIZES[size]
    assert (model.get_num_params(False), model.get_num_params()) == (every, without)
    assert abs(every / nominal - 1) < 0.08
    c, layers, _ = size
    body = layers * (12 * c * c + 13 * c) + 2 * c  # the plain GPT-2 body
    connections = 2 * layers * (6 * c + 2 + 24)  # φ [6, C], 2 gates, b [4 + 4 + 16]
    assert without == body + connections


def test_logits_tie_the_embedding():
    model = make(dropout=0.1)
    assert model(ids()).shape == (2, 9, 37)
    assert model.lm_head.weight is model.token_embedding.weight
    assert "lm_head.weight" not in dict(model.named_parameters())
    loss_of(model).backward()
    unused = [row for row in range(37) if row not in ids()]
    assert (model.token_embedding.weight.grad[unused].abs().sum(-1) > 0).all()


# group 4: backward
@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_learns_within_three_steps(name):
    model = make(**VARIANTS[name])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = dict.fromkeys(dict(model.named_parameters()), 0.0)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        for key, parameter in model.named_parameters():
            assert parameter.grad.isfinite().all(), key
            seen[key] = max(seen[key], float(parameter.grad.abs().max()))
        optimizer.step()
    assert [key for key, size in seen.items() if size == 0] == []


# groups 5 and 6: expansion rates, and DHC against SHC
@pytest.mark.parametrize("n", [2, 4, 8])
@pytest.mark.parametrize("name", VARIANTS)
def test_starts_as_its_residual_twin_and_leaves_it(name, n):
    model = make(expansion_rate=n, dtype=torch.float64, **VARIANTS[name])
    twin = make(expansion_rate=1, dtype=torch.float64)
    missing, unexpected = twin.load_state_dict(model.state_dict(), strict=False)
    assert not missing and all("_hc." in key for key in unexpected)
    assert (model(ids()) - twin(ids())).abs().max() < 1e-12
    move(model)
    assert (model(ids()) - twin(ids())).abs().max() > 1e-3


def test_variants_differ_once_trained():
    models = [make(moved=True, dtype=torch.float64, **options) for options in VARIANTS.values()]
    for model in models:
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.endswith(".alpha"):
                    p.fill_(1.0)
    outs = [model(ids()) for model in models]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (outs[a] - outs[b]).abs().max() > 1e-4
    counts = [model.get_num_params() for model in models]
    assert counts[0] == counts[1] == counts[2] + 2 * 2 * (6 * 16 + 2)


def test_streams_run_through_the_stack():
    """A model that merged them at every layer would feed every layer equal streams."""
    model, seen = make(moved=True), []
    model.layers[1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(ids())
    assert (seen[0] - seen[0].mean(-2, keepdim=True)).abs().max() > 1e-3


def test_checkpointing_changes_no_gradient():
    model = make(moved=True, dropout=0.2)
    grads = []
    for enable in (False, True):
        (model.enable_gradient_checkpointing if enable else model.disable_gradient_checkpointing)()
        assert model.is_gradient_checkpointing == enable
        torch.manual_seed(1)
        model.zero_grad()
        loss_of(model).backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]), name


def test_output_projections_are_drawn_wider():
    torch.manual_seed(0)
    layer = TransformerWithHC(11, 64, 1, 4, max_seq_length=4, expansion_rate=4).layers[0]
    for weight, std in (
        (layer.attention.out_proj.weight, 0.04),
        (layer.ffn[3].weight, 0.04),
        (layer.ffn[0].weight, 0.02),
        (layer.attention.qkv.weight, 0.02),
    ):
        assert abs(weight.std().item() / std - 1) < 0.1


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: make(num_layers=0), "num_layers must be at least 1, got 0"),
        (lambda: make(num_heads=3), "num_heads must divide hidden_size = 16, got 3"),
        (lambda: make(expansion_rate=0), "streams must be >= 1, got 0"),
        (lambda: make()(ids()[0]), r"input_ids must be \[B, S\], got \[9\]"),
        (lambda: make()(ids(length=13)), "within max_seq_length = 12, got 13"),
        (
            lambda: make()(ids(), torch.ones(9, 9)),
            r"attention_mask must be \[B, T\] = \[2, 9\], got \[9, 9\]",
        ),
        (lambda: make().generate(ids(), 9), r"cache must hold S \+ steps = 18, got 12"),
    ],
)
def test_errors(call, text):
    with pytest.raises(ValueError, match=text):
        call()


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("padded", [False, True])
def test_fullgraph_traces_the_model_and_its_backward(name, padded):
    model = make(moved=True, num_layers=1, **VARIANTS[name])
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, 7:] = 0
    options = (mask,) if padded else ()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compare_compiled(model, compiled, options)


def test_every_boundary_between_sublayers_fuses():
    """Boundary fusion finds all 2·layers − 1 of them; one pre and one post are left."""
    from hc_compile.passes.fuse_post_pre import fuse_post_pre

    counts = []

    def backend(graph_module, inputs):
        fuse_post_pre(graph_module.graph)
        targets = [str(node.target) for node in graph_module.graph.nodes]
        counts.append([sum(name in t for t in targets) for name in ("post_pre", "hc.p")])
        graph_module.recompile()
        return graph_module

    model = make(num_layers=3).requires_grad_(False)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(ids()), model(ids()))
    assert counts == [[5, 7]]


@pytest.mark.compile
def test_inductor_compiles_the_model():
    model = make(moved=True, num_layers=1)
    compare_compiled(model, hc.compile(model, fullgraph=True), ())


def compare_compiled(model, compiled, options):
    cot, results = randn(2, 9, 37, dtype=torch.float32), []
    for run in (model, compiled):
        model.zero_grad()
        out = run(ids(), *options)
        out.backward(cot)
        results.append([out.detach(), *(p.grad.clone() for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() <= 1e-4 * a.abs().max() + 1e-5
