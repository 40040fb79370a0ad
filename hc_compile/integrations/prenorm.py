"""Pre-norm transformers of other libraries as data for `hc.convert`: one row a class of layer."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Site:
    """x = x + after(branch(norm(x))), by names of a layer's submodules."""

    norm: str
    branch: str
    after: tuple[str, ...] = ()


@dataclass(frozen=True)
class Form:
    """How a model runs its layers.

    stack: attribute of the model that holds them. attention: the first residual site, which gets
    the layer's arguments. mlp: the second, which gets none.
    unused: arguments of the layer that the attention must not see and that must be None.
    """

    stack: str
    attention: Site
    mlp: Site
    unused: tuple[str, ...] = ()

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of all submodules that a layer may hold."""
        sites = (self.attention, self.mlp)
        return tuple(name for s in sites for name in (s.norm, s.branch, *s.after))


GPT2 = Form(
    "h",
    Site("ln_1", "attn"),
    Site("ln_2", "mlp"),
    unused=("encoder_hidden_states", "encoder_attention_mask"),
)
LLAMA = Form(
    "layers",
    Site("input_layernorm", "self_attn"),
    Site("post_attention_layernorm", "mlp"),
)
VIT = Form(
    "blocks",
    Site("norm1", "attn", ("ls1", "drop_path1")),
    Site("norm2", "mlp", ("ls2", "drop_path2")),
)
# module of transformers: prefix of its classes; every layer's forward is Llama's, word for word
LLAMA_LIKE = {
    "arcee": "Arcee",
    "deepseek_v3": "DeepseekV3",
    "ernie4_5": "Ernie4_5",
    "gemma": "Gemma",
    "glm": "Glm",
    "glm4_moe": "Glm4Moe",
    "helium": "Helium",
    "llama": "Llama",
    "ministral3": "Ministral3",
    "mistral": "Mistral",
    "olmo": "Olmo",
    "olmoe": "Olmoe",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3Moe",
    "seed_oss": "SeedOss",
    "smollm3": "SmolLM3",
    "starcoder2": "Starcoder2",
}
# Python module: (class that runs the layers, class of its layers, their form)
MODELS: dict[str, tuple[str, str, Form]] = {
    "transformers.models.gpt2.modeling_gpt2": ("GPT2Model", "GPT2Block", GPT2),
    "timm.models.vision_transformer": ("VisionTransformer", "Block", VIT),
} | {
    f"transformers.models.{name}.modeling_{name}": (
        f"{prefix}Model",
        f"{prefix}DecoderLayer",
        LLAMA,
    )
    for name, prefix in LLAMA_LIKE.items()
}
