"""Sums along rows, as in RMSNorm and its backward, with the whole row on chip.

Inductor keeps rows of up to 1024 elements in registers and walks longer ones in a loop, reading
them again for what follows the sum. Rows as wide as a model's fit, too: one reading.
"""

from collections.abc import Callable
from typing import Any

from torch._inductor.choices import InductorChoices
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.virtualized import V

LONGEST = 8192  # elements of a row that stays in registers


class RowsOnChip(InductorChoices):
    """Inductor's own choices but for rows of 1025 to `LONGEST` elements."""

    def should_use_persistent_reduction(self, features: Any, cooperative_reduction: bool) -> bool:
        """Whether a kernel holds its reduced dimension at once (Inductor's `features` of it)."""
        if super().should_use_persistent_reduction(features, cooperative_reduction):
            return True
        if cooperative_reduction or features.get_reduction_hint() != ReductionHint.INNER:
            return False
        return V.graph.sizevars.statically_known_leq(features.reduction_numel, LONGEST)


def with_rows_on_chip(compile_inner: Callable) -> Callable:
    """Inductor's inner compiler under `RowsOnChip`; a user's own choices are left as they are."""

    def compile_with_choices(*args: Any, **kwargs: Any) -> Any:
        if type(V.choices) is not InductorChoices:
            return compile_inner(*args, **kwargs)
        with V.set_choices_handler(RowsOnChip()):
            return compile_inner(*args, **kwargs)

    return compile_with_choices
