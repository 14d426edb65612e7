"""`python -m utils`: results on standard output, and for bad input status 2 and exactly one line."""

import ast
import dataclasses
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import checkpoints
from tests.helpers.checkpoints import folder_of
from tests.helpers.folders import ROOT
from utils import generate, lora
from utils.__main__ import main
from utils.commands import options
from utils.commands.arguments import COMMANDS, parse
from utils.hf import chat, weights

MODEL = str(folder_of("qwen2-untied"))
PROMPTS = checkpoints.texts("qwen2-untied")["prompts"]
GREEDY = checkpoints.texts("qwen2-untied")["greedy"]


def words(*args: str, model: str = MODEL, prompt: str = PROMPTS[0]) -> list[str]:
    return [
        "generate",
        "--model",
        model,
        "--prompt",
        prompt,
        "--temperature",
        "0",
        "--max-new-tokens",
        "12",
        *args,
    ]


def good(capsys, args: list[str]) -> str:
    status = main(args)
    out, err = capsys.readouterr()
    assert status == 0, err
    return out


# ------------------------------------------------------------------------------------------ good runs


@pytest.mark.parametrize("which", [0, 1])
def test_the_greedy_text_is_that_of_transformers(capsys, which):
    assert good(capsys, words(prompt=PROMPTS[which])) == GREEDY[which] + "\n"


def test_a_tokenizer_that_adds_its_first_token(capsys):
    texts = checkpoints.texts("llama-tied")
    out = good(capsys, words(model=str(folder_of("llama-tied")), prompt=texts["prompts"][0]))
    assert out == texts["greedy"][0] + "\n"


def test_streamed_text_is_the_same_text(capsys):
    assert good(capsys, words("--stream")) == GREEDY[0] + "\n"


def test_several_prompts_as_json(capsys):
    rows = json.loads(good(capsys, words("--prompt", PROMPTS[1], "--json")))
    assert [(row["prompt"], row["text"]) for row in rows] == list(zip(PROMPTS, GREEDY))
    assert {row["finish_reason"] for row in rows} <= {"stop", "length"}


def test_an_adapter_is_used(capsys):
    text = good(capsys, words("--adapter", str(folder_of("peft-adapter"))))
    tok = chat.Tokenizer.from_folder(MODEL)
    assert text == tok.decode(checkpoints.reference("peft-adapter")["greedy"][0]) + "\n"
    assert text != GREEDY[0] + "\n"


def test_chat_uses_the_template(capsys):
    turns = "<|start|>user\nHi!<|end|>\n<|start|>assistant\n"
    assert good(capsys, words("--chat", prompt="Hi!")) == good(capsys, words(prompt=turns))
    system = good(capsys, words("--chat", "--system", "Be kind.", prompt="Hi!"))
    assert system == good(capsys, words(prompt="<|start|>system\nBe kind.<|end|>\n" + turns))


def test_a_seed_reproduces(capsys):
    def run(seed):
        return good(capsys, words("--temperature", "1.5", "--seed", seed))

    assert run("3") == run("3")
    assert len({run(seed) for seed in "3456"}) > 1


def test_padded_rows_of_the_vocabulary_are_never_sampled():
    """In this fixture they are the likeliest at most positions; one of them has no text."""
    model, tok = weights.load(folder_of("qwen2-untied")), chat.Tokenizer.from_folder(MODEL)
    completions = generate.generate(model, tok, PROMPTS * 4, 40, temperature=3.0, seed=1)
    ids = [i for completion in completions for i in completion.ids]
    assert len(ids) > 50 and max(ids) < tok.n_vocab == 150


# ------------------------------------------------------------------------------------------ bad input


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
        (folder / name).write_bytes((folder_of("qwen2-untied") / name).read_bytes())


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
    "no new tokens": (["--max-new-tokens", "0"], "max_new_tokens"),
    "more tokens than the context holds": (["--max-new-tokens", "1000"], "128"),
    "a prompt that does not fit": (["--prompt", "word " * 300], "context"),
    "an empty prompt": (["--prompt", ""], "prompt"),
    "an absent adapter": (["--adapter", "nowhere/adapter"], "nowhere/adapter"),
    "an unknown flag": (
        ["--temprature", "1"],
        "--temprature: no such argument, perhaps --temperature",
    ),
    "a word too many": (["stray"], "stray: no such argument"),
    "a flag without its value": (["--seed"], "--seed: expected a value"),
    "an unknown dtype": (["--dtype", "int8"], "dtype"),
    "a system message without chat": (["--system", "Be kind."], "--chat"),
    "streaming two prompts": (["--stream", "--prompt", "b"], "stream: expected one prompt"),
    "streaming JSON": (["--stream", "--json"], "stream: expected one prompt and no --json"),
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
        bad_folder(
            "qwen2-untied", lambda folder: checkpoints.edit_config(folder, model_type="mamba")
        ),
        "mamba",
    ),
    "a truncated file": (
        bad_folder(
            "qwen2-untied", lambda folder: os.truncate(folder / "model.safetensors", 100_000)
        ),
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
        bad_folder(
            "qwen2-tied-sharded", lambda folder: next(iter(sorted(folder.glob("model-*")))).unlink()
        ),
        "model-00001",
    ),
    "an adapter instead of a model": (
        lambda tmp_path: str(folder_of("peft-adapter")),
        "config.json",
    ),
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
    args = words("--adapter", str(folder_of("peft-adapter")), model=str(folder_of("llama-tied")))
    refused(capsys, args, "another base")


