"""Expert parallelism: every rank holds a contiguous part of the routed experts and runs those.

All ranks run the whole model on the same tokens; in an experts module each adds up its own
experts' outputs, and the sum over the ranks goes on. Attention, routers, shared experts and
everything else are on every rank. How ranks reach each other is the caller's: `reduce` sums a
tensor over the ranks, for `torch.distributed`::

    def reduce(partial: Tensor) -> Tensor:
        torch.distributed.all_reduce(partial)
        return partial

Every rank calls it once per experts module and forward pass, also without a token for it.

Worked example, 8 experts on 3 ranks: 0 1 | 2 3 4 | 5 6 7.

Letters: E experts.
"""

from collections.abc import Callable

from torch import Tensor, nn

from alphaquant.errors import ModelError
from alphaquant.runtime.modules import PackedExperts


def owned_experts(n_experts: int, rank: int, n_ranks: int) -> range:
    """Numbers of the experts that a rank holds: a contiguous part, equal parts up to one expert.

    Args:
        n_experts: E, of a layer.
        rank: from 0.
        n_ranks: of all; where it is above E some ranks hold none.

    Raises:
        ModelError: there is no such rank.
    """
    if not 0 <= rank < n_ranks:
        raise ModelError(f"there is no rank {rank} of {n_ranks}; ranks go from 0 to n_ranks - 1")
    return range(n_experts * rank // n_ranks, n_experts * (rank + 1) // n_ranks)


def keep_rank(
    model: nn.Module, rank: int, n_ranks: int, reduce: Callable[[Tensor], Tensor]
) -> None:
    """Leave a packed model with the experts of one rank; the others' tensors are freed.

    Args:
        model: with all its experts, changed in place.
        rank: from 0.
        n_ranks: of all.
        reduce: sums what each rank gives it, [n, H], and gives every rank the sum.

    Raises:
        ModelError: there is no such rank, the model has no packed experts in a module of their
            own, or it lost some already.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, PackedExperts) and module.site.is_routed
    }
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no packed experts to divide among ranks; give a packed "
            "model with routed experts, which are not in a ModuleList"
        )
    for name, experts in found.items():
        if len(experts.owned) != experts.num_experts:
            raise ModelError(
                f"{name} holds {len(experts.owned)} of its {experts.num_experts} experts only; "
                "load the checkpoint again to divide it in another way"
            )
    for experts in found.values():
        experts.keep_experts(owned_experts(experts.num_experts, rank, n_ranks))
        experts.reduce = reduce
