"""The interface of a sieve: its budget, its plan, the pool it reads and its selection."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor

from ep_serve.layout import Layout, keep_count


@dataclass(frozen=True, slots=True)
class Budget:
    """How much of the pool to keep: a keep ratio, or one drop rate for audio and one for video.

    Attributes:
        keep_ratio: Share of the pool that survives, above 0 and at most 1.
        rho_audio: Fraction of the audio tokens to drop, 0 to 1; only for sieves with `takes_rho`.
        rho_video: The same for video tokens.

    Raises:
        ValueError: A number is out of its range, or a ratio is given together with a rate.
    """

    keep_ratio: float | None = None
    rho_audio: float | None = None
    rho_video: float | None = None

    def __post_init__(self) -> None:
        """Validate ranges and combinations."""
        if self.keep_ratio is not None:
            keep_count(0, self.keep_ratio)  # refuses what is no ratio
        for name in ("rho_audio", "rho_video"):
            rho: object = getattr(self, name)
            if rho is None:
                continue
            if isinstance(rho, bool) or not isinstance(rho, int | float) or not 0 <= rho <= 1:
                raise ValueError(f"{name} must be a number from 0 to 1, not {rho!r}")
            if self.keep_ratio is not None:
                raise ValueError(f"give either keep_ratio or {name}, not both")

    @property
    def has_rho(self) -> bool:
        """Whether audio and video have rates of their own."""
        return self.rho_audio is not None or self.rho_video is not None


@dataclass(frozen=True, eq=False)
class Plan:
    """Decisions about a prompt that need no tensor. Sieves subclass it to add their own.

    Attributes:
        keep: How many AV tokens survive, exactly: at least one of a prompt that has some.
    """

    keep: int


@dataclass(frozen=True, slots=True)
class Pool:
    """All AV tokens of one request, in prompt order, on one device.

    Attributes:
        hidden: (n, D), refined states for a sieve with `uses_refiner`, embeddings for others.
        kinds: (n,) int8, values of `ep_serve.layout.Kind`, never TEXT.
        positions: (3, n) int64, rows T, H, W.
        media: (n,) int32, which medium of the request a token belongs to.
        saliency: (number of AUDIO tokens,) floating, in prompt order: the attention each of them
            receives in the audio tower. Only for a sieve with `uses_saliency`.
    """

    hidden: Tensor
    kinds: Tensor
    positions: Tensor
    media: Tensor
    saliency: Tensor | None = None

    @property
    def size(self) -> int:
        """Number of AV tokens n."""
        return self.hidden.shape[0]

    def check_budget(self, k: int) -> None:
        """Raise ValueError unless `k` tokens can be kept of this pool."""
        if not 0 <= k <= self.size:
            raise ValueError(f"k must lie between 0 and the pool's size {self.size}, not {k}")


@dataclass(frozen=True, slots=True)
class Selection:
    """The tokens of a pool that are kept.

    Attributes:
        indices: (K,) int64 pool indices, ascending, on the pool's device.
        hidden: (K, D) states of the survivors where the sieve changed some, else None: they are
            the pool's.
        scores: (n,) float32 of the whole pool, where the sieve keeps its highest; for reports.

    All numbers are finite. What breaks these rules, or raises, fails the request (`checks.py`).
    """

    indices: Tensor
    hidden: Tensor | None = None
    scores: Tensor | None = None


class Sieve(ABC):
    """Picks the survivors of a pool.

    The class attributes and `plan` belong to the class: the process that plans a prompt never
    builds a sieve. A sieve with weights is an
    `nn.Module` too, and the names of its parameters are those of the checkpoint.

    Every sieve defines `select`. One whose plan holds more than a number overrides `plan` as well.
    """

    name: ClassVar[str]
    reads_text: ClassVar[bool]
    """The answer depends on the whole prompt, so it cannot be shared by questions about a clip."""
    uses_refiner: ClassVar[bool]
    """The pool holds refined states, and the decoder gets refined states as well."""
    uses_saliency: ClassVar[bool] = False
    """The pool must hold the saliency of its audio tokens."""
    takes_rho: ClassVar[bool] = False
    """`rho_audio` and `rho_video` mean something to it, and it has defaults for both."""

    @classmethod
    def for_model(cls, hidden_size: int) -> Self:
        """Build the sieve, without trained weights, for a decoder of `hidden_size`."""
        return cls()

    @classmethod
    def plan(cls, layout: Layout, budget: Budget) -> Plan:
        """Decide what can be decided on the CPU before any tensor exists.

        Depends on the AV tokens alone: a layout without its text has the same plan.

        Raises:
            ValueError: The sieve cannot do what is asked for.
        """
        if budget.has_rho:
            raise ValueError(f"rho_audio and rho_video are not supported by the sieve {cls.name!r}")
        if budget.keep_ratio is None:
            raise ValueError(f"the sieve {cls.name!r} needs a keep_ratio")
        return Plan(keep_count(layout.num_av, budget.keep_ratio))

    @abstractmethod
    def select(self, pool: Pool, plan: Plan) -> Selection:
        """Select exactly `plan.keep` tokens; equal arguments give equal results on every device.

        Args:
            pool: The AV tokens of the layout that `plan` was made for.
            plan: What `plan` of the same class returned.

        Raises:
            ValueError: The plan was made for another pool.
        """
