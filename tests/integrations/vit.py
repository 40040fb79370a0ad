"""timm's VisionTransformer, or where timm isn't installed a stand-in under its module's name."""

import sys
from types import ModuleType

import torch
from torch import nn

NAME = "timm.models.vision_transformer"


class Attention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.mixer = nn.MultiheadAttention(dim, num_heads, batch_first=True)

    def forward(self, x, attn_mask=None, is_causal=False):
        return self.mixer(x, x, x, attn_mask=attn_mask, is_causal=is_causal)[0]


class LayerScale(nn.Module):
    def __init__(self, dim, value):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), value))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    def __init__(self, dim, num_heads, init_values, proj_drop_rate):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads)
        wide = nn.Linear(dim, 4 * dim)
        drop = nn.Dropout(proj_drop_rate)
        self.mlp = nn.Sequential(wide, nn.GELU(), nn.Linear(4 * dim, dim), drop)
        self.ls1, self.ls2 = LayerScale(dim, init_values), LayerScale(dim, init_values)
        self.drop_path1, self.drop_path2 = nn.Identity(), nn.Identity()

    def forward(self, x, attn_mask=None, is_causal=False):
        y = self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)
        x = x + self.drop_path1(self.ls1(y))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class VisionTransformer(nn.Module):
    def __init__(self, embed_dim, depth, num_heads, init_values, proj_drop_rate, **sizes):
        super().__init__()
        self.embed_dim, patch = embed_dim, sizes["patch_size"]
        self.patch_embed = nn.Conv2d(3, embed_dim, patch, patch)
        row = (embed_dim, num_heads, init_values, proj_drop_rate)
        self.blocks = nn.Sequential(*[Block(*row) for _ in range(depth)])
        self.norm = nn.LayerNorm(embed_dim)
        self.head = nn.Linear(embed_dim, sizes["num_classes"])

    def forward(self, images):
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(x)).mean(1))


try:
    from timm.models import vision_transformer as module  # type: ignore[import-not-found]
except (ImportError, RuntimeError):  # torchvision refuses a torch it was not built for
    module = ModuleType(NAME)
    module.VisionTransformer, module.Block = VisionTransformer, Block  # type: ignore[attr-defined]
    sys.modules.setdefault(NAME, module)


def build(**options):
    """A tiny model of images [B, 3, 8, 8], with layer scale."""
    sizes = {"img_size": 8, "patch_size": 4, "num_classes": 5, "embed_dim": 16, "depth": 2}
    sizes |= {"num_heads": 2, "init_values": 0.5, "proj_drop_rate": 0.1}
    return module.VisionTransformer(**(sizes | options))