def test_chat_with_a_model_that_has_no_template(capsys, tmp_path):
    folder = checkpoints.copy("qwen2-untied", tmp_path / "model")
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["chat_template"]
    path.write_text(json.dumps(settings))
    refused(capsys, words("--chat", model=str(folder)), "chat template")


@pytest.mark.parametrize(
    "args, word",
    [
        ([], "command: expected one of generate, finetune, evaluate, plan, mirror, found none"),
        (["sing"], "found sing"),
        (["--json"], "found --json"),
        (["generate"], "--model: expected, and not given"),
        (["generate", "--modle", "m"], "--modle: no such argument, perhaps --model"),
        (["generate", "--model", "m"], "prompt: expected at least one text"),
        (["plan", "--model", "m", "--topology", "v5e-8", "--tp", "0"], "tp: expected at least 1"),
    ],
)
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
    assert (done.returncode, done.stdout) == (2, "") and len(done.stderr.splitlines()) == 1, (
        done.stderr
    )
    assert "temperature: expected 0 (greedy) or more, found -1" in done.stderr


# ------------------------------------------------------------------------------------------- options

IMPORTED = """
import sys
from utils.__main__ import main
try:
    status = main(sys.argv[1:])
except SystemExit as stop:
    status = stop.code or 0
heavy = {"jax", "jaxlib", "flax", "numpy", "grain", "tokenizers"} & set(sys.modules)
print("status", status, "heavy", sorted(heavy), file=sys.stderr)
"""


@pytest.mark.parametrize(
    "args, status",
    [
        (["--help"], 0),
        (["finetune", "--help"], 0),
        (["generate", "--modle", "m", "--prompt", "p"], 2),
        (["finetune", "--model", "m", "--data", "d", "--output", "o", "--rank", "0"], 2),
        ([], 2),
    ],
)
def test_help_and_a_wrong_flag_need_neither_jax_nor_numpy(args, status):
    command = [sys.executable, "-c", IMPORTED, *args]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stderr.splitlines()[-1] == f"status {status} heavy []", done.stderr


def test_every_field_has_a_comment_and_help_shows_it(capsys):
    source = (ROOT / "utils" / "commands" / "options.py").read_text()
    lines, without = source.splitlines(), []
    for node in ast.parse(source).body:
        for f in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(f, ast.AnnAssign) and f.target.id != "sampling":
                line, above = lines[f.lineno - 1], lines[f.lineno - 2].strip()
                if "  # " not in line and not above.startswith("# "):
                    without.append(f"{node.name}.{f.target.id}")
    assert without == []
    with pytest.raises(SystemExit):
        main(["finetune", "--help"])
    text = " ".join(capsys.readouterr().out.replace("\u2502", " ").split())
    assert "--rank INT of the adapter's matrices" in text and "--seed INT of the adapter's" in text


def test_sampling_flags_are_those_of_generate():
    flags = {field.name: field.default for field in dataclasses.fields(options.Sampling)}
    assert flags == {field.name: field.default for field in dataclasses.fields(generate.Options)}


def test_options_repeat_what_is_defined_beside_jax():
    assert options.ALL_LINEAR == lora.ALL_LINEAR
    assert set(options.FREE) < {field.name for field in dataclasses.fields(options.Finetune)}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_module_with_run(name):
    room = (
        "course" if name == "mirror" else "commands"
    )  # what the course downloads is its own affair
    tree = ast.parse((ROOT / "utils" / room / f"{name}.py").read_text())
    assert "run" in {getattr(node, "name", "") for node in tree.body}


def test_flags_become_options():
    args = "--model m --data d --output o --no-packing --target-modules q_proj v_proj --rank 4"
    name, chosen = parse(["finetune", *args.split(), "--gradient-checkpointing", "--alpha", "8"])
    assert name == "finetune" and chosen == options.Finetune(
        model="m", data="d", output="o", packing=False, target_modules=("q_proj", "v_proj"), rank=4,
        gradient_checkpointing=True, alpha=8.0,
    )  # fmt: skip
    _, chosen = parse(
        ["evaluate", "--model", "m", "--data", "d", "--top-p", "0.9", "--stop", "A", "B"]
    )
    assert chosen.sampling == options.Sampling(temperature=0.0, top_p=0.9, stop=("A", "B"))


def test_no_library_function_prints():
    """Libraries log; the commands and the course package show the log."""
    rooms = {ROOT / "utils" / room for room in ("commands", "course")}
    printing = []
    for path in sorted((ROOT / "utils").rglob("*.py")):
        if rooms & set(path.parents) or path.name == "__main__.py":
            continue
        module = ast.parse(path.read_text("utf-8"))
        # A file that is run as a process answers on its standard output.
        as_process = [
            n for n in module.body if isinstance(n, ast.If) and "__main__" in ast.unparse(n.test)
        ]
        answering = {id(inner) for node in as_process for inner in ast.walk(node)}
        for node in ast.walk(module):
            prints = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
            if prints and id(node) not in answering:
                printing.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert printing == []
