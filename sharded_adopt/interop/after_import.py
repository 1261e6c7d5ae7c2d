"""A call that is made as soon as another package has been imported, by whoever imports it.

Importing a framework ourselves, early, would change what it finds: scripts set environment variables first.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def after_import(name: str, then: Callable[[], None]) -> None:
    """Call `then()` once the top-level package `name` has been imported: at once, if it has been.

    The same call again is one call. What `then` raises, the import raises.
    """
    module = sys.modules.get(name)
    if module is not None and not getattr(module.__spec__, "_initializing", False):
        then()
        return
    watcher = _Watcher(name, then)
    if watcher not in sys.meta_path:
        sys.meta_path.insert(0, watcher)


class _Watcher(MetaPathFinder):
    """Finds nothing itself: lets the other finders find `name` and has its loader call `then` at the end."""

    def __init__(self, name: str, then: Callable[[], None]) -> None:
        self._asked = (name, then)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Watcher) and self._asked == other._asked

    __hash__ = None  # type: ignore[assignment]

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        name, then = self._asked
        if fullname != name:
            return None
        others = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        spec = next((found for finder in others if (found := finder.find_spec(fullname, path, target))), None)
        # Whoever only asks whether the package is there gets the spec and executes nothing: we stay and watch.
        if spec is not None and isinstance(spec.loader, Loader):
            execute = spec.loader.exec_module

            def execute_and_tell(module: ModuleType) -> None:
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                then()

            # On the loader that was found, so that it stays what it is to whoever asks it for source or resources.
            spec.loader.exec_module = execute_and_tell  # type: ignore[method-assign]
        return spec
