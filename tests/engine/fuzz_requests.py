"""Strategies for requests: mostly sensible, with fields that are not."""

from __future__ import annotations

from functools import cache
from typing import Any

from hypothesis import strategies as st

from tests.clips import make_clip, make_image, make_wav
from tests.engine.client import MODEL, audio, image, video

ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 9, 2**31, 2**63, -(2**70), 10**400),
    *(0.5, -0.0, 1e-300, 1e308, float("inf"), float("-inf"), float("nan")),
    *("", "1", "x" * 2_000, "<|VIDEO|>", "\0", "é\u202e🎬"),
    *([], [None], [[]], {}, {"a": {}}, ["a", 5], {"5": 1}),
]
odd = st.sampled_from(ODD)


def mostly(sensible: st.SearchStrategy[Any], odds: int = 4) -> st.SearchStrategy[Any]:
    """A sensible value, or one time in `odds` + 1 something else."""
    return st.integers(0, odds).flatmap(lambda draw: sensible if draw else odd)


_tokens = st.lists(st.integers(-1, 600), max_size=4)

SAMPLING: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.sampled_from([0, 0.7, 1, 2, 1e-9, 1e9, -1]),
    "top_p": st.sampled_from([0, 1e-9, 0.5, 1, 1.5]),
    "top_k": st.sampled_from([-1, 0, 1, 20, 10**6]),
    "min_p": st.sampled_from([0, 0.1, 1, 2]),
    "presence_penalty": st.sampled_from([-2, 0, 2, 3]),
    "frequency_penalty": st.sampled_from([-2, 0, 2, 3]),
    "repetition_penalty": st.sampled_from([1e-9, 0.5, 1, 2, 1e9, 0]),
    "n": st.sampled_from([1, 2, 3, 8, 9, 2_000]),
    "seed": st.integers(-(2**63) - 1, 2**63),
    "stop": st.sampled_from(["a", ["a", "b"], ["a"] * 5, [""], "x" * 2_000]),
    "stop_token_ids": _tokens,
    "allowed_token_ids": _tokens,
    "bad_words": st.lists(st.sampled_from(["a", " b", "", "<|im_end|>"]), max_size=3),
    "logit_bias": st.dictionaries(
        st.sampled_from(["0", "5", "511", "512", "-1", "x"]),
        st.sampled_from([-100, 0, 1, 100, 1e9]),
        max_size=3,
    ),
    "logprobs": st.booleans(),
    "top_logprobs": st.sampled_from([-1, 0, 2, 20, 21]),
    "prompt_logprobs": st.sampled_from([-1, 0, 2, 21]),
    "logprob_token_ids": _tokens,
    "min_tokens": st.sampled_from([0, 1, 4, 5, 10**9]),
    "max_completion_tokens": st.sampled_from([0, 1, 3, 10**9]),
    "ignore_eos": st.booleans(),
    "echo": st.booleans(),
    "stream": st.booleans(),
    "stream_options": st.sampled_from([{"include_usage": True}, {"continuous_usage_stats": True}]),
    "stream_interval": st.sampled_from([0, 1, 50]),
    "use_beam_search": st.sampled_from([False, False, False, True]),
    "truncate_prompt_tokens": st.sampled_from([-2, -1, 0, 1, 5, 4_000]),
    "truncation_side": st.sampled_from(["left", "right"]),
    "skip_special_tokens": st.booleans(),
    "return_token_ids": st.booleans(),
    "repetition_detection": st.fixed_dictionaries(
        {
            "max_pattern_size": st.sampled_from([0, 3, 65, 10**9]),
            "min_count": st.sampled_from([0, 2, 10**9]),
        }
    ),
    "thinking_token_budget": st.sampled_from([-1, 0, 5]),
    "priority": st.sampled_from([0, 1, -1]),
    "cache_salt": st.sampled_from(["a", "b" * 200, "/"]),
    "kv_transfer_params": st.sampled_from([{"prompt_token_ids": [1, 2]}, {"x": 1}]),
    "vllm_xargs": st.sampled_from([{"a": 1}, {"a": ["b", 2**70]}]),
}
CHAT: dict[str, st.SearchStrategy[Any]] = {
    "add_generation_prompt": st.booleans(),
    "continue_final_message": st.booleans(),
    "reasoning_effort": st.sampled_from(["none", "low", "max"]),
    "chat_template_kwargs": st.sampled_from([{"x": 1}, {"add_vision_id": True}]),
    "documents": st.sampled_from([[{"title": "a", "text": "b"}], [{}]]),
    "parallel_tool_calls": st.booleans(),
    "mm_processor_kwargs": st.sampled_from([{"fps": 1}, {"keep_ratio": 0}, {"size": {}}]),
    "media_io_kwargs": st.sampled_from([{"video": {"num_frames": 5}}, {"ep_serve": {}}]),
}
MEDIA: dict[str, st.SearchStrategy[Any]] = {
    "keep_ratio": st.sampled_from([1e-9, 0.01, 0.2, 1, 0, 1.01]),
    "rho_audio": st.sampled_from([0, 0.5, 1]),
    "rho_video": st.sampled_from([0, 0.5, 1]),
    "fps": st.sampled_from([1e-9, 0.001, 0.5, 2, 4, 60, 10**6]),
    "min_pixels": st.sampled_from([0, 783, 784, 3_136, 50_000, 10**9, 10**12]),
    "max_pixels": st.sampled_from([0, 783, 784, 3_136, 200_704, 10**9]),
    "use_audio_in_video": st.booleans(),
    "return_selection": st.booleans(),
}

