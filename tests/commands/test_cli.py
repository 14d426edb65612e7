"""`python -m utils`: results on standard output, and for bad input status 2 and exactly one line."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import checkpoints
from tests.helpers.checkpoints import HOME
from utils.hf import chat
from utils.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
MODEL = str(HOME / "qwen2-untied")
PROMPTS = checkpoints.texts("qwen2-untied")["prompts"]
GREEDY = checkpoints.texts("qwen2-untied")["greedy"]


def words(*args: str, model: str = MODEL, prompt: str = PROMPTS[0]) -> list[str]:
    return ["generate", "--model", model, "--prompt", prompt, "--temperature", "0", "--max-new-tokens", "12", *args]


def good(capsys, args: list[str]) -> str:
    status = main(args)
    out, err = capsys.readouterr()
    assert status == 0, err
    return out


# ---------------------------------------------------------------------------------------------------------- good runs


@pytest.mark.parametrize("which", [0, 1])
def test_the_greedy_text_is_that_of_transformers(capsys, which):
    assert good(capsys, words(prompt=PROMPTS[which])) == GREEDY[which] + "\n"


def test_a_tokenizer_that_adds_its_first_token(capsys):
    texts = checkpoints.texts("llama-tied")
    out = good(capsys, words(model=str(HOME / "llama-tied"), prompt=texts["prompts"][0]))
    assert out == texts["greedy"][0] + "\n"


def test_streamed_text_is_the_same_text(capsys):
    assert good(capsys, words("--stream")) == GREEDY[0] + "\n"


def test_several_prompts_as_json(capsys):
    rows = json.loads(good(capsys, words("--prompt", PROMPTS[1], "--json")))
    assert rows == [{"prompt": p, "text": t} for p, t in zip(PROMPTS, GREEDY)]


def test_an_adapter_is_used(capsys):
    text = good(capsys, words("--adapter", str(HOME / "peft-adapter")))
    tok = chat.Tokenizer.from_folder(MODEL)
    assert text == tok.decode(checkpoints.reference("peft-adapter")["greedy"][0]) + "\n"
    assert text != GREEDY[0] + "\n"


def test_chat_uses_the_template(capsys):
    said = "<|start|>user\nHi!<|end|>\n<|start|>assistant\n"
    assert good(capsys, words("--chat", prompt="Hi!")) == good(capsys, words(prompt=said))
    system = good(capsys, words("--chat", "--system", "Be kind.", prompt="Hi!"))
    assert system == good(capsys, words(prompt="<|start|>system\nBe kind.<|end|>\n" + said))


def test_a_seed_reproduces(capsys):
    def run(seed):
        return good(capsys, words("--temperature", "1.5", "--seed", seed))

    assert run("3") == run("3")
    assert len({run(seed) for seed in "3456"}) > 1


def test_padded_rows_of_the_vocabulary_are_never_drawn(capsys):
    """In this fixture they are the likeliest at most places; a drawn one would decode to nothing, or fail."""
    from utils import generate
    from utils.hf import weights

    made, tok = weights.load(HOME / "qwen2-untied"), chat.Tokenizer.from_folder(MODEL)
    drawn = []
    decode = tok.stream

    def noting():
        inner = decode()
        push = inner.push
        inner.push = lambda ids: (drawn.extend(ids), push(ids))[1]
        return inner

    tok.stream = noting
    generate.generate(made, tok, PROMPTS * 4, 40, temperature=3.0, seed=1)
    assert len(drawn) > 50 and max(drawn) < tok.n_vocab == 150


# ---------------------------------------------------------------------------------------------------------- bad input


def bad_folder(name: str, damage):
    def make(tmp_path: Path) -> str:
        folder = checkpoints.copy(name, tmp_path / name)
        damage(folder)
        return str(folder)

    return make


def only_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps([1.0]))


def a_nan(tensors: dict) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * np.nan


def larger_tokenizer(folder: Path) -> None:
    """The model has 128 words, the tokenizer 150."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((HOME / "qwen2-untied" / name).read_bytes())


def a_pickle_file(tmp_path: Path) -> str:
    path = tmp_path / "model.pt"
    path.write_bytes(pickle.dumps([1.0]))
    return str(path)


def bad_gguf(tmp_path: Path) -> str:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + bytes(40))
    return str(path)


