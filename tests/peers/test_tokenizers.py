"""Ids, texts and chats of real tokenizers against transformers."""

import functools

import pytest

from tests.helpers import real
from utils.hf import hub

pytestmark = pytest.mark.peers

TEXTS = (
    "Hello, world!",
    "  two spaces, a\ttab\nand lines\n\n\nthree",
    "I've, you'll, DON'T; it's 1234567890, 3.14159, 1,000,000.",
    "中文字符, ελληνικά, русский, العربية, 日本語, 한국어",
    "🙂👩‍👩‍👧‍👦 é e\u0301 ﬁ ﷺ",
    "def f(x):\n    return x**2  # <b>bold</b>\n",
    "x=  1000;\n\tif(y)",
    " 12345 naïve 日本語 👩‍👧\n\n",
    " 12345 naïve 日本語 👩‍👧\n\n\tx",
    "it's 3.14",
    "a special token in text: <|im_end|> <｜User｜> </think>",
    "<think>\nhm\n</think>",
    "<|im_start|>user\nit's<|im_end|>",
    "",
    " ",
    "x" * 300,
)
CHATS = (
    [{"role": "user", "content": "Hi!"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 2?"}],
    [
        {"role": "user", "content": "Hi!"},
        {"role": "assistant", "content": "Hello. How can I help?"},
        {"role": "user", "content": "Tell me\n\n a joke."},
    ],
    [{"role": "user", "content": "Say 12345."}, {"role": "assistant", "content": "12345"}],
    [  # R1's template drops the reasoning of earlier answers
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "<think>\nAdd.\n</think>\n\n4"},
        {"role": "user", "content": "3+3?"},
    ],
)


@pytest.fixture(scope="module", params=(hub.SMOLLM2, hub.R1), ids=("SmolLM2", "R1"))
def folder(request):
    repository = request.param
    # SmolLM2 is in the package index: never skipped.
    get = functools.partial(hub.model, repository, weights=False)
    return get() if repository == hub.SMOLLM2 else real.or_skip(get, "models", repository)


@pytest.fixture(scope="module")
def tok(folder):
    return hub.tokenizer(folder)


def test_ids(folder, tok, peer):
    assert [tok.encode(text) for text in TEXTS] == peer.encode(folder=folder, texts=TEXTS)


@pytest.mark.parametrize("skip_special_tokens", [True, False])
def test_decoded(folder, tok, peer, skip_special_tokens):
    rows = [tok.encode(text) for text in TEXTS]
    texts = peer.decode(folder=folder, rows=rows, skip_special_tokens=skip_special_tokens)
    assert [tok.decode(row, skip_special_tokens=skip_special_tokens) for row in rows] == texts


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("messages", CHATS)
def test_chat(folder, tok, peer, messages, add_generation_prompt):
    text = tok.chat(messages, add_generation_prompt=add_generation_prompt)
    expected = peer.chat(
        folder=folder, messages=messages, add_generation_prompt=add_generation_prompt
    )
    assert text == expected["text"] and tok.encode(text) == expected["ids"]


def test_special_tokens(folder, tok, peer):
    expected = peer.special_tokens(folder=folder)
    assert expected["eos_token_id"] in tok.stop_ids
    assert tok.bos_token_id == expected["bos_token_id"]
