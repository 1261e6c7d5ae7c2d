"""Find, load and bind the compiled loops of the fused CPU kernel.

`pip install` compiles `adopt.c` where it finds a C compiler; nothing is ever compiled at run time. The library has no
Python and no torch in it: it is loaded by ctypes and given the addresses of LibTorch's stable C functions.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

_INTERFACE = 1
"""The version of the C functions that fused.py calls; `sharded_adopt_interface` in adopt.c says the same."""

_TORCH_VERSION = (2 << 56) | (13 << 48)
"""The torch whose calling convention the library was written to; newer ones keep to it."""

_TORCH_FUNCTIONS = (  # in the order of the struct `torch` in torch_api.h
    "aoti_torch_library_init_fragment",
    "aoti_torch_library_init_impl",
    "aoti_torch_library_def",
    "torch_library_impl",
    "torch_list_size",
    "torch_list_get_item",
    "torch_delete_list",
    "aoti_torch_delete_tensor_object",
    "aoti_torch_get_data_ptr",
    "aoti_torch_get_dim",
    "aoti_torch_get_numel",
    "aoti_torch_get_sizes",
    "aoti_torch_get_strides",
    "aoti_torch_get_dtype",
    "aoti_torch_get_device_type",
    "aoti_torch_get_layout",
    "aoti_torch_dtype_float32",
    "aoti_torch_dtype_float64",
    "aoti_torch_dtype_bfloat16",
    "aoti_torch_dtype_float16",
    "aoti_torch_device_type_cpu",
    "aoti_torch_layout_strided",
    "torch_get_num_threads",
    "torch_parallel_for",
)


@dataclass(frozen=True, slots=True)
class Native:
    """The loaded library, or why there is none.

    `library` is None exactly where `reason` is not empty. `path` is the file that was found, if any.
    """

    library: ctypes.CDLL | None
    path: Path | None
    reason: str

    @property
    def isa(self) -> str | None:
        """The instruction set that the loops run with: "avx512", "avx2" or "baseline"; None without a library."""
        return None if self.library is None else str(self.library.sharded_adopt_isa().decode())


@functools.cache
def load() -> Native:
    """Return the library, loaded and registered with torch at the first call, or the reason why it cannot be had."""
    path = _find()
    if path is None:
        return Native(None, None, "it was not built: no C compiler was found when the package was installed")
    try:
        library = ctypes.CDLL(str(path))
        interface = library.sharded_adopt_interface()
    except (OSError, AttributeError) as error:
        return Native(None, path, f"it does not load: {error}")
    if interface != _INTERFACE:
        return Native(None, path, "it was built from another version of the package: install the package again")
    _declare(library)
    try:
        addresses = _torch_addresses()
    except (OSError, AttributeError) as error:
        return Native(None, path, f"torch {torch.__version__} lacks a C function that it needs: {error}")
    code = library.sharded_adopt_init(addresses, len(addresses), _TORCH_VERSION)
    if code:
        return Native(None, path, f"torch {torch.__version__} refused its operators (error {code})")
    return Native(library, path, "")


def _find() -> Path | None:
    """The library lies beside this file, named as build tools name an extension module."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name("_adopt" + suffix)
        if path.exists():
            return path
    return None


def _torch_addresses() -> ctypes.Array[ctypes.c_void_p]:
    name = "libtorch_cpu.dylib" if sys.platform == "darwin" else "libtorch_cpu.so"
    beside = Path(torch.__file__).parent / "lib" / name
    # The file that torch has loaded, wherever it lies; a second copy would have other operators.
    libtorch = ctypes.CDLL(str(beside) if beside.exists() else name, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    pointers = [ctypes.cast(getattr(libtorch, function), ctypes.c_void_p) for function in _TORCH_FUNCTIONS]
    return (ctypes.c_void_p * len(pointers))(*pointers)


def _declare(library: ctypes.CDLL) -> None:
    """Tell ctypes the signatures of adopt.c's exports."""
    pointer, int64 = ctypes.c_void_p, ctypes.c_int64
    signatures: dict[str, tuple[type | None, tuple[type, ...]]] = {
        "sharded_adopt_isa": (ctypes.c_char_p, ()),
        "sharded_adopt_choose_isa": (ctypes.c_int32, (ctypes.c_char_p,)),
        "sharded_adopt_plan_new": (pointer, (int64,)),
        "sharded_adopt_plan_free": (None, (pointer,)),
        "sharded_adopt_plan_seal": (ctypes.c_int32, (pointer, pointer, pointer)),
        "sharded_adopt_plan_steps": (ctypes.POINTER(ctypes.c_double), (pointer, pointer)),
        "sharded_adopt_plan_left": (None, (pointer, pointer)),
        "sharded_adopt_init": (ctypes.c_int32, (pointer, int64, ctypes.c_uint64)),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments
