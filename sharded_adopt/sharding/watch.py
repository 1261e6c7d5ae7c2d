"""Sees when a module has got other parameters than those that the optimizer holds.

[Note: replaced parameters] `module.weight = nn.Parameter(...)`, `load_state_dict(assign=True)`, some parametrizations
and `model.head = ...` put a new tensor where a held one was. The old one gets no gradient any more, and the new one is
trained by nobody. Two witnesses tell of it. torch calls a hook whenever a module takes a parameter: so every held
parameter that is overwritten is seen, in any module. And the module that the user has named, or whose `parameters()` or
`named_parameters()` were passed, is compared before every step with what it was: so what is deleted, replaced with its
submodule, or written past the hook is seen too. Where the optimizer was given a list or groups and no `module`, a
submodule that is replaced as a whole is not.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook


def module_of(params: Any) -> nn.Module | None:
    """The module whose `parameters()` or `named_parameters()` these are, as long as nobody has used them."""
    if not inspect.isgenerator(params) or inspect.getgeneratorstate(params) != inspect.GEN_CREATED:
        return None
    if params.gi_code not in (nn.Module.parameters.__code__, nn.Module.named_parameters.__code__):
        return None
    module: nn.Module = inspect.getgeneratorlocals(params)["self"]
    return module


class ModuleWatch:
    """Compares what modules hold with what the optimizer holds. See [Note: replaced parameters].

    `module`: what is compared before every step, or None. `owns_all`: whether every trainable parameter of it must be
    held, not only those that came in the place of held ones.
    """

    def __init__(self, module: nn.Module | None, owns_all: bool) -> None:
        self._module = None if module is None else weakref.ref(module)
        self._owns_all = owns_all
        self._held: dict[int, str] = {}  # names by id; the optimizer keeps the tensors alive
        self._homes: dict[int, str] = {}  # the held parameters in `module`, by id
        self._strangers: set[str] = set()  # the trainable parameters in `module` that were never held
        self._tree: list[tuple[weakref.ref[nn.Module], list[int], list[int]]] = []
        # Module, attribute, the id that was there, and the id that came if it was held already.
        self._overwritten: list[tuple[weakref.ref[nn.Module], str, int, int | None]] = []
        # Weak, so that the hook keeps nothing alive.
        this = weakref.ref(self)

        def on_registration(module: nn.Module, name: str, param: Tensor | None) -> None:
            watch = this()
            if watch is not None:
                watch._note(module, name, param)

        weakref.finalize(self, register_module_parameter_registration_hook(on_registration).remove)

    def hold(self, tensors: Iterable[Tensor], names: Iterable[str]) -> None:
        """The optimizer holds these too, under these names."""
        self._held.update((id(tensor), name) for tensor, name in zip(tensors, names, strict=True))
        if not self._has_changed():  # else `problem` has yet to judge the change
            self._look()

    def _note(self, module: nn.Module, name: str, param: Tensor | None) -> None:
        before = module._parameters.get(name)
        if before is not None and before is not param and id(before) in self._held:
            self._overwritten.append(
                (weakref.ref(module), name, id(before), id(param) if id(param) in self._held else None)
            )

    def problem(self) -> Exception | None:
        """The error for a trainable parameter that has come where a held one was, or None. Reads identities only."""
        for place in list(self._overwritten):
            module, name, old, tied = place
            now = None if (alive := module()) is None else alive._parameters.get(name)
            if now is not None and id(now) == tied != old:
                return _tied(self._held[old], self._held[tied])
            if now is None or id(now) in self._held:
                self._overwritten.remove(place)
            elif now.requires_grad:
                return _replaced([name], [self._held[old]])
        return self._compare()

    def _compare(self) -> Exception | None:
        module = None if self._module is None else self._module()
        if module is None or not self._has_changed():
            return None
        found = {id(param): name for name, param in module.named_parameters()}
        lost = [name for key, name in self._homes.items() if key not in found]
        new = [name for name in self._trainable_strangers(module) if name not in self._strangers]
        if new and (lost or self._owns_all):
            return _replaced(new, lost)
        self._look()
        return None

    def _has_changed(self) -> bool:
        for ref, params, children in self._tree:
            module = ref()
            if module is None or [*map(id, module._parameters.values())] != params:
                return True
            if [*map(id, module._modules.values())] != children:
                return True
        return False

    def _look(self) -> None:
        module = None if self._module is None else self._module()
        if module is None:
            return
        self._tree = [
            (weakref.ref(one), [*map(id, one._parameters.values())], [*map(id, one._modules.values())])
            for one in module.modules()
        ]
        self._homes = {id(p): self._held[id(p)] for p in module.parameters() if id(p) in self._held}
        self._strangers = set(self._trainable_strangers(module))

    def _trainable_strangers(self, module: nn.Module) -> list[str]:
        return [name for name, p in module.named_parameters() if p.requires_grad and id(p) not in self._held]


def _tied(old: str, now: str) -> RuntimeError:
    return RuntimeError(
        f"parameter {old!r} was tied to {now!r} after the optimizer was made, and is held beside it: tie first, then "
        "make the optimizer"
    )


def _replaced(new: list[str], lost: list[str]) -> RuntimeError:
    place = f" in the place of {lost}" if lost else ""
    return RuntimeError(
        f"the module has trainable parameters {new}{place} that this optimizer does not hold: they came after it was "
        "made (by assignment, load_state_dict(assign=True), a parametrization or another submodule) and nobody would "
        "train them. Copy values into the old parameters instead (under torch.no_grad(): param.copy_(values)), hand "
        "the new ones to add_param_group, or make the optimizer once the model is final"
    )
