"""Tokenizers and chat templates: two layouts, one bos, reasoning kept for training, streams of whole characters."""

import json
import os
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from utils import CourseError
from utils.hf import chat

MIRROR = Path(
    os.environ.get("COURSE_MIRROR") or Path(__file__).resolve().parents[3] / "shared" / "mirror"
)
REAL_R1 = MIRROR / "models" / "deepseek-ai" / "DeepSeek-R1-Distill-Qwen-1.5B"

# R1's manners in miniature: bos from the template and from the tokenizer; reasoning dropped from earlier answers.
R1_LIKE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<U>' + m['content'] }}"
    "{% elif m['role'] == 'assistant' %}{% set c = m['content'] %}{% if '</think>' in c %}"
    "{% set c = c.split('</think>')[-1] %}{% endif %}{{ '<A>' + c + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<A><think>\\n' }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}\n  {% set role = m['role'] %}\n"
    "{{ '<U>' + role + '\\n' + m['content'] | trim }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<U>assistant\n{% endif %}"
)
TALK = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "<think>\nAdd.\n</think>\n\n4"},
    {"role": "user", "content": "3+3?"},
]


def byte_level(adds_bos: bool) -> tokenizers.Tokenizer:
    """All 256 bytes, no merges, and six tokens on top."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tok = tokenizers.Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens([AddedToken(token, normalized=False) for token in ("<s>", "</s>")])
    tok.add_tokens(
        [AddedToken(token, normalized=False) for token in ("<U>", "<A>", "<think>", "</think>")]
    )
    if adds_bos:
        tok.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 256)]
        )
    return tok


def files(adds_bos=True, template=R1_LIKE, **changes) -> dict[str, str]:
    config = {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "special": True},
        "chat_template": template,
    }
    found = {
        "tokenizer.json": byte_level(adds_bos).to_str(),
        "tokenizer_config.json": json.dumps({k: v for k, v in config.items() if v is not None}),
        "config.json": json.dumps({"bos_token_id": 257, "eos_token_id": 257}),
    } | changes
    return {name: text for name, text in found.items() if text is not None}


def make(**changes) -> chat.Tokenizer:
    return chat.Tokenizer(files(**changes), "tiny")


# ------------------------------------------------------------------------------------------------------ text and ids


def test_one_bos_whoever_writes_it():
    tok = make()
    assert tok.bos_token_id == 256 and tok.n_vocab == 262 and tok.name == "tiny"
    assert tok.encode("hi")[0] == 256 and len(tok.encode("hi")) == 3
    assert tok.encode("<s>hi") == tok.encode("hi")
    assert tok.encode(tok.chat(TALK)).count(256) == 1
    assert tok.encode("") == [256]


def test_no_bos_where_the_model_has_none():
    tok = make(adds_bos=False)
    assert 256 not in tok.encode("hi") and tok.encode("") == []
    bare = json.dumps({"eos_token": "</s>"})
    assert make(**{"tokenizer_config.json": bare, "adds_bos": False}).bos_token_id is None


@pytest.mark.parametrize("adds", [True, False])
def test_add_bos_token_decides_where_it_is_set(adds):
    config = json.dumps({"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": adds})
    tok = make(**{"tokenizer_config.json": config, "adds_bos": not adds})
    assert (tok.encode("hi")[0] == 256) is adds


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (None, {"eos_token_id": 3}, {3, 257}),
        ({"eos_token_id": 5}, {"eos_token_id": 3}, {5, 257}),
        ({"eos_token_id": [5, 6]}, {"eos_token_id": 3}, {5, 6, 257}),
        ({"temperature": 0.6}, {"eos_token_id": [3]}, {3, 257}),
        (None, {}, {257}),
    ],
)
def test_stop_ids(generation, config, expected):
    generation = None if generation is None else json.dumps(generation)
    tok = make(**{"generation_config.json": generation, "config.json": json.dumps(config)})
    assert tok.stop_ids == expected


def test_decode_leaves_out_special_tokens_but_not_think():
    tok = make()
    ids = tok.encode("<think>é</think>") + [257]
    assert tok.decode(ids) == "<think>é</think>"
    assert tok.decode(ids, skip_special_tokens=False) == "<s><think>é</think></s>"
    import numpy as np

    assert tok.decode(np.array(ids)) == "<think>é</think>"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 261), max_size=120))
def test_a_stream_gives_all_of_the_text(ids):
    tok = make()
    stream = tok.stream()
    pieces = [stream.push(i) for i in ids] + [stream.flush()]
    assert "".join(pieces) == tok.decode(ids)


def test_a_stream_gives_whole_characters():
    tok = make()
    text = "Zoë said 日本 👩‍👧 and \N{REPLACEMENT CHARACTER} too. " * 12
    stream, pieces = tok.stream(), []
    for i in tok.encode(text):
        pieces.append(stream.push(i))
        assert "\N{REPLACEMENT CHARACTER}" not in pieces[-1].removesuffix(
            "\N{REPLACEMENT CHARACTER} "
        )
    assert "".join(pieces) + stream.flush() == text
    assert stream.push([65, 66]) == tok.decode([65, 66]) and stream.flush() == ""


def test_a_stream_of_a_tokenizer_that_drops_the_first_space():
    words = {"<unk>": 0, "▁a": 1, "▁b": 2, "c": 3}
    tok = tokenizers.Tokenizer(models.BPE(words, [], unk_token="<unk>"))
    tok.decoder = decoders.Metaspace()
    tiny = chat.Tokenizer({"tokenizer.json": tok.to_str()}, "spaces")
    ids = [1, 2, 3, 1, 1, 2] * 20
    stream = tiny.stream()
    assert "".join(stream.push(i) for i in ids) + stream.flush() == tiny.decode(ids)


def test_a_stream_of_bytes_that_are_no_text_goes_on():
    """Where a decoder changes the text before an invalid byte, as Llama 2's does, nothing is raised."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁a", "b"]
    model = models.BPE(
        {word: i for i, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True
    )
    tok = tokenizers.Tokenizer(model)
    tok.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tiny = chat.Tokenizer({"tokenizer.json": tok.to_str()}, "bytes")
    stream = tiny.stream()
    assert stream.push([30, 218, 39, 236, 175, 152, 257, 258]) + stream.flush()
    good = [1 + byte for byte in "é日👩".encode()] + [257, 258]
    assert tiny.stream().push(good) == tiny.decode(good) == "é日👩 ab"


# -------------------------------------------------------------------------------------------------------- templates


def test_chat_and_the_generation_prompt():
    tok = make()
    assert tok.chat(TALK) == "<s><U>2+2?<A>\n\n4</s><U>3+3?<A><think>\n"
    assert tok.chat(TALK, add_generation_prompt=False) == "<s><U>2+2?<A>\n\n4</s><U>3+3?"


def test_training_text_keeps_the_reasoning():
    tok = make()
    talk = [*TALK, {"role": "assistant", "content": "<think>\nhm\n</think>\n6"}]
    text = tok.training_text(talk)
    assert (
        text
        == "<s><U>2+2?<A><think>\nAdd.\n</think>\n\n4</s><U>3+3?<A><think>\nhm\n</think>\n6</s>"
    )
    assert text.startswith(
        tok.chat(talk[:1])
    )  # training continues exactly what generation begins with
    assert tok.encode(text)[-1] == tok.eos_token_id


def test_training_text_ends_in_eos_even_if_the_template_forgets_it():
    tok = make(template="{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}")
    assert tok.training_text(TALK[:2]) == "2+2?\n<think>\nAdd.\n</think>\n\n4\n</s>"
    assert tok.training_text(TALK[:1]) == "2+2?\n"


def test_training_text_without_reasoning_is_the_chat():
    tok = make(template=CHATML)
    talk = [{"role": "user", "content": " hi "}, {"role": "assistant", "content": " yo "}]
    assert (
        tok.training_text(talk)
        == tok.chat(talk, add_generation_prompt=False)
        == "<U>user\nhi</s>\n<U>assistant\nyo</s>\n"
    )


def test_both_layouts_and_the_file_wins(tmp_path):
    for name, text in files().items():
        (tmp_path / name).write_text(text)
    inside = chat.Tokenizer.from_folder(tmp_path)
    assert inside.chat(TALK).endswith("<think>\n")
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    beside = chat.Tokenizer.from_folder(tmp_path)
    assert beside.chat(TALK[:1]) == "<U>user\n2+2?</s>\n<U>assistant\n"


def test_a_template_among_several():
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": CHATML}]
    assert make(template=named).chat(TALK[:1]).startswith("<U>user")


def test_helpers_of_templates():
    tok = make(
        template="{{ messages | tojson }} {{ strftime_now('%Y') | length }}{% for m in messages %}{% break %}{% endfor %}"
    )
    assert (
        tok.chat([{"role": "user", "content": "é<b>"}]) == '[{"role": "user", "content": "é<b>"}] 4'
    )


def test_save_writes_the_same_files(tmp_path):
    given_ = files(
        **{"chat_template.jinja": CHATML, "generation_config.json": '{"eos_token_id": 257}'}
    )
    chat.Tokenizer(given_, "x").save(tmp_path / "new")
    written = {path.name: path.read_text() for path in (tmp_path / "new").iterdir()}
    assert written == {name: text for name, text in given_.items() if name != "config.json"}
    assert chat.Tokenizer.from_folder(tmp_path / "new").stop_ids == {257}


# ----------------------------------------------------------------------------------------------------------- faults

FILE_FAULTS = {
    "no tokenizer": ({"tokenizer.json": None}, "expected a tokenizer.json, found none"),
    "no JSON": (
        {"tokenizer.json": "{"},
        "tokenizer.json: expected a tokenizer, found a damaged file",
    ),
    "another JSON": (
        {"tokenizer.json": '{"a": 1}'},
        "tokenizer.json: expected a tokenizer, found a damaged file",
    ),
    "settings cut": (
        {"tokenizer_config.json": '{"bos_token": '},
        "tokenizer_config.json: expected JSON",
    ),
    "settings a list": (
        {"tokenizer_config.json": "[]"},
        "tokenizer_config.json: expected a JSON object, found a list",
    ),
    "foreign bos": (
        {"tokenizer_config.json": '{"bos_token": "<bos>"}'},
        "bos_token: expected a token of tokenizer.json",
    ),
    "bos a number": (
        {"tokenizer_config.json": '{"bos_token": 1}'},
        "bos_token: expected a token as text, found 1",
    ),
    "eos as text": (
        {"config.json": '{"eos_token_id": "</s>"}'},
        "eos_token_id: expected a token id or a list",
    ),
    "config cut": ({"config.json": '{"eos'}, "config.json: expected JSON"),
    "generation cut": ({"generation_config.json": "{{"}, "generation_config.json: expected JSON"),
}


@pytest.mark.parametrize("case", FILE_FAULTS)
def test_bad_files_end_in_one_line(case):
    changes, expected = FILE_FAULTS[case]
    with pytest.raises(CourseError, match=expected) as error:
        make(**changes)
    assert "\n" not in str(error.value) and "tiny" in str(error.value)


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(CourseError, match="tokenizer.json: expected UTF-8"):
        chat.Tokenizer.from_folder(tmp_path)


def test_an_empty_folder(tmp_path):
    with pytest.raises(CourseError, match="expected a tokenizer.json, found none"):
        chat.Tokenizer.from_folder(tmp_path)


OK = "{{ messages }}"
CHAT_FAULTS = {
    "no template": (None, TALK, "expected a chat template, found none"),
    "no default template": (
        [{"name": "rag", "template": OK}],
        TALK,
        "expected a chat template, found none",
    ),
    "broken template": ("{% if %}", TALK, "chat template: expected Jinja"),
    "refused by the template": (
        "{{ raise_exception('roles must alternate') }}",
        TALK,
        "roles must alternate",
    ),
    "undefined": ("{{ messages[0].foo.bar }}", TALK, "chat template: .* has no attribute"),
    "out of the sandbox": ("{{ ''.__class__.__mro__ }}", TALK, "chat template: .*unsafe"),
    "changes its input": (
        "{{ messages.append(1) }}",
        TALK,
        "chat template: .*unsafe|chat template: ",
    ),
    "fails": ("{{ 1 / 0 }}", TALK, "chat template: division by zero"),
    "no messages": (OK, [], "messages: expected a list"),
    "a text": (OK, "hi", "messages: expected a list"),
    "one message alone": (OK, {"role": "user", "content": "hi"}, "messages: expected a list"),
    "no role": (OK, [{"content": "hi"}], "message 0: expected {role, content}"),
    "no content": (
        OK,
        [{"role": "user"}],
        r"message 0 \(user\): expected its content as text, found NoneType",
    ),
    "content in parts": (
        OK,
        [{"role": "user", "content": [{"text": "hi"}]}],
        "expected its content as text, found list",
    ),
    "no dictionary": (OK, ["hi"], "message 0: expected {role, content}"),
}


@pytest.mark.parametrize("case", CHAT_FAULTS)
def test_bad_chats_end_in_one_line(case):
    template, messages, expected = CHAT_FAULTS[case]
    tok = make(template=template)
    for call in (tok.chat, tok.training_text):
        with pytest.raises(CourseError, match=expected) as error:
            call(messages)
        assert "\n" not in str(error.value)


def test_a_template_that_loses_an_answer():
    tok = make(template="{{ messages[0].content }}")
    with pytest.raises(CourseError, match="expected each answer once, found one 0 times"):
        tok.training_text(TALK)


# -------------------------------------------------------------------------------------------------------- R1 itself


@pytest.fixture(scope="module")
def r1() -> chat.Tokenizer:
    if not (REAL_R1 / "tokenizer.json").is_file():
        pytest.skip("no mirror with R1's tokenizer: set COURSE_MIRROR")
    return chat.Tokenizer.from_folder(REAL_R1)


def test_r1(r1):
    assert (r1.n_vocab, r1.bos_token_id, r1.eos_token_id, r1.stop_ids) == (
        151_665,
        151_646,
        151_643,
        {151_643},
    )
    prompt = r1.chat(TALK[:1])
    assert prompt == "<｜begin▁of▁sentence｜><｜User｜>2+2?<｜Assistant｜><think>\n"
    assert r1.encode(prompt).count(r1.bos_token_id) == 1 and r1.encode("hi") == [151_646, 6023]
    text = r1.training_text(TALK[:2])
    assert (
        text == prompt + "Add.\n</think>\n\n4<｜end▁of▁sentence｜>"
        and r1.encode(text)[-1] == r1.eos_token_id
    )
    assert "Add." not in r1.chat(TALK)
