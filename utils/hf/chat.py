"""A model's own tokenizer and chat template, out of the files that lie beside its weights.

Hugging Face keeps them as `tokenizer.json` (vocabulary, merges, special tokens; the `tokenizers` library reads it) and
`tokenizer_config.json` (which token begins and ends a text, and the chat template). A chat template is a Jinja program
that writes a list of messages as the one text on which the model was trained. It comes with the download, so it runs in
Jinja's sandbox, as in transformers; where there is a `chat_template.jinja` beside the other files, that is the one.

Three traps, all of them in DeepSeek-R1-Distill, and what is done here:

- the template writes the bos token, and the tokenizer adds one: `encode` gives a text one bos, never two;
- `config.json` and the tokenizer disagree on which token bos is: the tokenizer's is used;
- the template deletes the reasoning of earlier answers. Right for a conversation, wrong for training: the reasoning
  would be gone. `training_text` keeps it.
"""

import datetime
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import jinja2
import tokenizers
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from utils import CourseError

FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")
HALF = "\N{REPLACEMENT CHARACTER}"  # what decoding writes for bytes that are not, or not yet, a character


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja with the settings and helpers that templates on the hub are written for (those of transformers)."""
    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    jinja.filters["tojson"] = lambda value, **how: json.dumps(value, ensure_ascii=False, **how)
    jinja.globals["raise_exception"] = _raise
    jinja.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return jinja


class Tokenizer:
    """Text to token ids and back, and messages to text. `files` are the texts of the files, by name."""

    def __init__(self, files: dict[str, str], name: str):
        self.name = name
        self._files = files
        self._settings = self._read("tokenizer_config.json")
        if "tokenizer.json" not in files:
            raise CourseError(
                f"{name}: expected a tokenizer.json, found none: download the model's tokenizer files too"
            )
        try:
            self._tok = tokenizers.Tokenizer.from_str(files["tokenizer.json"])
        except Exception as error:  # tokenizers raises plain exceptions
            said = str(error).splitlines()[0]
            raise CourseError(f"{name}: tokenizer.json: expected a tokenizer, found a damaged file ({said})") from error
        self._tok.no_padding()
        self._tok.no_truncation()
        self.special = {role: token for role in ROLES if (token := self._special(role)) is not None}
        self.n_vocab = max(self._tok.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if self.n_vocab == 0:
            raise CourseError(f"{name}: tokenizer.json: expected a vocabulary, found an empty one")
        self.bos_token_id, self.eos_token_id = (self._id(role) for role in ("bos_token", "eos_token"))
        self._adds_bos = self._settings.get("add_bos_token")
        if self._adds_bos is None:  # then tokenizer.json says whether a text begins with bos
            self._adds_bos = self.bos_token_id is not None and self._tok.encode("").ids[:1] == [self.bos_token_id]
        self.stop_ids = self._stop_ids()
        self._template: jinja2.Template | None = None

    @classmethod
    def from_folder(cls, path: str | Path) -> "Tokenizer":
        """From a model's folder. Raises CourseError for files that are missing, damaged or contradict each other."""
        files = {}
        for name in (*FILES, "config.json"):
            if (Path(path) / name).is_file():
                try:
                    files[name] = (Path(path) / name).read_text(encoding="utf-8")
                except UnicodeDecodeError as error:
                    raise CourseError(
                        f"{Path(path) / name}: expected UTF-8, found {error.reason}: download it again"
                    ) from None
        return cls(files, str(path))

    def save(self, directory: str | Path) -> None:
        """Write the tokenizer's files, unchanged, for a model that is saved beside them."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        for name in FILES:
            if name in self._files:
                (Path(directory) / name).write_text(self._files[name], encoding="utf-8", newline="")

    # --------------------------------------------------------------------------------------------- reading the files

    def _read(self, file: str) -> dict:
        try:
            found = json.loads(self._files.get(file, "{}"))
        except ValueError as error:
            raise CourseError(f"{self.name}: {file}: expected JSON, found {error}: download it again") from None
        if not isinstance(found, dict):
            raise CourseError(f"{self.name}: {file}: expected a JSON object, found a {type(found).__name__}")
        return found

    def _special(self, role: str) -> str | None:
        token = self._settings.get(role)
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None and not isinstance(token, str):
            raise CourseError(f"{self.name}: {role}: expected a token as text, found {token!r}")
        return token

    def _id(self, role: str) -> int | None:
        if role not in self.special:
            return None
        number = self._tok.token_to_id(self.special[role])
        if number is None:
            raise CourseError(
                f"{self.name}: {role}: expected a token of tokenizer.json, found {self.special[role]!r}:"
                " do the two files belong to one model?"
            )
        return number

    def _stop_ids(self) -> frozenset[int]:
        """What ends an answer: eos of generation_config.json, else of config.json, and the tokenizer's own."""
        stops = self._read("generation_config.json").get("eos_token_id")
        stops = self._read("config.json").get("eos_token_id") if stops is None else stops
        stops = [] if stops is None else stops if isinstance(stops, list) else [stops]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in stops):
            raise CourseError(f"{self.name}: eos_token_id: expected a token id or a list of them, found {stops!r}")
        return frozenset(stops) | frozenset([] if self.eos_token_id is None else [self.eos_token_id])

    # -------------------------------------------------------------------------------------------------- text and ids

    @property
    def digest(self) -> str:
        """A checksum of the tokenizer's files: two with the same give the same tokens."""
        return hashlib.sha256(json.dumps(self._files, sort_keys=True).encode()).hexdigest()

    def encode(self, text: str, begin: bool = True) -> list[int]:
        """Token ids of a text: special tokens in it are recognised; begins with bos, once, if the model's texts do.

        Not `begin`: the text goes on from another one, and no bos is added.
        """
        ids = self._tok.encode(text, add_special_tokens=False).ids
        if begin and self._adds_bos and self.bos_token_id is not None and ids[:1] != [self.bos_token_id]:
            ids = [self.bos_token_id, *ids]
        return ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids, without special tokens such as bos and eos. `<think>` is not special, and stays."""
        return self._tok.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def stream(self) -> "Stream":
        """A decoder for tokens that arrive one by one."""
        return Stream(self)

    # -------------------------------------------------------------------------------------------------------- a chat

    def _chat_template(self) -> jinja2.Template:
        if self._template is None:
            source = self._files.get("chat_template.jinja", self._settings.get("chat_template"))
            if isinstance(source, list):  # several, by name
                named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
                source = named.get("default")
            if not isinstance(source, str):
                raise CourseError(
                    f"{self.name}: expected a chat template, found none: this is a base model; give it text, not messages"
                )
            try:
                self._template = _environment().from_string(source)
            except jinja2.TemplateError as error:
                raise CourseError(f"{self.name}: chat template: expected Jinja, found {_first_line(error)}") from error
        return self._template

    def chat(self, messages: Sequence[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The messages as the one text the model was trained on; `add_generation_prompt` opens the answer.

        For R1 that opening ends in `<think>` and a line break. Raises CourseError for messages that are not
        {"role": ..., "content": ...} and for those that the template refuses.
        """
        if isinstance(messages, dict | str) or not messages:
            raise CourseError(f"messages: expected a list of {{role, content}}, found {messages!r:.60}")
        for number, message in enumerate(messages):
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise CourseError(f"message {number}: expected {{role, content}}, found {message!r:.60}")
            if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
                raise CourseError(
                    f"message {number} ({message['role']}): expected its content as text,"
                    f" found {type(message.get('content')).__name__}"
                )
        template = self._chat_template()
        try:
            return template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self.special,
            )
        except Exception as error:  # a template is a program: it can fail in any way
            raise CourseError(f"{self.name}: chat template: {_first_line(error)}") from error

    def training_text(self, messages: Sequence[dict[str, str]]) -> str:
        """The messages as text to train on: like `chat`, but answers keep their reasoning, and the last ends in eos.

        An answer with `</think>` in it is rendered as a mark, which is then replaced by the whole answer. Begin it with
        `<think>` and a line break, as the generation prompt does. Raises CourseError as `chat` does.
        """
        self.chat(messages, add_generation_prompt=False)  # so that errors are about the messages as they were given
        answers, marked = {}, []
        for number, message in enumerate(messages):
            if message["role"] == "assistant" and "</think>" in (message.get("content") or ""):
                mark = f"\N{OBJECT REPLACEMENT CHARACTER}{number}\N{OBJECT REPLACEMENT CHARACTER}"
                answers[mark] = message["content"]
                message = {**message, "content": mark}
            marked.append(message)
        text = self.chat(marked, add_generation_prompt=False)
        for mark, answer in answers.items():
            if text.count(mark) != 1:
                raise CourseError(
                    f"{self.name}: chat template: expected each answer once, found one {text.count(mark)} times"
                )
            text = text.replace(mark, answer)
        eos = self.special.get("eos_token", "")
        last = (messages[-1].get("content") or "").strip()
        if messages[-1]["role"] == "assistant" and eos not in text[text.rindex(last) + len(last) :]:
            text += eos
        return text


