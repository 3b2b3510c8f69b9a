"""Calling a function of ours right after another package's module has been imported.

    after_import("transformers.quantizers.auto", "alphaquant.runtime.transformers_plugin:register")

`import alphaquant` must make packed checkpoints known to transformers and must not import
transformers, which takes seconds that `--help` does not have. So this is the one place of the
project that does work at import: it puts a finder into `sys.meta_path`, the list that Python asks
where a module is. The finder answers for one module only, with the answer of the finders behind
it, and adds our call behind the execution of that module. Nothing happens where the module is
never imported or is not installed; where it is imported already, the call is made at once.

The function is called again when the module is executed again (`importlib.reload`), and so must
be one that may be called twice. An error in it is the error of the import.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from itertools import dropwhile
from types import ModuleType
from typing import Any


def after_import(module: str, target: str) -> None:
    """Call a function after every execution of a module; at once, too, if it is imported already.

    Asking for the same pair twice is asking once.

    Args:
        module: dotted name of the module to wait for; it need not exist.
        target: `module:function` of ours, imported when it is needed and called without arguments.
    """
    finder = _Finder(module, target)
    if finder not in sys.meta_path:
        sys.meta_path.insert(0, finder)
    if module in sys.modules:
        _call(target)


def _call(target: str) -> None:
    module, _, function = target.partition(":")
    getattr(import_module(module), function)()


@dataclass(frozen=True)
class _Finder(MetaPathFinder):
    module: str
    target: str

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """What the finders behind this one find, with our call behind its loader."""
        if fullname != self.module:
            return None
        # Only the finders behind this one: another hook that asks all finders, this one included,
        # cannot make the two ask each other for ever.
        for finder in list(dropwhile(lambda f: f is not self, sys.meta_path))[1:]:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self.target)
                return spec
        return None


class _Loader(Loader):
    """Another loader, with our call behind it."""

    def __init__(self, loader: Loader, target: str) -> None:
        self._loader, self._target = loader, target

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the other loader does."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """As the other loader does, then the call.

        The module looks as if this loader had never been there: `inspect` and reloading ask
        `__loader__` and `__spec__`.
        """
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _call(self._target)

    def __getattr__(self, name: str) -> Any:
        # Who has only looked for the spec may ask for the source.
        return getattr(self.__dict__["_loader"], name)
