"""Tiny models that hc.convert knows, and what its tests measure of them."""

import copy

import torch
import transformers

import hc_compile as hc
from tests.integrations import vit

SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "head_dim": 8}
TEXT = {
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=64, **TOKENS
    ),
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=4),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **SIZES, moe_intermediate_size=8, num_experts=4, num_experts_per_tok=2
    ),
    "gemma": lambda: transformers.GemmaConfig(**SIZES),
}
TOKENS = {name: SIZES[name] for name in SIZES if "token" in name}
FAMILIES = [*TEXT, "vit"]
TWINS = [name for name, row in hc.PRESETS.items() if row.equals_residual]


def build(family, dtype=torch.float64, seed=0):
    """A tiny model in evaluation, its weights and biases drawn well away from their defaults."""
    torch.manual_seed(seed)
    if family == "vit":
        model = vit.build()
    else:
        model = transformers.AutoModelForCausalLM.from_config(
            TEXT[family](), experts_implementation="eager"
        )
    for k, parameter in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(k)
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.to(dtype).eval()


def config(**options):
    return hc.HCConfig(16, **options)


def converted(model, **options):
    return hc.convert(copy.deepcopy(model), config(**options))


def inputs(model, length=10):
    generator = torch.Generator().manual_seed(0)
    if hasattr(model, "config"):
        return torch.randint(3, 64, (2, length), generator=generator)
    return torch.randn(2, 3, 8, 8, generator=generator).to(next(model.parameters()))


def output(model, given=None):
    given = inputs(model) if given is None else given
    out = model(given, use_cache=False) if hasattr(model, "config") else model(given)
    return out if isinstance(out, torch.Tensor) else out.logits


def output_and_gradients(model):
    """The output, and the gradient of every parameter by name."""
    out = output(model)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    named = dict(model.named_parameters())
    grads = torch.autograd.grad(out, list(named.values()), cotangent)
    return out.detach(), dict(zip(named, grads, strict=True))


def move(model):
    """Coefficients that are no longer those of a residual."""
    for k, (name, parameter) in enumerate(model.named_parameters()):
        if "hc_" in name:
            generator = torch.Generator().manual_seed(k)
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model
