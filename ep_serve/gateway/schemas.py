"""What the OpenAPI document says about bodies that are read and checked by hand."""

from __future__ import annotations

from typing import Any

_ERROR: dict[str, Any] = {
    "description": "What is wrong.",
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
                                            {"type": "array", "items": {"type": "object"}},
                                        ]
                                    },
                                },
                            },
                        },
                        "stream": {"type": ["boolean", "null"]},
                        "keep_ratio": {
                            "type": ["number", "null"],
                            "exclusiveMinimum": 0,
                            "maximum": 1,
                            "description": "Fraction of the audio and video tokens to keep.",
                        },
                        "rho_audio": {"type": ["number", "null"], "minimum": 0, "maximum": 1},
                        "rho_video": {"type": ["number", "null"], "minimum": 0, "maximum": 1},
                        "fps": {"type": ["number", "null"], "exclusiveMinimum": 0},
                        "min_pixels": {"type": ["integer", "null"], "exclusiveMinimum": 0},
                        "max_pixels": {"type": ["integer", "null"], "exclusiveMinimum": 0},
                        "use_audio_in_video": {"type": ["boolean", "null"]},
                    },
                }
            }
        },
    }
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
                        "purpose": {"type": "string"},
                    },
                }
            }
        },
    }
}
