"""How many kernels some work would launch on a GPU, counted without one.

Operations of torch are counted as they are dispatched, each as one launch, which is a lower bound
for a few (a Cholesky factorization, a triangular solve). Views and memory that is only reserved
are none. Launches of Triton kernels are counted and not run, so what they would have written stays
as it was; memory that is reserved is zero, so that the same work gives the same counts. Copies
between a device and the host are not counted, because here both are the same.
"""

import importlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch.utils._python_dispatch import TorchDispatchMode

_RESERVE = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty"}
_NO_KERNELS = {
    *_RESERVE,
    *("aten::_unsafe_view", "aten::_reshape_alias", "aten::_local_scalar_dense"),
    *("aten::lift_fresh", "aten::detach", "aten::set_", "aten::item"),
}


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations of torch that are more than views."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts = counts

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count, then do."""
        name = func._schema.name
        if not func.is_view and name not in _NO_KERNELS:
            self.counts[name] += 1
        found = func(*args, **(kwargs or {}))
        return found.zero_() if name in _RESERVE else found


@contextmanager
def counted_launches() -> Iterator[Counter[str]]:
    """Count the launches inside; Triton's have the names of their kernels.

    Yields:
        How often each was launched so far: `aten::mm`, `gptq_block_kernel`.
    """
    counts: Counter[str] = Counter()
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    jit: Any = importlib.import_module("triton.runtime.jit")

    def count(self: Any, *args: Any, **options: Any) -> None:
        counts[self.fn.__name__] += 1

    with (
        mock.patch.object(interpreter.InterpretedFunction, "run", count),
        mock.patch.object(jit.JITFunction, "run", count),
        _Operations(counts),
    ):
        yield counts
