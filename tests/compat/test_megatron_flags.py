"""Both flag sets become one HCConfig; conflicts and what has no counterpart are refused."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from hc_compile.compat.megatron import from_flags

H = 12
FORK = dict(hidden_size=H, use_hyper_connections=True, num_residual_streams=4)
MHC = FORK | dict(use_manifold_hyper_connections=True)
MAIN = dict(hidden_size=H, enable_mhc_connections=True, mhc_num_residual_streams=4)


@pytest.mark.parametrize(
    ("flags", "preset", "n", "iterations"),
    [
        (dict(hidden_size=H), "residual", 1, None),
        (dict(hidden_size=H, num_residual_streams=4), "residual", 1, None),
        (dict(hidden_size=H, use_hyper_connections=True), "dhc", 1, None),
        (FORK, "dhc", 4, None),
        (FORK | dict(num_fracs=1, hyper_connections_dropout=0.0), "dhc", 4, None),
        (MHC | dict(mhc_num_dynamic_alpha_proposals=1), "mhc", 4, 20),
        (MHC | dict(mhc_sinkhorn_iters=7), "mhc", 4, 7),
        (MHC | dict(mhc_log_domain_sinkhorn=True), "mhc-log", 4, 20),
        (MAIN, "megatron", 4, 20),
        (dict(hidden_size=H, enable_hyper_connections=True), "megatron", 4, 20),
        (MAIN | dict(mhc_sinkhorn_iterations=5, num_residual_streams=4), "megatron", 4, 5),
        (MAIN | dict(use_fused_mhc=True, mhc_fused_backend="auto"), "megatron", 4, 20),
    ],
)
def test_flags_to_config(flags, preset, n, iterations):
    for given in (flags, SimpleNamespace(**flags)):
        cfg = from_flags(given).hc
        assert (cfg.row.name, cfg.n) == (preset, n)
        assert iterations is None or cfg.constraint.iterations == iterations


def test_dropouts_and_recompute_are_read():
    flags = from_flags(
        MHC,
        hyper_connections_dropout=0.1,
        hidden_dropout=0.2,
        recompute_granularity="selective",
        recompute_modules=["core_attn", "mhc"],
        mhc_recompute_layer_num=2,
    )
    assert (flags.stream_dropout, flags.hidden_dropout) == (0.1, 0.2)
    assert (flags.recompute, flags.recompute_layers) == (True, 2)


@dataclass
class Defaults:
    """A config class whose unknown fields stand at their defaults."""

    hidden_size: int = H
    enable_mhc_connections: bool = True
    mhc_variant: str = "mhc"


def test_defaults_of_a_config_class_are_not_refused():
    assert from_flags(Defaults()).hc.n == 4
    with pytest.raises(ValueError, match="mhc_variant must be unset"):
        from_flags(Defaults(mhc_variant="gated_residual"))


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ({}, "hidden_size must be given"),
        (FORK | dict(num_fracs=2), r"num_fracs must be 1 .* got 2"),
        (MHC | dict(mhc_num_dynamic_alpha_proposals=2), "must be 1 .* got 2"),
        (FORK | MAIN, "use_hyper_connections must be unset beside enable_mhc_connections"),
        (
            MAIN | dict(num_residual_streams=2),
            "mhc_num_residual_streams and num_residual_streams must agree",
        ),
        (
            dict(hidden_size=H, use_manifold_hyper_connections=True),
            "use_hyper_connections must be True",
        ),
        (FORK | dict(mhc_log_domain_sinkhorn=True), "use_manifold_hyper_connections must be"),
        (MHC | dict(mhc_init_gating_factor=0.1), "mhc_init_gating_factor must be unset"),
        (MAIN | dict(mhc_single_pass=True), "mhc_single_pass must be unset"),
        (
            dict(hidden_size=H, recompute_modules=["mhc"]),
            "enable_mhc_connections must be True for 'mhc'",
        ),
        (MAIN | dict(recompute_modules=["mhc"]), "recompute_granularity must be 'selective'"),
        (
            MAIN | dict(recompute_granularity="selective", recompute_modules=["mhc", "mlp"]),
            "must not hold both 'mhc' and 'mlp'",
        ),
        (MAIN | dict(mhc_recompute_layer_num=2), "recompute_modules must hold 'mhc'"),
        (MAIN | dict(mhc_recompute_layer_num=0), "must be a positive int, got 0"),
        (MAIN | dict(recompute_granularity="full"), "must be 'selective' or None, got 'full'"),
    ],
)
def test_conflicts_are_refused(flags, text):
    with pytest.raises(ValueError, match=text):
        from_flags(flags)
