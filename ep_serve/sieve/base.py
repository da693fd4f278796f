"""What a sieve is, and the pool it sees."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor

from ep_serve.layout import Layout, keep_count


@dataclass(frozen=True, slots=True)
class Pool:
    """All AV tokens of one request, in prompt order, on one device.

    Attributes:
        hidden: (n, D), refined states for a sieve with `uses_refiner`, embeddings for others.
        kinds: (n,) int8, values of `ep_serve.layout.Kind`, never TEXT.
        positions: (3, n) int64, rows T, H, W.
        media: (n,) int32, which medium of the request a token belongs to.
    """

    hidden: Tensor
    kinds: Tensor
    positions: Tensor
    media: Tensor

    @property
    def size(self) -> int:
        """Number of AV tokens n."""
        return self.hidden.shape[0]

    def check_budget(self, k: int) -> None:
        """Raise ValueError unless `k` tokens can be kept of this pool."""
        if not 0 <= k <= self.size:
            raise ValueError(f"k must lie between 0 and the pool's size {self.size}, not {k}")


class Sieve(ABC):
    """Picks the survivors of a pool.

    What is asked before a model exists (the class attributes and `budget`) belongs to the class:
    the process that plans a prompt never builds a sieve. A sieve with weights is an `nn.Module`
    too, and the names of its parameters are those of the checkpoint.
    """

    name: ClassVar[str]
    reads_text: ClassVar[bool]
    """The answer depends on the whole prompt, so it cannot be shared by questions about a clip."""
    uses_refiner: ClassVar[bool]
    """The pool holds refined states, and the decoder gets refined states as well."""

    @classmethod
    def for_model(cls, hidden_size: int) -> Self:
        """Build the sieve, without trained weights, for a decoder of `hidden_size`."""
        return cls()

    @classmethod
    def budget(cls, layout: Layout, keep_ratio: float) -> int:
        """How many AV tokens of a prompt survive, known on the CPU before any tensor exists.

        Raises:
            ValueError: `keep_ratio` is not above 0 and at most 1.
        """
        return keep_count(layout.num_av, keep_ratio)

    @abstractmethod
    def select(self, pool: Pool, k: int) -> Tensor:
        """Choose exactly `k` tokens, the same ones whenever and wherever it is asked.

        Returns:
            (k,) int64 pool indices, ascending, on the pool's device.

        Raises:
            ValueError: `k` is negative or larger than the pool.
        """
