"""Parse and validate the content parts of messages.

Only known part types are forwarded. Engines support more (embeddings, ids of cached media), which
are not open to clients.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from ep_serve.contract.content_parts import content_fields
from ep_serve.gateway.errors import invalid
from ep_serve.gateway.media.inlined import MIN_MEDIA_BYTES, InlinedMedium

Modality = Literal["image", "video", "audio"]

_URL_PARTS: dict[str, Modality] = {
    "image_url": "image",
    "video_url": "video",
    "audio_url": "audio",
}
_TEXT_PARTS = frozenset({"text", "refusal"})
KNOWN = (*sorted(_TEXT_PARTS), *sorted(_URL_PARTS), "input_audio", "file")


@dataclass(frozen=True, slots=True)
class Inline:
    """Content in the request body."""

    medium: InlinedMedium


@dataclass(frozen=True, slots=True)
class Remote:
    """A URL to fetch, not yet validated."""

    url: str


@dataclass(frozen=True, slots=True)
class Uploaded:
    """An uploaded file of the tenant."""

    file_id: str


Source = Inline | Remote | Uploaded


@dataclass(frozen=True, slots=True)
class MediaPart:
    """A content part with a medium; `part` is the JSON object, which is rewritten in place.

    `modality` is None if it depends on the content of a file.
    """

    part: dict[str, Any]
    modality: Modality | None
    source: Source
    where: str

    def rewrite(self, modality: Modality, url: str, cache_id: str) -> None:
        """Replace the content by a URL that the engine can fetch."""
        kind = f"{modality}_url"
        old = self.part.get(kind)
        detail = old.get("detail") if isinstance(old, dict) else None
        self.part.clear()
        medium = {"url": url} if detail is None else {"url": url, "detail": detail}
        self.part.update({"type": kind, kind: medium, "uuid": cache_id})


def media_parts(
    messages: list[Any], max_parts: int, inlined: dict[str, InlinedMedium]
) -> Iterator[MediaPart]:
    """Validate all content parts and yield those with media.

    Args:
        messages: validated messages.
        max_parts: limit of their total number of parts.
        inlined: long strings by their placeholder; those of media are removed.

    Raises:
        ApiError: 400 with the path of the invalid part.
    """
    count = 0
    for number, message in enumerate(messages):
        content = message.get("content")
        if content is None or isinstance(content, str):
            continue
        where = f"messages[{number}].content"
        if not isinstance(content, list):
            raise invalid(f"{where} must be a string or a list of parts.", where)
        count += len(content)
        if count > max_parts:
            raise invalid(f"The messages have more than {max_parts} parts.", "messages")
        for index, part in enumerate(content):
            found = _media_part(part, f"{where}[{index}]", inlined)
            if found is not None:
                yield found


def _media_part(part: Any, where: str, inlined: dict[str, InlinedMedium]) -> MediaPart | None:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str) or kind not in KNOWN:
        raise invalid(f"{where}.type must be one of: {', '.join(KNOWN)}.", f"{where}.type")
    if kind in _TEXT_PARTS:
        if not isinstance(part.get(kind), str) or content_fields(part) != [kind]:
            raise invalid(f"{where} must have a string {kind!r} and no other content.", where)
        return None
    value = part.get(kind)
    if not isinstance(value, dict) or content_fields(part) != [kind]:
        raise invalid(f"{where} must have an object {kind!r} and no other content.", where)
    if "uuid" in part:
        raise invalid(f"{where}.uuid must not be set by clients.", f"{where}.uuid")
    if kind == "file":
        return MediaPart(part, None, _file(value, f"{where}.file", inlined), where)
    if kind == "input_audio":
        data = _string(value, "data", f"{where}.input_audio")
        medium = inlined.pop(data, None) or _short(data)
        if medium.start:
            raise invalid(f"{where}.input_audio.data must be base64, not a URL.", where)
        return MediaPart(part, "audio", _inline(medium, where), where)
    source = _url_or_file(value, f"{where}.{kind}", inlined)
    return MediaPart(part, _URL_PARTS[kind], source, where)


def _file(value: dict[str, Any], where: str, inlined: dict[str, InlinedMedium]) -> Source:
    if "file_data" in value:
        return _source(_string(value, "file_data", where), where, inlined)
    return Uploaded(_string(value, "file_id", where))


def _url_or_file(value: dict[str, Any], where: str, inlined: dict[str, InlinedMedium]) -> Source:
    if "file_id" in value:
        if "url" in value:
            raise invalid(f"{where} must have either 'url' or 'file_id'.", where)
        return Uploaded(_string(value, "file_id", where))
    return _source(_string(value, "url", where), where, inlined)


def _source(text: str, where: str, inlined: dict[str, InlinedMedium]) -> Source:
    long = inlined.pop(text, None)
    medium = long or _short(text)
    if medium.start:
        if not medium.start.lower().endswith(b";base64,"):
            raise invalid(f"{where} must be a data URL with ';base64,'.", where)
        return _inline(medium, where)
    if long is not None:
        raise invalid(f"{where} has a URL of more than {MIN_MEDIA_BYTES} bytes.", where)
    return Remote(text)


def _short(text: str) -> InlinedMedium:
    medium = InlinedMedium(text.encode())
    medium.close()
    return medium


def _inline(medium: InlinedMedium, where: str) -> Inline:
    if not medium.valid:
        raise invalid(f"{where} is not valid base64.", where)
    return Inline(medium)


def _string(value: dict[str, Any], name: str, where: str) -> str:
    text = value.get(name)
    if not isinstance(text, str) or not text:
        raise invalid(f"{where}.{name} must be a string.", f"{where}.{name}")
    return text
