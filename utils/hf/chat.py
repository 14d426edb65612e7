"""A model's own tokenizer and chat template, out of the files beside its weights.

Hugging Face keeps them as `tokenizer.json` (vocabulary, merges, special tokens; read by the
`tokenizers` library) and `tokenizer_config.json` (which token begins and ends a text, and the chat
template, unless there is a `chat_template.jinja`). A chat template is a Jinja program that writes a
list of messages as the one text on which the model was trained. It comes with the download, so it
runs in Jinja's sandbox, as in transformers.

DeepSeek-R1-Distill sets three traps:

- the template writes the bos token, and the tokenizer adds one: `encode` gives one bos, never two;
- `config.json` and the tokenizer disagree on which token bos is: the tokenizer's is used;
- the template deletes the reasoning of earlier answers. That is right for a conversation and wrong
  for training: `training_text` keeps it.
"""

import datetime
import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import jinja2
import tokenizers
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers.decoders import DecodeStream

from utils import CourseError, first_line, unexpected

FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja with transformers' settings and helpers: templates on the hub are written for them."""
    layout = {"trim_blocks": True, "lstrip_blocks": True}
    jinja = ImmutableSandboxedEnvironment(**layout, extensions=[loopcontrols])
    jinja.filters["tojson"] = lambda value, **how: json.dumps(value, ensure_ascii=False, **how)
    jinja.globals["raise_exception"] = _raise
    jinja.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return jinja


