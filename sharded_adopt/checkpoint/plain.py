"""Plain data: what a manifest may hold, and how it is read from bytes that nobody vouches for.

JSON has no infinity and no NaN, no keys but strings and no tensors, but the state of torch's schedulers does. Each such
value is an object with one reserved key, so that a manifest stays JSON that every tool reads:

    {"$float": "inf"}, "-inf" or "nan"         what `ReduceLROnPlateau` starts from
    {"$pairs": [[3, …], ["a", …]]}             a dict of which some key is an int
    {"$counter": [[3, 1]]}                     a `collections.Counter`, such as the milestones of `MultiStepLR`
    {"$scalar": ["float32", 0.1]}              a 0-dim tensor, such as the rates where lr is one
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor

from sharded_adopt.checkpoint.dtypes import NAMES, dtype_name, scalar_tensor, scalar_value

_FLOAT, _PAIRS, _COUNTER, _SCALAR = _RESERVED = ("$float", "$pairs", "$counter", "$scalar")
_NONFINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
_DEEPEST = 100  # levels that may be written; Python's own reader and writer give up at about ten times as many
_DEEPEST_READ = _DEEPEST + 20  # a manifest holds what was written some levels down

T = TypeVar("T")


def to_plain(value: Any, where: str, depth: int = 0) -> Any:
    """A copy of `value` that JSON writes and reads without loss; tuples become lists.

    Raises `TypeError` for anything that is not None, bool, int, float, str, a 0-dim tensor, list, tuple, or dict whose
    keys are str or int, and `ValueError` for nesting beyond 100 levels and a reserved key; both name the place,
    starting from `where`.
    """
    if depth > _DEEPEST:
        raise ValueError(f"{where} is nested more than {_DEEPEST} levels deep (or contains itself)")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, float):  # numpy's float64 is one
        number = float(value)
        return number if math.isfinite(number) else {_FLOAT: str(number)}
    if isinstance(value, int):
        return int(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, (list, tuple)):
        return [to_plain(item, f"{where}[{index}]", depth + 1) for index, item in enumerate(value)]
    if isinstance(value, Mapping):
        return _plain_object(value, where, depth)
    if isinstance(value, Tensor) and value.dim() == 0:
        return {_SCALAR: [dtype_name(value.dtype), to_plain(scalar_value(value), where, depth + 2)]}
    raise TypeError(
        f"{where} is a {type(value).__module__}.{type(value).__qualname__}: only None, bool, int, float, str, list and "
        "dict can be stored; convert it first (a tensor: .tolist(), a number: float() or int())"
    )


def _plain_object(value: Mapping[Any, Any], where: str, depth: int) -> dict[str, Any]:
    if len(value) == 1 and next(iter(value)) in _RESERVED:
        raise ValueError(f"{where} is a dict whose only key is {next(iter(value))!r}, which is reserved")
    for key in value:
        if not isinstance(key, (str, int)) or isinstance(key, bool):
            raise TypeError(
                f"{where} has the key {key!r}, a {type(key).__name__}: keys must be str or int; store a list of pairs"
            )
    is_counter = isinstance(value, Counter)
    if is_counter or not all(isinstance(key, str) for key in value):
        pairs = [[to_plain(k, where), to_plain(v, f"{where}[{k!r}]", depth + 3)] for k, v in value.items()]
        return {_COUNTER if is_counter else _PAIRS: pairs}
    return {str.__str__(key): to_plain(item, f"{where}[{key!r}]", depth + 1) for key, item in value.items()}


def from_plain(value: Any, depth: int = 0) -> Any:
    """The inverse of `to_plain`, on what a JSON reader gives. Raises `ValueError` for what that never makes."""
    if depth > _DEEPEST_READ:
        raise ValueError(f"a value is nested more than {_DEEPEST_READ} levels deep")
    if isinstance(value, list):
        return [from_plain(item, depth + 1) for item in value]
    if isinstance(value, dict):
        if len(value) == 1 and (tag := next(iter(value))) in _RESERVED:
            return _READERS[tag](value[tag], depth + 1)
        return {key: from_plain(item, depth + 1) for key, item in value.items()}
    return value


def _float(name: Any, depth: int) -> float:
    if not isinstance(name, str) or name not in _NONFINITE:
        raise ValueError(f"{_kind(name)} stands where 'inf', '-inf' or 'nan' must")
    return _NONFINITE[name]


def _dict(pairs: Any, depth: int) -> dict[Any, Any]:
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise ValueError(f"{_kind(pairs)} stands where pairs of a key and a value must")
    if not all(type(key) in (str, int) for key, _ in pairs):
        raise ValueError(f"the keys of {_kind(pairs)} must be strings or whole numbers")
    found = {key: from_plain(item, depth + 2) for key, item in pairs}
    if len(found) != len(pairs):
        raise ValueError(f"a key appears twice in {_kind(pairs)}")
    return found


def _counter(pairs: Any, depth: int) -> Counter[Any]:
    counts = _dict(pairs, depth)
    if not all(type(count) is int for count in counts.values()):
        raise ValueError(f"the counts of {_kind(pairs)} must be whole numbers")
    return Counter(counts)


def _scalar(pair: Any, depth: int) -> Tensor:
    if not isinstance(pair, list) or len(pair) != 2 or not isinstance(pair[0], str) or pair[0] not in NAMES:
        raise ValueError(f"{_kind(pair)} stands where the name of a dtype and a number must")
    return scalar_tensor(pair[0], from_plain(pair[1], depth + 1))


_READERS: dict[str, Callable[[Any, int], Any]] = {
    _FLOAT: _float,
    _PAIRS: _dict,
    _COUNTER: _counter,
    _SCALAR: _scalar,
}


def plain_copy(value: Any, where: str) -> Any:
    """What a reader will get for `value`: a copy, with lists for tuples. Raises as `to_plain`."""
    return from_plain(to_plain(value, where))


def dumps(value: Any) -> bytes:
    """Canonical JSON: sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def loads(data: bytes) -> Any:
    """Strict JSON: no key twice, no NaN, no nesting that exhausts the stack. Raises `ValueError`."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key appears twice in one object")
    return found


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


class Fields:
    """One JSON object, read field by field: each must be there and be of its type, else `ValueError` names it.

    Fields that are not asked for are ignored: a later version may add some.
    """

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise ValueError(f"{where} must be an object, got {_kind(value)}")
        self._value = value
        self._where = where

    def _get(self, key: str, kind: type[T]) -> T:
        if key not in self._value:
            raise ValueError(f"{self._where} has no {key!r}")
        found = self._value[key]
        if type(found) is not kind:  # bool is an int to isinstance
            raise ValueError(f"{self._where}: {key!r} must be of type {kind.__name__}, got {_kind(found)}")
        return found

    def count(self, key: str) -> int:
        """A whole number from 0 to 2**63 - 1."""
        return natural(self._get(key, int), f"{self._where}: {key!r}")

    def text(self, key: str) -> str:
        """A string."""
        return self._get(key, str)

    def any(self, key: str) -> Any:
        """Whatever is there."""
        if key not in self._value:
            raise ValueError(f"{self._where} has no {key!r}")
        return self._value[key]

    def object(self, key: str) -> dict[str, Any]:
        """A JSON object."""
        found: dict[str, Any] = self._get(key, dict)
        return found

    def plain(self, key: str) -> dict[str, Any]:
        """An object as `to_plain` writes it."""
        found = from_plain(self.object(key))
        if not isinstance(found, dict):
            raise ValueError(f"{self._where}: {key!r} must be an object, got {_kind(found)}")
        return found

    def list(self, key: str, make: Callable[[Any, str], T]) -> tuple[T, ...]:
        """A list, each item through `make(item, where)`."""
        found: list[Any] = self._get(key, list)
        return tuple(make(item, f"{self._where}: {key}[{index}]") for index, item in enumerate(found))


def natural(value: Any, where: str) -> int:
    """`value`, if it is an int (no bool) from 0 to 2**63 - 1."""
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{where} must be a whole number from 0 to 2**63 - 1, got {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else f"{shown[:40]}…"
