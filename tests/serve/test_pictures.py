"""The digests that requests are routed by."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlcache_fx.serve.pictures import picture_digests


def chat(*urls: str, **more: Any) -> bytes:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content = [*parts, {"type": "text", "text": "what is it ?"}]
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": content}], **more}).encode()


def response(*urls: str) -> bytes:
    parts = [{"type": "input_image", "image_url": url} for url in urls]
    return json.dumps({"model": "m", "input": [{"role": "user", "content": parts}]}).encode()


A, B = "data:image/png;base64,AAAA", "data:image/png;base64,BBBB"


def test_digests_follow_the_pictures() -> None:
    first, second = picture_digests(chat(A, B))
    assert first != second
    assert picture_digests(chat(B, A, B)) == (second, first)
    assert picture_digests(chat(A, temperature=1.0)) == (first,)


def test_chats_and_responses_agree() -> None:
    assert picture_digests(response(A, B)) == picture_digests(chat(A, B))


@pytest.mark.parametrize("other", [{"model": "n"}, {"vlcache": {"salt": "s"}}])
def test_other_models_and_salts_have_other_digests(other: dict[str, Any]) -> None:
    assert picture_digests(chat(A, **other)) != picture_digests(chat(A))


def test_tenants_have_digests_of_their_own() -> None:
    assert len({picture_digests(chat(A), tenant) for tenant in ("", "alice", "bob")}) == 3


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"image",
        b'["image"]',
        b'{"image_url": ',
        b'{"messages": "image_url"}',
        b'{"messages": [{"content": "image_url"}, 3]}',
        b'{"messages": [{"content": [{"image_url": 3}, "image_url"]}]}',
        b"[" * 100_000 + b"image",
        chat(A, vlcache={"bypass": True}),
        chat(),
    ],
    ids=lambda body: repr(body[:20]),
)
def test_no_digest_without_pictures_to_reuse(body: bytes) -> None:
    assert picture_digests(body) == ()


def test_halves_of_characters_are_no_error() -> None:
    body = chat("data:?").replace(b"data:?", b"data:\\ud800")
    assert len(picture_digests(body)) == 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["messages", "input", "content", "image_url", "url", "vlcache"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=20,
)


@given(JSON)
def test_any_json_is_understood_or_ignored(value: Any) -> None:
    found = picture_digests(json.dumps({"x": "image", "messages": value}).encode())
    assert len(set(found)) == len(found)