# -- structured outputs -------------------------------------------------------------------------

_numbers = st.sampled_from([-1, 0, 1, 2, 5, 10_000, 10**9])
_regex_atoms = st.sampled_from(
    [
        "a",
        "[a-z]",
        ".",
        "\\d",
        "(?:x)",
        "[^\\u0000-\\U0010ffff]",
        "^",
        "$",
        "\\",
        "(",
        "é",
        "\0",
        "",
    ]
)
regexes = st.recursive(
    _regex_atoms,
    lambda inner: st.one_of(
        st.lists(inner, min_size=2, max_size=4).map("".join),
        st.lists(inner, min_size=2, max_size=3).map(lambda items: f"({'|'.join(items)})"),
        st.builds(
            lambda item, times: f"({item}){times}",
            inner,
            st.sampled_from(["*", "+", "?", "{2}", "{0,3}", "{64}", "{1,}", "{1000000}", "{3,1}"]),
        ),
    ),
    max_leaves=6,
)
_terms = st.one_of(
    st.sampled_from(['"a"', '""', "[a-z]", "[^a]", "root", "x", "y", "nope", '"\\n"', "(", "!"]),
    st.sampled_from(
        ['"a"*', "[a-z]?", "x+", "root*", "(x | y)", "(root root)?", '"a"{3}', "y{,2}"]
    ),
)
_bodies = st.lists(
    st.lists(_terms, min_size=1, max_size=4).map(" ".join), min_size=1, max_size=3
).map(" | ".join)
grammars = st.one_of(
    st.builds(lambda r, x, y: f"root ::= {r}\nx ::= {x}\ny ::= {y}", _bodies, _bodies, _bodies),
    st.sampled_from(["root ::= root", "", "start: x\nx: /a/", 'root ::= "a" root', "{", "::="]),
)
_leaves = st.one_of(
    st.sampled_from(
        [
            *({"type": "string"}, {"type": "integer"}, {"type": "null"}, {}, True, False),
            *({"enum": []}, {"enum": [1, "a", None]}, {"const": {"a": [1]}}, {"type": "x"}),
            *({"$ref": "#"}, {"$ref": "#/$defs/a"}, {"$ref": "#/no"}, {"$ref": "http://x/"}),
            *({"type": "string", "format": "date"}, {"type": ["string", "null"]}, {"not": {}}),
        ]
    ),
    st.builds(
        lambda low, high: {"type": "string", "minLength": low, "maxLength": high},
        _numbers,
        _numbers,
    ),
    st.builds(
        lambda low, high: {"type": "integer", "minimum": low, "maximum": high}, odd, _numbers
    ),
    regexes.map(lambda pattern: {"type": "string", "pattern": pattern}),
    odd,
)
schemas = st.recursive(
    _leaves,
    lambda inner: st.one_of(
        st.builds(
            lambda a, b, required: {
                "type": "object",
                "properties": {"a": a, "b": b},
                "required": required,
                "additionalProperties": False,
            },
            inner,
            inner,
            st.sampled_from([[], ["a"], ["a", "b"], ["c"]]),
        ),
        st.builds(
            lambda items, low, high: {
                "type": "array",
                "items": items,
                "minItems": low,
                "maxItems": high,
            },
            inner,
            _numbers,
            _numbers,
        ),
        st.builds(
            lambda name, items: {name: items},
            st.sampled_from(["anyOf", "oneOf", "allOf", "prefixItems"]),
            st.lists(inner, max_size=3),
        ),
        st.builds(lambda a, b: {"$ref": "#/$defs/a", "$defs": {"a": a, "b": b}}, inner, inner),
        st.builds(lambda name, value: {"patternProperties": {name: value}}, regexes, inner),
    ),
    max_leaves=5,
)
_formats = st.recursive(
    st.one_of(
        schemas.map(lambda schema: {"type": "json_schema", "json_schema": schema}),
        regexes.map(lambda pattern: {"type": "regex", "pattern": pattern}),
        grammars.map(lambda text: {"type": "grammar", "grammar": text}),
        st.sampled_from([{"type": "any_text"}, {"type": "const_string", "value": "a"}, {}]),
    ),
    lambda inner: st.one_of(
        st.builds(
            lambda kind, items: {"type": kind, "elements": items},
            st.sampled_from(["sequence", "or"]),
            st.lists(inner, max_size=3),
        ),
        st.builds(
            lambda kind, item: {"type": kind, "content": item},
            st.sampled_from(["optional", "star", "plus"]),
            inner,
        ),
        inner.map(lambda item: {"type": "tag", "begin": "<a>", "content": item, "end": "</a>"}),
    ),
    max_leaves=3,
)
tags = _formats.map(lambda form: {"type": "structural_tag", "format": form})
constraints = st.one_of(
    schemas.map(lambda schema: {"json": schema}),
    regexes.map(lambda pattern: {"regex": pattern}),
    grammars.map(lambda text: {"grammar": text}),
    st.lists(st.sampled_from(["a", "", '"', "\n", "é"]), max_size=3).map(lambda c: {"choice": c}),
    tags.map(lambda tag: {"structural_tag": str(tag).replace("'", '"')}),
    st.sampled_from([{"json_object": True}, {"json_object": False}, {"json": "{"}, {"a": 1}]),
)
STRUCTURED: dict[str, st.SearchStrategy[Any]] = {
    "structured_outputs": constraints,
    "response_format": st.one_of(
        schemas.map(lambda s: {"type": "json_schema", "json_schema": {"name": "x", "schema": s}}),
        tags,
        st.sampled_from([{"type": "json_object"}, {"type": "text"}, {"type": "json_schema"}]),
    ),
}
_functions = st.one_of(
    mostly(schemas).map(lambda schema: {"name": "f", "parameters": schema}),
    st.sampled_from([{}, {"name": "g"}, {"name": None}, {"name": "f", "strict": True}, None]),
)
tools = st.fixed_dictionaries(
    {
        "tools": mostly(
            st.lists(
                mostly(_functions.map(lambda f: {"type": "function", "function": f}), 9), max_size=2
            ),
            9,
        ),
        "tool_choice": st.sampled_from(
            ["none", "auto", "required", "x", {"type": "function", "function": {"name": "f"}}]
        ),
    }
)

