"""The variants that the catalog's rows are tested in, by name."""

from custom_ops.constraint import DEEPSEEK_V4, DYNAMIC_HC, NEWTON_SCHULZ_SCHEDULE

CONSTRAINTS: dict[str, dict] = {
    "sinkhorn": {},
    "sinkhorn-log": {"start": "log"},
    "sinkhorn-v4": DEEPSEEK_V4,
    "sinkhorn-rowmax": {"start": "exp-rowmax", "iterations": 3, "temperature": 0.5},
    "newton-schulz": {"manifold": "newton-schulz"},
    "permutation": {"manifold": "permutation"},
    "kronecker": {"manifold": "kronecker", "temperature": 0.5},
    "identity": {"manifold": "identity", "norm_form": "outside", "post_eps": 1e-6},
    "tanh": DYNAMIC_HC | {"squash": "tanh"},
    "stream-sinkhorn": {
        "projection": "stream",
        "norm_eps": 0.1,  # conditions C = 1, where the norm of one number cancels
        "views": 2,
        "branches": 2,
        "iterations": 2,
    },
    "stream-read": {"projection": "stream", "post": "none", "manifold": "none"},
    "softmax-gates": {"pre": "softmax", "post": "softmax", "post_scale": 1.0, "iterations": 2},
    "sigmoid-sum": {"pre": "sigmoid-sum", "pre_eps": 1e-6, "iterations": 2},
    "views": {"views": 2, "branches": 3, "iterations": 2},
    "head": {"post": "none", "manifold": "none", "pre_eps": 1e-6},
    "read-rms": {"read_norm": "rms", "read_eps": 1.0, "iterations": 2},  # conditions C = 1
    "read-layer": {"read_norm": "layer", "read_eps": 1e-5, "iterations": 2},
    "delayed": DEEPSEEK_V4 | {"norm_eps": 1e-20},
    "delayed-rms": {"read_norm": "rms", "read_eps": 1.0, "iterations": 2},
    "static": DYNAMIC_HC | {"projection": "static"},
}
DELAYED = ("delayed", "delayed-rms")  # read with the pre of the sublayer before

SINKHORN_OPTIONS: dict[str, tuple] = {
    "": (20, "exp-globalmax", "column", "max", 1e-30),
    "exp": (2, "exp", "row", "add", 0.0),
    "log": (20, "log", "column", "max", 0.0),
    "softmax": (20, "softmax", "row", "add", 1e-6),
    "abs": (5, "abs", "row", "max", 1e-3),
    "rowmax": (1, "exp-rowmax", "column", "add", 1e-2),
    "none": (0, "exp-globalmax", "row", "add", 0.0),
}
SCHEDULES = {"": NEWTON_SCHULZ_SCHEDULE, "cubic": ((3.0, -3.2, 1.2),) * 5}