FLAGS = {
    "temperature below zero": (["--temperature", "-1"], "temperature"),
    "temperature that is no number": (["--temperature", "warm"], "temperature"),
    "temperature NaN": (["--temperature", "nan"], "temperature"),
    "top-k of zero": (["--top-k", "0"], "top_k"),
    "top-p above one": (["--top-p", "1.5"], "top_p"),
    "a penalty of zero": (["--repetition-penalty", "0"], "repetition_penalty"),
    "no new tokens": (["--max-new-tokens", "0"], "max-new-tokens"),
    "more tokens than the context holds": (["--max-new-tokens", "1000"], "128"),
    "a prompt that does not fit": (["--prompt", "word " * 300], "context"),
    "an empty prompt": (["--prompt", ""], "prompt"),
    "an absent adapter": (["--adapter", "nowhere/adapter"], "nowhere/adapter"),
    "an unknown flag": (["--temprature", "1"], "temprature"),
    "an unknown dtype": (["--dtype", "int8"], "dtype"),
    "a system message without chat": (["--system", "Be kind."], "--chat"),
    "streaming two prompts": (["--stream", "--prompt", "b"], "--stream"),
    "a seed that is no number": (["--seed", "x"], "seed"),
}
MODELS = {
    "a model that is nowhere": (lambda tmp_path: str(tmp_path / "absent"), "absent"),
    "a pickle": (a_pickle_file, "model.pt"),
    "only a pickle in the folder": (bad_folder("qwen2-untied", only_a_pickle), "pickle"),
    "a broken configuration": (
        bad_folder("qwen2-untied", lambda folder: (folder / "config.json").write_text("{")),
        "config.json",
    ),
    "an architecture we lack": (
        bad_folder("qwen2-untied", lambda folder: checkpoints.edit_config(folder, model_type="mamba")),
        "mamba",
    ),
    "a truncated file": (
        bad_folder("qwen2-untied", lambda folder: os.truncate(folder / "model.safetensors", 100_000)),
        "model.safetensors",
    ),
    "a NaN in the weights": (
        bad_folder("qwen2-untied", lambda folder: checkpoints.edit_tensors(folder, a_nan)),
        "model.norm.weight",
    ),
    "no tokenizer": (bad_folder("qwen2-fp16", lambda folder: None), "tokenizer.json"),
    "a tokenizer larger than the vocabulary": (bad_folder("qwen2-fp16", larger_tokenizer), "150"),
    "a damaged tokenizer": (
        bad_folder("qwen2-untied", lambda folder: (folder / "tokenizer.json").write_text("{}")),
        "tokenizer.json",
    ),
    "a damaged GGUF file": (bad_gguf, "m.gguf"),
    "an absent shard": (
        bad_folder("qwen2-tied-sharded", lambda folder: next(iter(sorted(folder.glob("model-*")))).unlink()),
        "model-00001",
    ),
    "an adapter instead of a model": (lambda tmp_path: str(HOME / "peft-adapter"), "config.json"),
    "a folder with nothing in it": (lambda tmp_path: str(tmp_path), "config.json"),
}


def refused(capsys, args: list[str], word: str) -> None:
    status = main(args)
    out, err = capsys.readouterr()
    lines = err.strip().splitlines()
    assert status == 2 and out == ""
    assert len(lines) == 1 and word in lines[0] and "Traceback" not in err, err
    assert len(lines[0]) < 500


@pytest.mark.parametrize("case", FLAGS)
def test_wrong_flags(case, capsys):
    flags, word = FLAGS[case]
    refused(capsys, words(*flags), word)


@pytest.mark.parametrize("case", MODELS)
def test_wrong_models(case, capsys, tmp_path):
    make, word = MODELS[case]
    refused(capsys, words(model=make(tmp_path)), word)


def test_an_adapter_for_another_base(capsys):
    args = words("--adapter", str(HOME / "peft-adapter"), model=str(HOME / "llama-tied"))
    refused(capsys, args, "another base")


def test_chat_with_a_model_that_has_no_template(capsys, tmp_path):
    folder = checkpoints.copy("qwen2-untied", tmp_path / "model")
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["chat_template"]
    path.write_text(json.dumps(settings))
    refused(capsys, words("--chat", model=str(folder)), "chat template")


@pytest.mark.parametrize("args, word", [([], "generate"), (["sing"], "sing"), (["generate"], "model")])
def test_no_command_or_half_of_one(args, word, capsys):
    refused(capsys, args, word)


def process(*args: str) -> subprocess.CompletedProcess:
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "utils", *args]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def test_as_a_process_that_succeeds():
    done = process(*words("--stream"))
    assert (done.returncode, done.stdout) == (0, GREEDY[0] + "\n"), done.stderr


def test_as_a_process_that_fails():
    done = process(*words("--temperature", "-1"))
    assert (done.returncode, done.stdout) == (2, "") and len(done.stderr.splitlines()) == 1, done.stderr
    assert "temperature: expected 0 (greedy) or more, found -1" in done.stderr