# -- messages -----------------------------------------------------------------------------------


@cache
def media() -> list[dict[str, Any]]:
    clip = make_clip(1, size=(56, 56))
    return [
        video(clip),
        video(make_clip(1, size=(56, 56), sound_rate=None)),
        video(clip[: len(clip) // 2]),
        audio(make_wav(0.5)),
        audio(make_wav(0.001)),
        image(make_image(56, 56)),
        image(b"x"),
        {"type": "video_url", "video_url": {"url": "file:///etc/passwd"}},
        {"type": "image_url", "image_url": None, "uuid": "unknown"},
        {"type": "image_url"},
    ]


_words = st.sampled_from(
    ["Hello", "", " ", "<|VIDEO|>", "<|VID", "EO|>", "<|vision_bos|>", "<|im_end|>", "\0", "é🎬"]
)
_texts = st.one_of(
    _words.map(lambda words: {"type": "text", "text": words}),
    _words.map(lambda words: {"type": "refusal", "refusal": words}),
    _words,
)
_media = st.deferred(lambda: st.sampled_from(media()))
_contents = st.one_of(
    st.just("What is it?"),
    _words,
    st.lists(mostly(st.one_of(_texts, _media), 9), min_size=1, max_size=4),
    st.tuples(_media, st.just({"type": "text", "text": "What is it?"})).map(list),
    odd,
)
_calls = st.sampled_from(
    [
        [{"id": "1", "type": "function", "function": {"name": "f", "arguments": words}}]
        for words in ("{}", '{"a": "<|\\u0056IDEO|>"}', "{", "5")
    ]
)
_messages = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "user", "user", "system", "assistant", "tool", "x", 5]),
        "content": _contents,
    },
    optional={
        "name": _words,
        "tool_calls": _calls,
        "tool_call_id": _words,
        "reasoning": _words,
        "refusal": _words,
    },
)
conversations = st.one_of(
    st.just([{"role": "user", "content": "Hello"}]),
    st.lists(_messages, min_size=1, max_size=3),
    st.tuples(_media, st.just({"type": "text", "text": "What is it?"})).map(
        lambda parts: [{"role": "user", "content": list(parts)}]
    ),
)


