"""The tables of three sections: nothing is left out, every name resolves, figures are ours."""

import importlib
import importlib.util
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import hc_compile as hc
from hc_compile.compat import hydra
from hc_compile.compat.megatron import from_flags
from hc_compile.layers import compute_memory_footprint
from hc_compile.models import TransformerWithHC
from profiles.memory_bench import rotary_cache_mb
from scripts.example_usage import SIZES

ROOT = Path(__file__).parent.parent.parent
TEXT = (ROOT / "hc_compile" / "compat" / "README.md").read_text()
MEGATRON, HYDRA, WITH_HC = SECTIONS = (
    "Megatron-LM hyper-connections",
    "HYDRA layers and kernels",
    "TransformerWithHC",
)
MENTIONED = {
    MEGATRON: """use_hyper_connections num_residual_streams hyper_connections_dropout num_fracs
        use_manifold_hyper_connections mhc_sinkhorn_iters mhc_log_domain_sinkhorn
        mhc_num_dynamic_alpha_proposals hyper_conn_attn get_log_amax() layer_number log_amax
        TransformerConfig TransformerBlock _forward_attention _forward_mlp einops>=0.8.0 MTP
        enable_mhc_connections mhc_num_residual_streams mhc_sinkhorn_iterations hyper_conn_mlp
        mhc_init_gating_factor mhc_recompute_layer_num recompute_modules""",
    HYDRA: """RMSNorm SwiGLUMLP get_activation RotaryEmbedding flexible_attention fused_rope
        fused_qk_norm fused_swiglu fused_rms_norm GradientCheckpointMixin init_weights_normal
        scale_residual_weights compute_memory_footprint FUSED_KERNELS_AVAILABLE
        FLASH_ATTN_AVAILABLE XFORMERS_AVAILABLE get_kernel_status() set_use_triton_kernels
        HYDRA_DISABLE_TRITON=1 benchmark_kernels print_benchmark_results set_attention_backend
        enable_gradient_checkpointing() disable_gradient_checkpointing() estimated_training_mb
        CCGQAAttention create_ccgqa_mod_mor_model hybrid_attention.py ccgqa.py Adam8bit
        reduce-overhead tests/test_optimizations.py tests/test_paper_compliance.py flash-attn
        triton>=3.0.0 requirements.txt hydra/kernels/fused_ops.py hydra/layers/common.py 24x ~40%
        ~30% 2.10x 1.46x 1.80x 0.342 0.163 0.456 0.312 0.128 0.071 4.2 2.5 18.6 11.2 38.4 23.1
        ~/.triton/cache""",
    WITH_HC: """TransformerWithHC TransformerLayerWithHC HyperConnection vocab_size hidden_size
        num_layers num_heads ffn_hidden_size max_seq_length expansion_rate dropout use_tanh
        static_weights layer_norm_eps get_num_params attention_mask example_usage.py
        test_implementation.py hyper_connections.py pyproject.toml README.md QUICKSTART.md
        INSTALL.md SUMMARY.md HYPER-CONNECTIONS.pdf task_plan.md findings.md progress.md
        cursor_manus_hc .venv/bin/activate lr=3e-4 ~117M ~350M ~1B 1.8× 2.9.1 perplexity
        pre-trained""",
}


def section(title):
    return re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", TEXT, re.M | re.S)[1]


def rows(title):
    """(there, here, note) of the section's mapping table."""
    table = re.search(r"\| there \| here \| note \|\n\|[-|]+\n((?:\|.*\n?)+)", section(title))[1]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]


EVERY = [(title, *row) for title in SECTIONS for row in rows(title)]


@pytest.mark.parametrize("title", SECTIONS)
def test_everything_mentioned_has_a_row(title):
    there = "\n".join(row[0] for row in rows(title))
    assert [name for name in MENTIONED[title].split() if name not in there] == []


def resolve(name):
    """The object of a dotted name; a field of a dataclass counts by its annotation."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        module = ".".join(parts[:cut])
        if importlib.util.find_spec(parts[0]) and _exists(module):
            found = importlib.import_module(module)
            for part in parts[cut:]:
                fields = getattr(found, "__dataclass_fields__", {})
                found = fields[part] if part in fields else getattr(found, part)
            return found
    raise AttributeError(name)


def _exists(module):
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def check(code):
    if code.startswith("python -m pytest "):
        assert (ROOT / code.split()[-1]).exists(), code
    elif code.startswith("python -m "):
        assert importlib.util.find_spec(code.split()[2]), code
    elif code.startswith("hc_compile."):
        assert resolve(code) is not None, code
    else:
        assert (ROOT / code).exists(), code


@pytest.mark.parametrize("row", EVERY, ids=lambda row: row[1][:40])
def test_row_names_what_there_is(row):
    _, there, here, note = row
    assert there
    if here in ("refused", "not needed", "not measured"):
        assert note or here == "not needed"
        return
    check(re.fullmatch(r"`([^`]+)`", here)[1])
    for code in re.findall(r"`((?:python -m |hc_compile\.|tests/)[^`]+)`", note):
        check(code)


def test_refused_names_are_refused():
    base = dict(hidden_size=8, use_hyper_connections=True, use_manifold_hyper_connections=True)
    main = dict(hidden_size=8, enable_mhc_connections=True)
    refused = {
        "num_fracs": lambda: from_flags(base, num_fracs=2),
        "mhc_num_dynamic_alpha_proposals": lambda: from_flags(
            base, mhc_num_dynamic_alpha_proposals=2
        ),
        "mhc_single_pass": lambda: from_flags(main, mhc_single_pass=True),
        "CCGQAAttention": lambda: hydra.CCGQAAttention,
        "create_ccgqa_mod_mor_model": lambda: hydra.create_ccgqa_mod_mor_model,
    }
    listed = [there.strip("`") for _, there, here, _ in EVERY if here == "refused"]
    assert listed == list(refused)
    for name, call in refused.items():
        with pytest.raises((ValueError, ImportError), match=name):
            call()


def blocks(title):
    return re.findall(r"```python\n(.*?)```", section(title), re.S)


@pytest.mark.parametrize("title", SECTIONS)
def test_after_runs_and_says_what_before_said(title):
    before, after = blocks(title)
    assert before.startswith("# before\n") and after.startswith("# after\n")
    names = {"attention": lambda: nn.Linear(1024, 1024), "mlp": lambda: nn.Linear(1024, 1024)}
    exec(after, names)
    if title == MEGATRON:
        assert names["block"](torch.zeros(2, 1, 1024)).shape == (2, 1, 1024)
        assert names["flags"].hc.row.name == "mhc" and names["flags"].hc.n == 4
    elif title == HYDRA:
        assert names["shared_rope"](torch.ones(1, 2, 3, 64)).shape == (1, 2, 3, 64)
    else:
        assert names["model"](torch.zeros(1, 3, dtype=torch.int64)).shape == (1, 3, 50257)


def size_model(name, **options):
    with torch.device("meta"):
        return TransformerWithHC(50257, *SIZES[name], **options)


def test_counts_are_exact():
    for name in SIZES:
        model = size_model(name)
        text = f"{model.get_num_params(False):,} parameters, {model.get_num_params():,} without"
        assert any(text in row[3] and row[1].lower().startswith(name) for row in EVERY), name
    plain = size_model("small", expansion_rate=1).get_num_params(False)
    share = size_model("small").get_num_params(False) / plain - 1
    assert f"{share:.2%}".replace("%", " %") in section(WITH_HC)


def test_rotary_figures():
    found = rotary_cache_mb(24, 64, 8192)
    assert f"{found['own']:.1f} MB → {found['shared']:.1f} MB for 24 layers" in section(HYDRA)
    assert rotary_cache_mb(1, 64, 32)["own"] * 1e6 == 8192  # the guide's 8 KB


def recorded():
    """Rows of the memory table: (size, streams) -> whole, activations, the two checkpointed."""
    lines = re.findall(r"^\| (small|base|large) \| (\d) \| (.*) \|$", section(WITH_HC), re.M)
    return {(size, int(n)): [int(v) for v in rest.split("|")] for size, n, rest in lines}


@pytest.mark.parametrize("streams", [1, 4])
def test_memory_table_is_what_the_estimate_says(streams):
    """One size of three, to spare time; the attention kernel is the CPU's, as the text says."""
    found = []
    for checkpointed in (False, True):
        model = size_model("small", dropout=0.0, max_seq_length=1024, expansion_rate=streams)
        if checkpointed:
            model.enable_gradient_checkpointing()
        estimate = compute_memory_footprint(model, 8, 1024)
        found += [estimate["estimated_training_mb"], estimate["estimated_activation_mb"]]
    for value, written in zip(found, recorded()["small", streams], strict=True):
        assert value == pytest.approx(written, rel=0.02)


def test_ratios_in_the_text_are_the_tables():
    table = recorded()
    growth = [table[size, 4][1] / table[size, 1][1] for size in ("small", "large")]
    assert "grow {:.2f} × at 124M and {:.2f} × at 1B".format(*growth) in section(MEGATRON)
    saved = [1 - values[3] / values[1] for values in table.values()]
    assert f"−{min(saved) * 100:.0f} % to −{max(saved) * 100:.0f} %" in section(HYDRA)


def test_presets_named_exist():
    for title in SECTIONS:
        for name in re.findall(r"presets? `([\w-]+)`", section(title)):
            assert name in hc.PRESETS
