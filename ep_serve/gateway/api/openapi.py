"""OpenAPI schemas of bodies that are parsed without FastAPI."""

from __future__ import annotations

from typing import Any

from ep_serve.contract.request_options import json_schema

_ERROR: dict[str, Any] = {
    "description": "Error",
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["error"],
                "properties": {
                    "error": {
                        "type": "object",
                        "required": ["message", "type", "param", "code"],
                        "properties": {
                            "message": {"type": "string"},
                            "type": {"type": "string"},
                            "param": {"type": ["string", "null"]},
                            "code": {"type": ["string", "null"]},
                        },
                    }
                },
            }
        }
    },
}

ERRORS: dict[int | str, dict[str, Any]] = {"4XX": _ERROR, "5XX": _ERROR}


def _part(kind: str, **properties: Any) -> dict[str, Any]:
    """Return the schema of a content part."""
    content = {"type": "object", "properties": properties}
    required = {"required": ["type", kind]}
    return {"type": "object", **required, "properties": {"type": {"const": kind}, kind: content}}


_STRING = {"type": "string"}
_TEXT = {
    "type": "object",
    "required": ["type", "text"],
    "properties": {"type": {"const": "text"}, "text": _STRING},
}
_PARTS = [
    _TEXT,
    *(
        _part(kind, url=_STRING, file_id=_STRING)
        for kind in ("image_url", "video_url", "audio_url")
    ),
    _part("input_audio", data=_STRING, format=_STRING),
    _part("file", file_id=_STRING, file_data=_STRING, filename=_STRING),
]

CHAT_OPENAPI: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["model", "messages"],
                    "additionalProperties": True,
                    "properties": {
                        "model": {"type": "string", "minLength": 1, "maxLength": 256},
                        "messages": {
                            "type": "array",
                            "minItems": 1,
                            "items": {
                                "type": "object",
                                "required": ["role"],
                                "properties": {
                                    "role": {"type": "string"},
                                    "content": {
                                        "anyOf": [
                                            {"type": "string"},
                                            {"type": "null"},
                                            {"type": "array", "items": {"anyOf": _PARTS}},
                                        ]
                                    },
                                },
                            },
                        },
                        "stream": {"type": ["boolean", "null"]},
                        **json_schema(),
                    },
                }
            }
        },
    },
    "responses": {
        "200": {
            "content": {
                "application/json": {"schema": {"type": "object"}},
                "text/event-stream": {"schema": {}},
            }
        }
    },
}

CONTENT_OPENAPI: dict[str, Any] = {
    "responses": {"200": {"content": {"application/octet-stream": {"schema": {}}}}}
}

UPLOAD_OPENAPI: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "minLength": 1, "maxLength": 64},
                    },
                }
            }
        },
    }
}