def _some(fields: dict[str, st.SearchStrategy[Any]], most: int) -> st.SearchStrategy[Any]:
    """A few of the fields."""
    chosen = st.lists(st.sampled_from(sorted(fields)), max_size=most, unique=True)
    return chosen.flatmap(
        lambda names: st.fixed_dictionaries({name: mostly(fields[name]) for name in names})
    )


def _chat(messages: Any, *parts: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    body: dict[str, Any] = {"model": MODEL, "max_tokens": 3, "messages": messages}
    for part in parts:
        body |= part
    return "chat/completions", body


def _completion(prompt: Any, *parts: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    _, body = _chat(None, *parts)
    del body["messages"]
    return "completions", {**body, "prompt": prompt}


_nothing: st.SearchStrategy[dict[str, Any]] = st.just({})
_prompts = st.one_of(
    _words, st.lists(_words, max_size=3), st.lists(st.integers(-1, 600), max_size=4), odd
)
requests = st.one_of(
    st.builds(_chat, conversations, _some(SAMPLING, 4), _some(CHAT, 1), _some(MEDIA, 3)),
    st.builds(_chat, conversations, _some(STRUCTURED, 1), _some(SAMPLING, 2)),
    st.builds(
        _chat,
        st.just([{"role": "user", "content": "Hello"}]),
        st.fixed_dictionaries({"structured_outputs": constraints}),
        st.one_of(_nothing, _some(SAMPLING, 1)),
    ),
    st.builds(_chat, conversations, tools, _some(SAMPLING, 1)),
    st.builds(_completion, _prompts, _some(SAMPLING, 3), _some(STRUCTURED, 1)),
)
