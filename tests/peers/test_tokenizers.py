"""Ids, texts and chats of real tokenizers against transformers."""

import functools

import pytest
import transformers

from tests.helpers import real
from utils.hf import hub

pytestmark = pytest.mark.parity

TEXTS = (
    "Hello, world!",
    "  two spaces, a\ttab\nand lines\n\n\nthree",
    "I've, you'll, DON'T; it's 1234567890, 3.14159, 1,000,000.",
    "中文字符, ελληνικά, русский, العربية, 日本語, 한국어",
    "🙂👩‍👩‍👧‍👦 é e\u0301 ﬁ ﷺ",
    "def f(x):\n    return x**2  # <b>bold</b>\n",
    "a special token in text: <|im_end|> <｜User｜> </think>",
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
)


@pytest.fixture(scope="module", params=(hub.SMOLLM2, hub.R1), ids=("SmolLM2", "R1"))
def pair(request):
    repository = request.param
    # SmolLM2 is in the package index: never skipped.
    get = functools.partial(hub.model, repository, weights=False)
    folder = get() if repository == hub.SMOLLM2 else real.or_skip(get, "models", repository)
    return hub.tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", TEXTS)
def test_ids(pair, text):
    ours, theirs = pair
    assert ours.encode(text) == theirs(text).input_ids


@pytest.mark.parametrize("text", TEXTS)
def test_decoded(pair, text):
    ours, theirs = pair
    ids = ours.encode(text)
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert ours.decode(ids, False) == theirs.decode(ids, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("messages", CHATS)
def test_chat(pair, messages, prompt):
    ours, theirs = pair
    text = ours.chat(messages, add_generation_prompt=prompt)
    assert text == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    wanted = theirs.apply_chat_template(messages, tokenize=True, add_generation_prompt=prompt)
    assert ours.encode(text) == list(wanted.get("input_ids", wanted) if hasattr(wanted, "get") else wanted)


def test_the_ends_of_an_answer(pair):
    ours, theirs = pair
    assert theirs.eos_token_id in ours.stop_ids
    assert ours.bos_token_id == theirs.bos_token_id