class Stream:
    """Text of tokens that come one by one. A character may take several tokens: only whole ones are given out.

    All that `push` and `flush` return, joined, equals `decode` of all tokens.
    """

    def __init__(self, tok: Tokenizer, keep: int = 8):
        self._tok, self._keep = tok, keep
        self._ids: list[int] = []
        self._sent = 0  # characters of the text of `_ids` that were given out

    def push(self, ids: int | Iterable[int]) -> str:
        """The text that is certain after one more token, or several; may be empty."""
        self._ids += [int(i) for i in ids] if isinstance(ids, Iterable) else [int(ids)]
        text = self._tok.decode(self._ids)
        new = text.rstrip(HALF)[self._sent :]
        self._sent += len(new)
        # Forget the beginning, or each token would cost more than the last; but only where the text has no open end,
        # and keep a few tokens, as some tokenizers drop the space at the start of a text.
        if len(self._ids) > 4 * self._keep and self._sent == len(text):
            recent = self._tok.decode(self._ids[-self._keep :])
            if recent and text.endswith(recent):
                self._ids, self._sent = self._ids[-self._keep :], len(recent)
        return new

    def flush(self) -> str:
        """What was held back, at the end."""
        rest = self._tok.decode(self._ids)[self._sent :]
        self._sent += len(rest)
        return rest


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
