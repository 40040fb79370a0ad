"""Prefill and decode through a cache: equal to the whole context, two graphs, static buffers."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

import hc_compile as hc
from hc_compile.layers import apply_rope
from hc_compile.models import Transformer, TransformerConfig, generate
from tests.models.cases import ids

SMALL = dict(vocab_size=37, dim=16, layers=2, heads=2, ffn_dim=24, max_seq_len=32)


def make(preset="mhc", dtype=torch.float64, streams=None, **options):
    """A model whose connections are away from their initial values."""
    torch.manual_seed(0)
    cfg = TransformerConfig(**(SMALL | options), hc=hc.HCConfig(16, streams, preset))
    model = Transformer(cfg, dtype=dtype)
    for name, parameter in model.named_parameters():
        if ".hc_" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model.requires_grad_(False)


def pieces(model, inputs, cuts, cache):
    """Logits of `inputs` given to the cache in pieces of these lengths."""
    parts = [model(piece, cache=cache) for piece in inputs.split(cuts, dim=1)]
    return torch.cat(parts, 1)


CUTS = [[9], [1] * 9, [5, 1, 1, 1, 1], [4, 3, 2], [1, 7, 1]]


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize(("preset", "streams"), [(p, None) for p in hc.PRESETS] + [("mhc", 1)])
def test_cache_equals_the_whole_context(preset, streams, cuts):
    model = make(preset, streams=streams)
    cache, inputs = model.new_cache(2), ids()
    torch.testing.assert_close(
        pieces(model, inputs, cuts, cache), model(inputs), rtol=0, atol=1e-10
    )
    assert cache.length.tolist() == [9, 9]


def test_the_last_of_8192_positions():
    model = make("shc", layers=1, max_seq_len=8192)
    inputs, cache = ids(1, 8192), model.new_cache(1)
    parts = pieces(model, inputs, [8000, 190, 1, 1], cache)
    torch.testing.assert_close(parts[:, -200:], model(inputs)[:, -200:], rtol=0, atol=1e-10)


def test_rows_have_lengths_of_their_own():
    """Prompts padded on the right, then tokens that each continue their own row."""
    model, cache = make(), None
    inputs, lengths = ids(3, 12), torch.tensor([7, 3, 5])
    cache = model.new_cache(3)
    prompt = model(inputs[:, :7], cache=cache)
    cache.reset(lengths)
    steps = [model(inputs[range(3), lengths + k].unsqueeze(1), cache=cache) for k in range(5)]
    whole = model(inputs)
    for row, length in enumerate(lengths.tolist()):
        own = torch.cat([prompt[row, :length], *(step[row] for step in steps)])
        torch.testing.assert_close(own, whole[row, : length + 5], rtol=0, atol=1e-10)


def test_reset_takes_tokens_back_and_starts_anew():
    model, inputs = make(), ids()
    cache = model.new_cache(2)
    model(ids(seed=3), cache=cache)
    cache.reset(0)
    model(inputs[:, :5], cache=cache)
    model(ids(length=2, seed=4), cache=cache)
    cache.reset(5)
    rest = model(inputs[:, 5:], cache=cache)
    torch.testing.assert_close(rest, model(inputs)[:, 5:], rtol=0, atol=1e-10)


def test_buffers_stay_where_they_are():
    model = make()
    cache = model.new_cache(2, 12)
    buffers = [*cache.keys, *cache.values, cache.length]
    places = [buffer.data_ptr() for buffer in buffers]
    pieces(model, ids(), [5, 2, 1, 1], cache)
    cache.reset(0)
    assert [b.data_ptr() for b in (*cache.keys, *cache.values, cache.length)] == places
    assert cache.keys[0].shape == (2, 2, 12, 8)


def test_generation_is_greedy_over_the_whole_context():
    model, prompt = make(), ids(length=3)
    tokens = prompt
    for _ in range(8):
        tokens = torch.cat((tokens, model(tokens)[:, -1:].argmax(-1)), 1)
    cached = generate(model, prompt, 8, max_seq_len=32, temperature=0, cache=model.new_cache(2))
    assert cached.equal(tokens)


def test_bf16_streams_keep_a_bf16_cache():
    model = make(dtype=torch.float32, stream_dtype=torch.bfloat16)
    cache = model.new_cache(2)
    assert cache.keys[0].dtype == torch.bfloat16
    inputs = ids()
    cached, whole = pieces(model, inputs, [6, 1, 1, 1], cache), model(inputs)
    exact = make(dtype=torch.float32)(inputs)
    assert (cached - exact).abs().max() <= 2 * (whole - exact).abs().max() + 1e-2


@pytest.mark.parametrize("preset", ["residual", "dhc", "mhc", "mhc-v4"])
def test_two_graphs_serve_every_length(preset):
    """One of T = 1 and one of T >= 2, whatever the prompt, the position and the cache."""
    model, counter = make(preset, layers=1), CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for length in (2, 5, 1, 17):
        prompt = ids(length=length)
        out = generate(
            compiled, prompt, 6, max_seq_len=32, temperature=0, cache=model.new_cache(2)
        )
        plain = generate(model, prompt, 6, max_seq_len=32, temperature=0, cache=model.new_cache(2))
        assert out.equal(plain)
    assert counter.frame_count == 2


def test_pieces_need_a_third_graph_and_no_more():
    model, counter = make(layers=1), CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)

    def serve(cuts):
        cache, parts = model.new_cache(2), []
        for piece in ids(length=sum(cuts)).split(cuts, dim=1):
            piece = piece.clone()  # a view's offset would be guarded
            if piece.shape[1] > 1:
                torch._dynamo.maybe_mark_dynamic(piece, 1)
            parts.append(compiled(piece, cache=cache))
        torch.testing.assert_close(
            torch.cat(parts, 1), model(ids(length=sum(cuts))), rtol=0, atol=1e-10
        )

    serve([5, 3, 1, 1])
    assert counter.frame_count == 3
    with torch.compiler.set_stance("fail_on_recompile"):
        for cuts in ([2, 1, 1, 1], [9, 4, 1, 2], [1, 1, 11, 6, 1]):
            serve(cuts)


def test_decoding_can_be_captured():
    """All that a compiled step writes is static, and nothing in it waits for the device."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._guards import TracingContext

    seen = []

    def compiler(gm, inputs):
        meta = TracingContext.get().fw_metadata
        assert set(meta.mutated_inp_runtime_indices) <= set(meta.static_input_indices)
        seen.append(len(meta.mutated_inp_runtime_indices))
        names = {str(node.target) for node in gm.graph.nodes}
        assert not any("_local_scalar_dense" in n or "nonzero" in n for n in names)
        return gm

    model, inputs = make(), ids()
    step = torch.compile(model, backend=aot_autograd(fw_compiler=compiler), fullgraph=True)
    cache = model.new_cache(2)
    with torch.no_grad():
        torch.testing.assert_close(
            pieces(step, inputs, [7, 1, 1], cache), model(inputs), rtol=0, atol=1e-10
        )
    assert seen == [5, 5]  # keys and values of two layers, and the length


