"""What the engine's own arguments may be."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch


def check_arguments(
    *,
    mesh: Any,
    sharding: str,
    shard_gradients: bool,
    reduce_gradients: bool,
    bucket_cap_mb: float,
    overlap_param_gather: bool,
    reduce_dtype: Any,
    gather_dtype: Any,
    main_params: Any,
) -> None:
    """Raise `ValueError` for a value that cannot be, and `NotImplementedError` for one that is not built yet."""
    unbuilt = {
        "mesh": (mesh, None),
        "sharding": (sharding, "full"),
        "overlap_param_gather": (overlap_param_gather, False),
    }
    for name, (value, built) in unbuilt.items():
        if value != built:
            raise NotImplementedError(f"{name}={value!r} is not built yet: leave it at {built!r}")
    if (
        isinstance(bucket_cap_mb, bool)
        or not isinstance(bucket_cap_mb, (int, float))
        or not 0 < bucket_cap_mb < math.inf
    ):
        raise ValueError(f"bucket_cap_mb must be positive and finite, got {bucket_cap_mb!r}")
    if bucket_cap_mb > sys.float_info.max / 2**20:
        raise ValueError(
            f"bucket_cap_mb is in units of 2**20 bytes, which must be finite too, got {bucket_cap_mb!r}: for one "
            "bucket of everything, the size of the model is enough"
        )
    if shard_gradients and not reduce_gradients:
        raise ValueError(
            "shard_gradients=True frees what this optimizer has reduced, but with reduce_gradients=False it reduces "
            "nothing: choose one of the two"
        )
    for name, dtype in (("reduce_dtype", reduce_dtype), ("gather_dtype", gather_dtype)):
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"{name} must be a floating-point torch.dtype or None, got {dtype!r}")
    if main_params not in ("auto", "fp32", "none"):
        raise ValueError(f"main_params must be 'auto', 'fp32' or 'none', got {main_params!r}")
    if main_params == "none" and gather_dtype is not None:
        raise ValueError("gather_dtype rounds what the ranks hold, so main_params must not be 'none'")