class Tokenizer:
    """Text to token ids and back, messages to text. `files` are the texts of the files by name."""

    def __init__(self, files: dict[str, str], name: str):
        self.name, self._files = name, files
        self._settings = self._read("tokenizer_config.json")
        if "tokenizer.json" not in files:
            how = "download the model's tokenizer files too"
            raise unexpected(name, "a tokenizer.json", "none", how)
        try:
            self._tok = tokenizers.Tokenizer.from_str(files["tokenizer.json"])
        except Exception as error:  # tokenizers raises plain exceptions
            found = f"a damaged file ({first_line(error)})"
            raise unexpected(f"{name}: tokenizer.json", "a tokenizer", found) from error
        self._tok.no_padding()
        self._tok.no_truncation()
        self.special = {role: token for role in ROLES if (token := self._special(role)) is not None}
        self.n_vocab = max(self._tok.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if self.n_vocab == 0:
            raise unexpected(f"{name}: tokenizer.json", "a vocabulary", "an empty one")
        self.bos_token_id, self.eos_token_id = self._id("bos_token"), self._id("eos_token")
        self._adds_bos = self._settings.get("add_bos_token")
        if self._adds_bos is None:  # then tokenizer.json says whether a text begins with bos
            self._adds_bos = self._tok.encode("").ids[:1] == [self.bos_token_id]
        self.stop_ids = self._stop_ids()

    @classmethod
    def from_folder(cls, path: str | Path) -> "Tokenizer":
        """From a model's folder. Raises CourseError for missing, damaged or contradicting files."""
        files = {}
        try:
            for name in (*FILES, "config.json"):
                if (file := Path(path) / name).is_file():
                    files[name] = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise unexpected(file, "UTF-8", error.reason, "download it again") from None
        return cls(files, str(path))

    def save(self, directory: str | Path) -> None:
        """Write the tokenizer's files, unchanged, for a model that is saved beside them."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        for name in self._files.keys() & set(FILES):
            (Path(directory) / name).write_text(self._files[name], encoding="utf-8", newline="")

    # --------------------------------------------------------------------------- reading the files

    def _read(self, file: str) -> dict:
        where = f"{self.name}: {file}"
        try:
            content = json.loads(self._files.get(file, "{}"))
        except ValueError as error:
            raise unexpected(where, "JSON", error, "download it again") from None
        if not isinstance(content, dict):
            raise unexpected(where, "a JSON object", f"a {type(content).__name__}")
        return content

    def _special(self, role: str) -> str | None:
        token = self._settings.get(role)
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None and not isinstance(token, str):
            raise unexpected(f"{self.name}: {role}", "a token as text", repr(token))
        return token

    def _id(self, role: str) -> int | None:
        if (token := self.special.get(role)) is None:
            return None
        if (number := self._tok.token_to_id(token)) is None:
            fix = "do the two files belong to one model?"
            raise unexpected(f"{self.name}: {role}", "a token of tokenizer.json", repr(token), fix)
        return number

    def _stop_ids(self) -> frozenset[int]:
        """What ends an answer: eos of the tokenizer and generation_config.json, else config.json."""
        stops = self._read("generation_config.json").get("eos_token_id")
        stops = self._read("config.json").get("eos_token_id") if stops is None else stops
        stops = stops if isinstance(stops, list) else [] if stops is None else [stops]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in stops):
            expected = "a token id or a list of them"
            raise unexpected(f"{self.name}: eos_token_id", expected, repr(stops))
        return frozenset({*stops, self.eos_token_id} - {None})

    # -------------------------------------------------------------------------------- text and ids

    @property
    def digest(self) -> str:
        """A checksum of the tokenizer's files: two with the same give the same tokens."""
        return hashlib.sha256(json.dumps(self._files, sort_keys=True).encode()).hexdigest()

    def encode(self, text: str, begin: bool = True) -> list[int]:
        """Token ids of a text and of special tokens in it; one bos before it, if the model has one.

        Without `begin` the text continues another one, and no bos is added.
        """
        ids, bos = self._tok.encode(text, add_special_tokens=False).ids, self.bos_token_id
        adds = begin and self._adds_bos and bos is not None and ids[:1] != [bos]
        return [bos, *ids] if adds else ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids, without special tokens such as bos; `<think>` stays."""
        return self._tok.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def stream(self) -> "Stream":
        """A decoder for tokens that arrive one by one."""
        return Stream(self._tok)

    # -------------------------------------------------------------------------------------- a chat

    @functools.cached_property
    def _template(self) -> jinja2.Template:
        source = self._files.get("chat_template.jinja", self._settings.get("chat_template"))
        if isinstance(source, list):  # several, by name
            entries = [entry for entry in source if isinstance(entry, dict)]
            source = {e.get("name"): e.get("template") for e in entries}.get("default")
        if not isinstance(source, str):
            how = "this is a base model; give it text"
            raise unexpected(self.name, "a chat template", "none", how)
        try:
            return _environment().from_string(source)
        except jinja2.TemplateError as error:
            where = f"{self.name}: chat template"
            raise unexpected(where, "Jinja", first_line(error)) from error

    def chat(self, messages: Sequence[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The messages as the one text that the model was trained on.

        `add_generation_prompt` opens the answer, for R1 with `<think>` and a line break. Raises
        CourseError for messages that are no {"role": ..., "content": ...} or the template refuses.
        """
        if isinstance(messages, dict | str) or not messages:
            raise unexpected("messages", "a list of {role, content}", f"{messages!r:.60}")
        for i, message in enumerate(messages):
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise unexpected(f"message {i}", "{role, content}", f"{message!r:.60}")
            content = message.get("content")
            if not isinstance(content, str) and not message.get("tool_calls"):
                where = f"message {i} ({message['role']})"
                raise unexpected(where, "its content as text", type(content).__name__)
        template = self._template
        given = {"messages": messages, "add_generation_prompt": add_generation_prompt}
        try:
            return template.render(**given, tools=None, documents=None, **self.special)
        except Exception as error:  # a template is a program: it can fail in any way
            raise CourseError(f"{self.name}: chat template: {first_line(error)}") from error

    def training_text(self, messages: Sequence[dict[str, str]]) -> str:
        """The messages as text to train on: like `chat`, with all reasoning, and eos at the end.

        An answer with `</think>` is rendered as a mark, which the whole answer then replaces: begin
        it with `<think>` and a line break, as the generation prompt does. Raises as `chat` does.
        """
        self.chat(messages, add_generation_prompt=False)  # errors are about the messages as given
        answers, marked = {}, []
        for i, message in enumerate(messages):
            if message["role"] == "assistant" and "</think>" in (message.get("content") or ""):
                mark = f"\N{OBJECT REPLACEMENT CHARACTER}{i}\N{OBJECT REPLACEMENT CHARACTER}"
                answers[mark] = message["content"]
                message = {**message, "content": mark}
            marked.append(message)
        text = self.chat(marked, add_generation_prompt=False)
        for mark, answer in answers.items():
            if text.count(mark) != 1:
                where = f"{self.name}: chat template"
                raise unexpected(where, "each answer once", f"one {text.count(mark)} times")
            text = text.replace(mark, answer)
        if messages[-1]["role"] != "assistant":
            return text
        eos = self.special.get("eos_token", "")
        last = (messages[-1].get("content") or "").strip()
        return text if eos in text[text.rindex(last) + len(last) :] else text + eos


class Stream:
    """Text of tokens that come one by one, in whole characters: one may take several tokens.

    All that `push` and `flush` return, joined, equals `decode` of all tokens.
    """

    def __init__(self, tok: tokenizers.Tokenizer):
        self._tok, self._stream = tok, DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._sent = 0  # characters given out

    def push(self, ids: int | Iterable[int]) -> str:
        """The text that is certain after one more token, or several; may be empty."""
        text = ""
        for i in ids if isinstance(ids, Iterable) else [ids]:
            self._ids.append(int(i))
            try:
                text += self._stream.step(self._tok, int(i)) or ""
            except Exception:  # some decoders change earlier text where bytes are no UTF-8
                self._stream = DecodeStream(skip_special_tokens=True)
        self._sent += len(text)
        return text

    def flush(self) -> str:
        """What was held back, at the end."""
        rest = self._tok.decode(self._ids, skip_special_tokens=True)[self._sent :]
        self._sent += len(rest)
        return rest