@pytest.mark.compile
def test_inductor_decodes():
    model = make("shc", layers=1)
    step, cache = hc.compile(model, fullgraph=True), model.new_cache(2)
    counters.clear()
    with torch.no_grad():
        got = pieces(step, ids(), [6, 1, 1, 1], cache)
    torch.testing.assert_close(got, model(ids()), rtol=0, atol=1e-10)
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.gpu
@pytest.mark.parametrize("preset", ["residual", "mhc"])
def test_cuda_graphs_decode(preset):
    """mode="reduce-overhead", and one eager step captured by hand, against eager code."""
    model = make(preset, dtype=torch.float32).cuda()
    inputs = ids(length=12).cuda()
    whole = model(inputs)
    step = hc.compile(model, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for _ in range(3):  # warm-up, recording, replay; each with a cache of its own
            cache, parts = model.new_cache(2), []
            for piece in inputs.split([7, 1, 1, 1, 1, 1], dim=1):
                parts.append(step(piece.clone(), cache=cache).clone())
            torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-3, atol=1e-4)
        cache, token = model.new_cache(2), inputs[:, 7:8].clone()
        with torch.cuda.stream(torch.cuda.Stream()):
            model(token, cache=cache)
            cache.reset(0)
            model(inputs[:, :7], cache=cache)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                logits = model(token, cache=cache)
            for at in range(7, 12):
                token.copy_(inputs[:, at : at + 1])
                graph.replay()
                torch.testing.assert_close(logits[:, 0], whole[:, at], rtol=1e-3, atol=1e-4)


def test_errors():
    model = make()
    with pytest.raises(ValueError, match=r"max_seq_len must be in \[1, 32\], got 33"):
        model.new_cache(2, 33)
    with pytest.raises(ValueError, match=r"cache must hold S \+ steps = 14, got 12"):
        generate(model, ids(), 5, max_seq_len=32, cache=model.new_cache(2, 12))
    with pytest.raises(ValueError, match=r"tokens must be \[2, S\], as the cache, got \[3, 9\]"):
        model(ids(3), cache=model.new_cache(2))
    with pytest.raises(IndexError):
        model(ids(), cache=model.new_cache(2, 8))
    with pytest.raises(ValueError, match=r"\[S, D/2\] = \[3, 4\] or \[B, 1, S, D/2\]"):
        apply_rope(torch.ones(2, 2, 3, 8), *[torch.ones(3, 1, 3, 4)] * 2)
