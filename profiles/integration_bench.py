"""Training steps of transformers' models: as they are, and with our hyper-connections in place.

Every model is a trunk of few layers at its published width, random weights and a small head, made
on the device in bf16 with what `from_pretrained` keeps in fp32. Few experts, few heads and a small
vocabulary leave the hyper-connections visible. Experts are transformers' "grouped_mm", which
compiles without graph breaks, and Dynamo may capture outputs of unknown size (GLM-5-next selects
pools of tokens), so that every model is one graph. GLM-5-next has its indexed attention alone:
without a package of kernels its linear attention is a Python loop, which neither side changes.
"""

from __future__ import annotations

import gc
import re
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

import hc_compile as hc
from profiles.dense_net import cold_caches, timed_steps, warm_compiler
from profiles.timing import peak_growth, synchronize

TOLERANCE = 5e-2  # of the median token's logits, relative; bf16 has 8 bits
ROUTED = {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1}
MLA = {"q_lora_rank": 1536, "kv_lora_rank": 512, "v_head_dim": 256, "index_topk": 512}
SIZES: dict[str, dict[str, Any]] = {
    "deepseek_v4": ROUTED
    | {"hidden_size": 4096, "moe_intermediate_size": 2048, "num_attention_heads": 16}
    | {"index_n_heads": 16, "index_topk": 128},
    "glm5_next": (ROUTED | MLA)
    | {"hidden_size": 4096, "moe_intermediate_size": 2048, "num_attention_heads": 16}
    | {"num_key_value_heads": 16, "index_n_heads": 16},
    "hy_v4": (ROUTED | MLA)
    | {"hidden_size": 2816, "moe_intermediate_size": 768, "num_attention_heads": 16},
    "llama": {"hidden_size": 2560, "intermediate_size": 6912, "num_attention_heads": 20},
}
TINY_ROUTED = ROUTED | {
    "hidden_size": 32, "moe_intermediate_size": 16, "num_attention_heads": 2, "head_dim": 16,
    "num_key_value_heads": 2, "qk_rope_head_dim": 8, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_nope_head_dim": 16, "v_head_dim": 16, "index_n_heads": 2, "index_head_dim": 16,
    "index_topk": 16, "hc_sinkhorn_iters": 3,
}  # fmt: skip
TINY: dict[str, dict[str, Any]] = {
    "deepseek_v4": TINY_ROUTED
    | {"num_key_value_heads": 1, "o_lora_rank": 8, "o_groups": 1, "sliding_window": 8}
    | {"compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4}},
    "glm5_next": TINY_ROUTED | {"head_dim": 0, "qk_rope_head_dim": 0},
    "hy_v4": TINY_ROUTED,
    "llama": {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2},
}
MODELS = tuple(SIZES)
LAYERS = {"llama": 4}  # of the others 2
TITLES = {
    "deepseek_v4": "DeepSeek-V4",
    "glm5_next": "GLM-5-next, text",
    "hy_v4": "HY-V4",
    "llama": "Llama → mHC",
}


@dataclass(frozen=True)
class Way:
    """Whose hyper-connections, and a compiler (None leaves the model eager)."""

    ours: bool
    compile: Callable | None


WAYS: dict[str, Way] = {
    "original, eager": Way(False, None),
    "original, torch.compile": Way(False, partial(torch.compile, dynamic=False)),
    "ours, eager": Way(True, None),
    "ours, hc.compile": Way(True, partial(hc.compile, dynamic=False)),
}


@dataclass(frozen=True)
class Batch:
    """Tokens [batch, length] out of a vocabulary."""

    batch: int
    length: int
    vocabulary: int


class Network(nn.Module):
    """A trunk of transformers, a head and the loss."""

    def __init__(self, trunk: nn.Module, vocabulary: int, kind: dict[str, Any]) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = nn.Linear(trunk.config.hidden_size, vocabulary, bias=False, **kind)  # type: ignore[union-attr]

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Loss, and logits [B, S, V] without their graph."""
        logits = self.head(self.trunk(ids, use_cache=False)[0])
        return F.cross_entropy(logits.float().flatten(0, 1), ids.flatten()), logits.detach()


def configure(name: str, layers: int, batch: Batch, tiny: bool) -> Any:
    """The configuration of one model."""
    import transformers

    sizes = (TINY if tiny else SIZES)[name]
    sizes = sizes | {"num_hidden_layers": layers, "vocab_size": batch.vocabulary}
    sizes |= {"max_position_embeddings": batch.length, "pad_token_id": 0}
    sizes |= {"bos_token_id": 1, "eos_token_id": 2}
    if name == "llama":
        return transformers.LlamaConfig(**sizes)
    if name == "deepseek_v4":
        types = ("compressed_sparse_attention", "heavily_compressed_attention")
        kinds = [types[k % 2] for k in range(layers)]
        own = {"layer_types": kinds, "mlp_layer_types": ["moe"] * layers}
        return transformers.DeepseekV4Config(**sizes, **own)
    sizes["mlp_layer_types"] = ["sparse"] * layers
    if name == "hy_v4":
        return transformers.HYV4Config(**sizes)
    from transformers.models.glm5_next.configuration_glm5_next import Glm5NextTextConfig

    return Glm5NextTextConfig(**sizes, layer_types=["indexed_attention"] * layers)


def build(name: str, layers: int, batch: Batch, device: str) -> Network:
    """One model on the device; tiny and in float32 on a CPU."""
    import transformers

    cuda = device.startswith("cuda")
    kind = {"device": device, "dtype": torch.bfloat16 if cuda else torch.float32}
    config = configure(name, layers, batch, tiny=not cuda)
    experts = {} if name == "llama" else {"experts_implementation": "grouped_mm"}
    torch.manual_seed(0)
    with torch.device(device):
        trunk = transformers.AutoModel.from_config(config, dtype=kind["dtype"], **experts)
    keep_float32(trunk)
    return Network(trunk, batch.vocabulary, kind).train()


def keep_float32(trunk: nn.Module) -> None:
    """Widen what `from_pretrained` keeps in float32 whatever the model's dtype."""
    names = getattr(trunk, "_keep_in_fp32_modules_strict", None) or ()
    kept = [re.compile(rf"(^|\.){re.escape(name)}(\.|$)") for name in names]
    for name, tensor in chain(trunk.named_parameters(), trunk.named_buffers()):
        if any(pattern.search(name) for pattern in kept):
            tensor.data = tensor.data.float()


def change(name: str, trunk: nn.Module) -> None:
    """Ours in place: `apply` for a model with hyper-connections, `hc.convert` for Llama."""
    if name == "llama":
        hc.convert(trunk, hc.HCConfig(trunk.config.hidden_size, preset="mhc"))  # type: ignore[union-attr]
        return
    from hc_compile.integrations.transformers import apply

    apply(trunk)


def differences(found: Tensor, expected: Tensor) -> dict[str, float]:
    """‖Δlogits‖ ÷ ‖logits‖ of the median and of the worst token, whose routing may flip."""
    found, expected = found.float(), expected.float()
    relative = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    return {"difference": relative.median().item(), "worst_difference": relative.max().item()}


def measure_way(
    network: Network, way: Way, ids: Tensor, expected: Tensor, device: str, repeats: int
) -> dict[str, Any]:
    """A training step of one way, once its logits agree; first call from cold caches."""
    run = network if way.compile is None else way.compile(network)
    parameters = [p for p in network.parameters() if p.requires_grad]

    def step() -> object:
        return torch.autograd.grad(run(ids)[0], parameters, allow_unused=True)

    began = time.perf_counter()
    with cold_caches():
        step()
        synchronize(device)
    first = time.perf_counter() - began
    record: dict[str, Any] = differences(run(ids)[1], expected)
    if not record["difference"] <= TOLERANCE:
        raise ValueError(f"logits must agree, got {record}")
    growth = peak_growth(step, device)
    resident = sum(t.numel() * t.element_size() for t in network.parameters())
    return record | {
        "step_ms": statistics.median(timed_steps(step, device, repeats)),
        "peak_gb": None if growth is None else (growth + resident) / 1e9,
        "first_seconds": first,
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": sum(counters["graph_break"].values()),
    }


def release(device: str) -> None:
    """Forget what was compiled and free what is no longer held."""
    torch.compiler.reset()
    counters.clear()
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def measure_model(
    name: str, ways: list[str], layers: int | None, batch: Batch, device: str, repeats: int
) -> Iterator[dict[str, Any]]:
    """A record for every way, those of the original first; a way that fails says why."""
    layers = layers or LAYERS.get(name, 2)
    network = build(name, layers, batch, device)
    ids = torch.randint(1, batch.vocabulary, (batch.batch, batch.length), device=device)
    facts = {"model": name, "width": network.trunk.config.hidden_size, "layers": layers}  # type: ignore[union-attr]
    with torch.no_grad():
        expected = network(ids)[1]
    if any(WAYS[way].compile for way in ways):
        warm_compiler(device)
    ours = False
    for label in sorted(ways, key=list(WAYS).index):
        if WAYS[label].ours and not ours:
            change(name, network.trunk)
            ours = True
        release(device)
        try:
            with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
                found = measure_way(network, WAYS[label], ids, expected, device, repeats)
        except Exception as error:  # another project's model must not end a long run
            found = {"failed": f"{type(error).__name__}: {error}"[:300]}
        yield facts | {"way": label} | found
