"""Flags of Megatron and of the hyper-connections fork of it -> HCConfig and what is beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import hc_compile as hc

# Every flag that belongs to hyper-connections: its other names come after it.
ENABLE = ("enable_mhc_connections", "enable_hyper_connections")
STREAMS = ("mhc_num_residual_streams", "num_residual_streams")
ITERATIONS = ("mhc_sinkhorn_iterations", "mhc_sinkhorn_iters")
FORK = (
    "use_hyper_connections",
    "use_manifold_hyper_connections",
    "hyper_connections_dropout",
    "num_fracs",
    "mhc_log_domain_sinkhorn",
    "mhc_num_dynamic_alpha_proposals",
)
MEGATRON = (
    "mhc_init_gating_factor",
    "mhc_norm_eps",
    "mhc_norm_eps_inside_sqrt",
    "mhc_recompute_layer_num",
)
# Which kernels and graphs run, not what they compute; and single-pass mHC's eps, refused itself.
INERT = ("mhc_fused_backend", "mhc_recompute_attn_cuda_graph_split", "mhc_epsilon")
READ = frozenset((*ENABLE, *STREAMS, *ITERATIONS, *FORK, *MEGATRON, *INERT))
PREFIXES = ("mhc_", "hyper_connection", "hc_")


@dataclass(frozen=True)
class Flags:
    """What the flags ask for.

    hc: the hyper-connection; n = 1, the plain residual, where it is off.
    stream_dropout: on the streams after every write (`hyper_connections_dropout`).
    hidden_dropout: on every branch's output, Megatron's own flag.
    recompute: whether recompute_modules holds "mhc". recompute_layers: layers a group, None all.
    """

    hc: hc.HCConfig
    stream_dropout: float = 0.0
    hidden_dropout: float = 0.0
    recompute: bool = False
    recompute_layers: int | None = None


def from_flags(config: object, /, **changes: Any) -> Flags:
    """Read the hyper-connection flags of a TransformerConfig; what can't be done is refused.

    `use_hyper_connections` takes presets "dhc", "mhc" and "mhc-log"; `enable_mhc_connections`
    takes Megatron-LM's own arithmetic: row softmax + 1e-6, columns, 19 × (rows, columns), applied
    transposed; 1/(‖x‖/√K + 1e-6); pre = σ + 1e-6, post = 2σ; b = 0.

    Args:
        config: a mapping, or any object with attributes; flags of other features are not read.
        **changes: flags that replace the config's.
    Returns: the HCConfig and what is beside it.
    Raises: ValueError for an unknown flag, conflicting flags and for what has no counterpart.
    """
    given = dict(config) if isinstance(config, Mapping) else dict(vars(config))
    given |= changes
    if "hidden_size" not in given:
        raise ValueError("hidden_size must be given, got none")
    fork, ours = bool(given.get("use_hyper_connections")), bool(_one(given, ENABLE, False))
    _refuse_conflicts(given, fork, ours)
    if fork or ours:
        defaults = {} if isinstance(config, Mapping) else vars(type(config))
        _refuse_unknown(given, defaults)
    streams = _one(given, STREAMS, 1 if fork else 4)
    recompute = "mhc" in (given.get("recompute_modules") or ())
    return Flags(
        _connection(given, fork, streams) if fork or ours else _residual(given),
        stream_dropout=float(given.get("hyper_connections_dropout") or 0.0) if fork else 0.0,
        hidden_dropout=float(given.get("hidden_dropout") or 0.0),
        recompute=recompute,
        recompute_layers=given.get("mhc_recompute_layer_num") if recompute else None,
    )


def _one(given: Mapping[str, Any], names: tuple[str, ...], default: Any) -> Any:
    """The value under whichever of the names is there; they must agree."""
    values = {name: given[name] for name in names if given.get(name) is not None}
    if len(set(values.values())) > 1:
        raise ValueError(f"{' and '.join(values)} must agree, got {values}")
    return next(iter(values.values()), default)


def _refuse_unknown(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    for name, value in given.items():
        unset = value is None or value is False or (name in defaults and defaults[name] == value)
        if name.startswith(PREFIXES) and name not in READ and not unset:
            raise ValueError(f"{name} must be unset: it has no counterpart here, got {value!r}")
    for name, why in (
        ("num_fracs", "fractions of a stream are not built"),
        ("mhc_num_dynamic_alpha_proposals", "one proposal is"),
    ):
        if given.get(name) not in (None, 1):
            raise ValueError(f"{name} must be 1 ({why}), got {given[name]!r}")


def _refuse_conflicts(given: Mapping[str, Any], fork: bool, ours: bool) -> None:
    if fork and ours:
        raise ValueError(f"use_hyper_connections must be unset beside {ENABLE[0]}, got both")
    if given.get("use_manifold_hyper_connections") and not fork:
        raise ValueError("use_hyper_connections must be True for use_manifold_hyper_connections")
    if given.get("mhc_log_domain_sinkhorn") and not given.get("use_manifold_hyper_connections"):
        raise ValueError("use_manifold_hyper_connections must be True for mhc_log_domain_sinkhorn")
    modules = given.get("recompute_modules") or ()
    granularity = given.get("recompute_granularity")
    if (fork or ours) and granularity == "full":
        raise ValueError("recompute_granularity must be 'selective' or None, got 'full'")
    layers = given.get("mhc_recompute_layer_num")
    if layers is not None and (
        isinstance(layers, bool) or not isinstance(layers, int) or layers < 1
    ):
        raise ValueError(f"mhc_recompute_layer_num must be a positive int, got {layers!r}")
    if "mhc" not in modules:
        if layers is not None:
            raise ValueError("recompute_modules must hold 'mhc' for mhc_recompute_layer_num")
        return
    if not (fork or ours):
        raise ValueError(f"{ENABLE[0]} must be True for 'mhc' in recompute_modules")
    if granularity != "selective":
        raise ValueError(
            "recompute_granularity must be 'selective' for 'mhc' in recompute_modules, "
            f"got {granularity!r}"
        )
    if "mlp" in modules:
        raise ValueError("recompute_modules must not hold both 'mhc' and 'mlp'")


def _residual(given: Mapping[str, Any]) -> hc.HCConfig:
    return hc.HCConfig(given["hidden_size"], 1, "residual")


def _connection(given: Mapping[str, Any], fork: bool, streams: int) -> hc.HCConfig:
    iterations = _one(given, ITERATIONS, 20)
    gate = given.get("mhc_init_gating_factor")
    if not fork:
        preset = megatron_preset(
            given["hidden_size"],
            streams,
            0.01 if gate is None else gate,
            "inside" if given.get("mhc_norm_eps_inside_sqrt") else "outside",
        )
        eps = given.get("mhc_norm_eps")
        eps = 1e-6 if eps is None else eps
        return hc.HCConfig(
            given["hidden_size"], streams, preset, iterations=iterations, norm_eps=eps
        )
    if gate is not None:
        raise ValueError(f"mhc_init_gating_factor must be unset for the fork's flags, got {gate}")
    if not given.get("use_manifold_hyper_connections"):
        return hc.HCConfig(given["hidden_size"], streams, "dhc")
    preset = "mhc-log" if given.get("mhc_log_domain_sinkhorn") else "mhc"
    return hc.HCConfig(given["hidden_size"], streams, preset, iterations=iterations)


def megatron_preset(
    hidden_size: int, streams: int, gate: float = 0.01, norm_form: str = "outside"
) -> hc.Preset:
    """Megatron-LM's mHC arithmetic as a preset; φ has the standard deviation of its Xavier init.

    Args:
        hidden_size: h. streams: n. gate: α at the start (`mhc_init_gating_factor`).
        norm_form: "outside" for 1/(‖x‖/√K + eps), "inside" for 1/√(‖x‖²/K + eps).
    """
    fan_in, fan_out = streams * hidden_size, streams * streams + 2 * streams
    return hc.Preset(
        "megatron",
        "Megatron-LM, megatron/core/transformer/hyper_connection.py",
        {**hc.PRESETS["mhc-v4"].constraint, "norm_form": norm_form},
        bias_init="zeros",
        phi_std=math.sqrt(2 / (fan_in + fan_out)),
        alpha=(gate, gate, gate),
        equals_residual=False,
    )
