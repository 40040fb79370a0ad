"""Models of transformers with their hyper-connections replaced: equal, and back again."""

import copy

import pytest
import torch
import transformers
from transformers.models.glm5_next.configuration_glm5_next import Glm5NextTextConfig
from transformers.models.glm5_next.modeling_glm5_next import Glm5NextTextModel

from hc_compile.integrations import transformers as integration
from tests.conftest import worst
from tests.passes.harness import with_passes

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 2, "hc_mult": 4}
SIZES |= {"head_dim": 16, "qk_rope_head_dim": 8, "q_lora_rank": 16, "moe_intermediate_size": 16}
SIZES |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}
SIZES |= {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 4, "num_hidden_layers": 2}
SIZES |= {"max_position_embeddings": 64, "pad_token_id": 0, "hc_eps": 1e-5}
SIZES |= {"bos_token_id": 1, "eos_token_id": 2}
INDEXED = {"intermediate_size": 32, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
INDEXED |= {"num_key_value_heads": 2, "mlp_layer_types": ["dense", "sparse"]}
TOLERANCE = 1e-4  # DeepSeek-V4's router has gradients of rounding alone, 6e-9 where zero is true
FAMILIES = ["deepseek_v4", "glm5_next", "hy_v4"]


def build(family):
    """A tiny model: with a head for generation, of GLM-5-next the text trunk alone."""
    if family == "glm5_next":
        own = {"head_dim": 0, "qk_rope_head_dim": 0, "index_topk": 16, "hc_sinkhorn_iters": 5}
        own |= {"layer_types": ["linear_attention", "indexed_attention"]}
        return Glm5NextTextModel(Glm5NextTextConfig(**(SIZES | INDEXED | own)))
    if family == "deepseek_v4":
        own = {"o_lora_rank": 8, "o_groups": 1, "sliding_window": 8, "hc_sinkhorn_iters": 5}
        config = transformers.DeepseekV4Config(**SIZES, **own)
    else:
        config = transformers.HYV4Config(**SIZES, **INDEXED, hc_magnitude=1.5)
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.fixture(params=FAMILIES)
def model(request):
    torch.manual_seed(0)
    model = build(request.param).eval()
    for k, (name, p) in enumerate(model.named_parameters()):
        if "hc" in name:  # transformers starts some of them at zero
            generator = torch.Generator().manual_seed(k)
            p.data = p.data + 0.3 * torch.randn(p.shape, generator=generator)
    return model


def tokens(length=12):
    return torch.randint(1, 64, (2, length), generator=torch.Generator().manual_seed(0))


def output(model, ids):
    """Logits, or the last hidden state of a trunk."""
    return model(ids, use_cache=False)[0]


def logits_and_gradients(model, ids):
    logits = output(model, ids)
    cotangent = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(logits, parameters, cotangent.to(logits), allow_unused=True)
    return [logits, *grads]


def assert_close(ours, theirs, tolerance):
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        assert a is None or worst(a, b) <= tolerance


def test_logits_and_every_gradient_are_equal(model):
    theirs = logits_and_gradients(model, tokens())
    names, kept = list(model.state_dict()), dict(model.named_parameters())
    assert integration.apply(model) is model
    assert_close(logits_and_gradients(model, tokens()), theirs, TOLERANCE)
    assert list(model.state_dict()) == names
    assert all(p is kept[name] for name, p in model.named_parameters())


def test_every_connection_and_layer_is_ours(model):
    """None of the originals' forwards is left to run, but for a head that is a plain mean."""
    integration.apply(model)
    for module in model.modules():
        named = any(word in type(module).__name__ for word in ("Hyper", "DecoderLayer"))
        if named and module.state_dict():
            assert type(module).__module__ == integration.__name__


@pytest.mark.parametrize("model", ["deepseek_v4", "hy_v4"], indirect=True)
def test_generation_with_cache_is_the_same(model):
    def generate():
        return model.generate(tokens(6), max_new_tokens=8, do_sample=False)

    theirs = generate()
    integration.apply(model)
    assert torch.equal(generate(), theirs)


def test_gradient_checkpointing(model):
    integration.apply(model.train())
    plain = logits_and_gradients(model, tokens())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_close(logits_and_gradients(model, tokens()), plain, 1e-6)


def test_apply_twice_and_remove(model):
    theirs = logits_and_gradients(model, tokens())
    classes = [type(m) for m in model.modules()]
    integration.apply(integration.apply(model))
    assert [type(m) for m in integration.remove(model).modules()] == classes
    assert_close(logits_and_gradients(model, tokens()), theirs, 0.0)


def rebuilt(model):
    """Another model of the same configuration, made as `from_pretrained` makes it."""
    known = isinstance(model, Glm5NextTextModel)
    make = transformers.AutoModel if known else transformers.AutoModelForCausalLM
    return make.from_config(model.config)


def test_whole_model_is_one_graph_with_every_seam_fused(model):
    """Four sublayers: the first reads one stream, a learned head is one more boundary."""
    integration.apply(model)
    counts = {}
    compiled = with_passes(lambda ids: output(model, ids), counts=counts, fullgraph=True)
    assert_close([compiled(tokens())], [output(model, tokens())], 1e-5)
    head = any("HyperHead" in type(m).__name__ and m.state_dict() for m in model.modules())
    assert "pre" not in counts and counts["post_pre"] == 3 + head
    assert counts.get("post", 0) == (not head)


def test_patched_models_are_built_with_ours(model):
    integration.patch()
    try:
        patched = rebuilt(model).eval()
    finally:
        integration.unpatch()
    patched.load_state_dict(model.state_dict())
    integration.apply(patched)  # nothing is left to swap, and that is no error
    assert_close(
        logits_and_gradients(patched, tokens()), logits_and_gradients(model, tokens()), TOLERANCE
    )
    again = rebuilt(model)
    assert [type(m) for m in again.modules()] == [type(m) for m in model.modules()]


def test_bfloat16_is_no_further_from_float32(model):
    """Errors against the original in float32, which is as wide as its coefficients ever are."""

    def error(ours):
        narrow = copy.deepcopy(model).to(torch.bfloat16)
        ours and integration.apply(narrow)
        return worst(output(narrow, tokens()), exact)

    exact = output(model, tokens())
    assert error(ours=True) <= 1.25 * error(ours=False) + 1e-2


def test_a_model_without_hyper_connections_is_refused():
    with pytest.raises(ValueError, match=r"model must hold layers of one of .*got Linear"):
        integration.apply(torch.nn.Linear(2, 2))
