"""From prompt ids with one placeholder per medium to the full prompt and its positions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ep_serve.layout.kinds import Kind
from ep_serve.layout.media import MediumShape, Video
from ep_serve.layout.positions import Block, medium_block
from ep_serve.layout.tokens import MediaTokens

AV_KINDS = (Kind.VIDEO, Kind.AUDIO, Kind.IMAGE)


class PlaceholderError(ValueError):
    """The placeholders in a prompt are not those of its media."""


@dataclass(frozen=True, eq=False)
class Layout:
    """A full prompt of `L` positions: what each of them holds, and where it lies in time and space.

    Attributes:
        token_ids: (L,) int64; AV tokens carry the placeholder id of their kind.
        kinds: (L,) int8, a `Kind` each.
        media: (L,) int32, index into the media list, -1 for text.
        positions: (3, L) int64, rows T, H, W of the multimodal rotary embedding.
    """

    token_ids: npt.NDArray[np.int64]
    kinds: npt.NDArray[np.int8]
    media: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int64]

    @property
    def length(self) -> int:
        """Length L of the full prompt."""
        return self.token_ids.size

    @property
    def is_av(self) -> npt.NDArray[np.bool_]:
        """(L,) bool, true where the embedding comes from a tower."""
        is_av: npt.NDArray[np.bool_] = self.kinds != Kind.TEXT
        return is_av

    @property
    def num_av(self) -> int:
        """Size of the pool."""
        return self.length - self.num_text

    @property
    def num_text(self) -> int:
        """Positions that no sieve may drop."""
        return self.count(Kind.TEXT)

    @property
    def next_position(self) -> int:
        """Position, on every row, of the first decoded token: the largest of the prompt, plus 1.

        Not always the last token's plus 1, since text may lie inside a clip's time.
        """
        return int(self.positions.max(initial=-1)) + 1

    def count(self, kind: Kind) -> int:
        """Count the prompt positions of one kind."""
        return int(np.count_nonzero(self.kinds == kind))

    def counts(self) -> dict[Kind, int]:
        """Count the AV tokens of each kind, kinds without any included."""
        return {kind: self.count(kind) for kind in AV_KINDS}

    def part(self, start: int, stop: int) -> Layout:
        """The positions `start` to `stop` of the prompt by themselves; rotary positions stay."""
        return Layout(
            token_ids=self.token_ids[start:stop],
            kinds=self.kinds[start:stop],
            media=self.media[start:stop],
            positions=np.ascontiguousarray(self.positions[:, start:stop]),
        )

    def slots(self, medium_index: int, kind: Kind) -> npt.NDArray[np.int64]:
        """Return the prompt positions (n,) int64, ascending, of one medium's tokens of one kind.

        A tower's outputs for the medium belong there, in this order.
        """
        return np.flatnonzero((self.media == medium_index) & (self.kinds == kind)).astype(np.int64)


def build_layout(
    prompt_ids: Sequence[int] | npt.NDArray[np.int64],
    media: Sequence[MediumShape],
    tokens: MediaTokens,
) -> Layout:
    """Expand a prompt and compute its positions, as the authors of EchoingPixels do.

    A clip with sound brings its own audio_bos and audio_eos, which share the positions of the
    vision_bos and vision_eos around the clip. A placeholder without such a pair around it is laid
    out as well; the pair of sound then has positions of its own.

    Args:
        prompt_ids: The tokenized prompt, one placeholder id for each medium.
        media: The media in prompt order, whatever their kinds.
        tokens: Ids and constants of the checkpoint.

    Raises:
        PlaceholderError: Placeholders and media differ in number, kind or order.
        ValueError: A grid is not divisible by the merge size, or a clip is too long to count.
    """
    prompt = np.asarray(prompt_ids, dtype=np.int64).reshape(-1)
    places = _find_placeholders(prompt, media, tokens)
    writer = _Writer(tokens)
    written = 0
    for index, (place, medium) in enumerate(zip(places, media, strict=True)):
        writer.text(prompt[written:place])
        written = place + 1
        if isinstance(medium, Video) and medium.audio_tokens:
            opened = int(place > 0 and prompt[place - 1] == tokens.vision_bos)
            closed = int(written < prompt.size and prompt[written] == tokens.vision_eos)
            writer.text([tokens.audio_bos], back=opened)
            writer.block(index, medium_block(medium, tokens))
            writer.text([tokens.audio_eos])
            writer.text(prompt[written : written + closed], back=closed)
            written += closed
        else:
            writer.block(index, medium_block(medium, tokens))
    writer.text(prompt[written:])
    return writer.layout()


class _Writer:
    """Appends runs of a prompt; `next` is the position at which the next run starts."""

    def __init__(self, tokens: MediaTokens) -> None:
        self.next = 0
        self._id_of_kind = np.array([-1, tokens.video, tokens.audio, tokens.image], dtype=np.int64)
        self._token_ids: list[npt.NDArray[np.int64]] = []
        self._kinds: list[npt.NDArray[np.int8]] = []
        self._media: list[npt.NDArray[np.int32]] = []
        self._positions: list[npt.NDArray[np.int64]] = []

    def text(self, ids: Sequence[int] | npt.NDArray[np.int64], back: int = 0) -> None:
        """Append text that counts up from `back` positions before the next."""
        size = len(ids)
        start = self.next - back
        self._token_ids.append(np.asarray(ids, dtype=np.int64))
        self._kinds.append(np.full(size, Kind.TEXT, dtype=np.int8))
        self._media.append(np.full(size, -1, dtype=np.int32))
        self._positions.append(np.tile(np.arange(start, start + size, dtype=np.int64), (3, 1)))
        self.next = start + size

    def block(self, index: int, block: Block) -> None:
        """Append the tokens of one medium."""
        self._token_ids.append(self._id_of_kind[block.kinds])
        self._kinds.append(block.kinds)
        self._media.append(np.full(block.kinds.size, index, dtype=np.int32))
        self._positions.append(block.positions + self.next)
        self.next += block.end

    def layout(self) -> Layout:
        """Return everything appended so far."""
        return Layout(
            token_ids=np.concatenate(self._token_ids),
            kinds=np.concatenate(self._kinds),
            media=np.concatenate(self._media),
            positions=np.concatenate(self._positions, axis=1),
        )


def _find_placeholders(
    prompt: npt.NDArray[np.int64], media: Sequence[MediumShape], tokens: MediaTokens
) -> list[int]:
    """Find where the placeholders stand, once they are known to match the media."""
    kinds = np.zeros(prompt.size, dtype=np.int8)
    for kind in AV_KINDS:
        kinds[prompt == tokens.placeholder(kind)] = kind
    places: list[int] = np.flatnonzero(kinds).tolist()
    found = [Kind(kinds[place]) for place in places]
    expected = [medium.kind for medium in media]
    if found != expected:
        raise PlaceholderError(
            f"the prompt has {len(found)} media placeholders ({_names(found)}), but the request "
            f"has {len(expected)} media ({_names(expected)}); media tokens such as <|VIDEO|>, "
            "<|AUDIO|> and <|IMAGE|> must not be written in a message's text"
        )
    return places


def _names(kinds: Iterable[Kind], most: int = 8) -> str:
    names = [kind.name.lower() for kind in kinds]
    shown = names[:most] + ["..."] * (len(names) > most)
    return ", ".join(shown) or "none"
