"""Answers to problems: asked as in training, in any batch, judged alike; base against adapter; the command line."""

import json

import numpy as np
import pytest

from tests.helpers import checkpoints
from tests.helpers.checkpoints import folder_of
from utils import CourseError, generate, lora
from utils.__main__ import main
from utils.data.problems import Problem
from utils.evaluation import exact_match
from utils.hf import chat, peft

MODEL = str(folder_of("qwen2-untied"))


@pytest.fixture(scope="module")
def tok():
    return chat.Tokenizer.from_folder(MODEL)


def problem(asked: str, answer: str | None = "5") -> Problem:
    return Problem([{"role": "user", "content": asked}], "...", answer, "test")


TEXTS = ("2+3?", "How many are three and two, say?", "Five", "Hi! Ho! He!", "One more than 4")
ASKED = [problem(text) for text in TEXTS]


def adapted():
    return peft.load(checkpoints.model("qwen2-untied"), folder_of("peft-adapter"))


def run(model, tok, problems=ASKED, **options):
    return exact_match.evaluate(
        model, tok, problems, progress=False, **({"max_new_tokens": 8, "chat": False} | options)
    )


@pytest.fixture
def saying(monkeypatch):
    """Let the model answer each prompt with what a function makes of it; returns the sizes of the batches."""
    sizes = []

    def replace(answer):
        def made(model, tok, prompts, max_new_tokens=None, **options):
            sizes.append(len(prompts))
            return [generate.Completion(answer(prompt), [], "stop") for prompt in prompts]

        monkeypatch.setattr(generate, "generate", made)
        return sizes

    return replace


# ------------------------------------------------------------------------------------------------------------ one model


def asked(chat_template: bool, tok) -> list[str]:
    """The prompts as they are to be put, the longest first."""
    made = [tok.chat(p.messages) if chat_template else p.messages[-1]["content"] for p in ASKED]
    return sorted(made, key=len, reverse=True)


def test_what_the_model_says_is_what_generate_says(tok):
    model, prompts = checkpoints.model("qwen2-untied"), asked(False, tok)
    completions = dict(zip(prompts, generate.generate(model, tok, prompts, 8, temperature=0)))
    assert len({completion.text for completion in completions.values()}) > 1
    for one in (model, generate.prepare(model)):
        result = run(one, tok)
        assert result.completions == [completions[text] for text in TEXTS]
        assert result.texts == [completion.text for completion in result.completions]


@pytest.mark.parametrize("chat_template", [True, False])
@pytest.mark.parametrize(
    "size, batches", [(1, [1] * 5), (2, [2, 2, 2]), (4, [3, 3]), (5, [5]), (99, [5])]
)
def test_what_is_asked_in_which_batches(tok, saying, chat_template, size, batches):
    prompts = []
    sizes = saying(lambda prompt: prompts.append(prompt) or prompt)
    result = run(checkpoints.model("qwen2-untied"), tok, batch_size=size, chat=chat_template)
    assert sizes == batches
    assert prompts == asked(chat_template, tok) + [asked(chat_template, tok)[-1]] * (
        sum(batches) - 5
    )
    assert result.texts == [next(p for p in prompts if text in p) for text in TEXTS]


def test_sampling_is_reproducible(tok):
    model = checkpoints.model("qwen2-untied")
    made = [run(model, tok, temperature=2.0, seed=seed).texts for seed in (0, 0, 1)]
    assert made[0] == made[1] != made[2]


def test_each_answer_is_judged_with_its_own_problem(tok, saying):
    sizes = saying(
        lambda prompt: f"So \\boxed{{{prompt.count('x')}}}" if prompt.count("x") % 2 else "it is 4"
    )
    problems = [problem("x" * n, str(n)) for n in (1, 4, 7, 2, 3)]
    result = run(checkpoints.model("qwen2-untied"), tok, problems, batch_size=4)
    assert result.correct.tolist() == [True, True, True, False, True]
    assert result.formatted.tolist() == [True, False, True, False, True]
    assert result.answers == ["1", "4", "7", "4", "3"] and result.references == [
        "1",
        "4",
        "7",
        "2",
        "3",
    ]
    assert sizes == [3, 3]  # two batches of one size rather than 4 and 1
    found = result.summary()
    assert (found["problems"], found["exact_match"], found["format_rate"]) == (5, 0.8, 0.6)
    assert found["exact_match_interval"][0] < 0.8 < found["exact_match_interval"][1]


def test_equivalent_answers_count(tok, saying):
    saying(lambda prompt: r"\boxed{\frac{2}{4}}")
    assert run(
        checkpoints.model("qwen2-untied"),
        tok,
        [problem("a", "0.5"), problem("b", r"\frac12"), problem("c", "2")],
    ).correct.tolist() == [
        True,
        True,
        False,
    ]


def test_progress_is_shown(tok, saying, capsys):
    saying(lambda prompt: "5")
    exact_match.evaluate(checkpoints.model("qwen2-untied"), tok, ASKED)
    assert "5/5" in capsys.readouterr().err


@pytest.mark.parametrize(
    "problems, options, said",
    [
        ([], {}, "problems: expected at least one"),
        ([*ASKED, problem("a", None)], {}, "problem 6 .test.: expected an answer"),
        (ASKED, {"batch_size": 0}, "batch_size: expected at least 1"),
        (ASKED, {"max_new_tokens": 0}, "max_new_tokens: expected 1"),
        (ASKED, {"temperature": -1}, "temperature: expected 0"),
        ([*ASKED, problem("word " * 100)], {"batch_size": 1}, "context is 128"),
    ],
)
def test_what_is_refused(tok, problems, options, said, monkeypatch):
    model, chunks = checkpoints.model("qwen2-untied"), []
    monkeypatch.setattr(generate, "_decode", lambda *args, **kw: chunks.append(1))
    with pytest.raises(CourseError, match=said) as error:
        run(model, tok, problems, **options)
    assert "\n" not in str(error.value) and not chunks  # said before anything was answered


# ---------------------------------------------------------------------------------------------------- base and adapter


def test_base_and_adapter_on_the_same_problems(tok):
    model = adapted()
    both = exact_match.compare(model, tok, ASKED, max_new_tokens=8, chat=False, progress=False)
    assert both.base.texts == run(checkpoints.model("qwen2-untied"), tok).texts
    assert both.adapter.texts == run(adapted(), tok).texts != both.base.texts
    assert run(model, tok).texts == both.adapter.texts  # switched on again


def outcome(
    correct: str, formatted: str | None = None, reference: str = "5"
) -> exact_match.ExactMatch:
    right, form = (np.array([c == "1" for c in text]) for text in (correct, formatted or correct))
    n, empty = len(correct), generate.Completion("", [], "stop")
    return exact_match.ExactMatch([empty] * n, [None] * n, [reference] * n, right, form)


def test_the_difference():
    found = exact_match.paired(
        outcome("1100" * 25, "0" * 100), outcome("1011" * 25, "1" * 100)
    ).summary()
    assert found["exact_match"] == 0.25 and found["format_rate"] == 1.0
    assert (found["gained"], found["lost"]) == (50, 25)
    low, high = found["exact_match_interval"]
    assert 0 < low < 0.25 < high < 0.5 and found["format_rate_interval"][0] > 0.9
    assert found["base"]["exact_match"] == 0.5 and found["adapter"]["exact_match"] == 0.75


@pytest.mark.parametrize("other", [outcome("11"), outcome("110", reference="6")])
def test_answers_to_different_problems_are_not_compared(other):
    with pytest.raises(CourseError, match="paired: expected answers to the same problems"):
        exact_match.paired(outcome("101"), other)


def test_a_model_without_an_adapter_and_one_merged(tok):
    with pytest.raises(CourseError, match="has no adapter"):
        exact_match.compare(checkpoints.model("qwen2-untied"), tok, ASKED)
    with pytest.raises(CourseError, match="merged"):
        exact_match.compare(lora.merge(adapted()), tok, ASKED)


# ---------------------------------------------------------------------------------------------------- the command line


@pytest.fixture
def data(tmp_path) -> str:
    path = tmp_path / "own.jsonl"
    rows = [{"prompt": p.messages[0]["content"], "response": "...", "answer": "5"} for p in ASKED]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def words(data: str, *more: str, model: str = MODEL) -> list[str]:
    return ["evaluate", "--model", model, "--data", data, "--max-new-tokens", "8", *more]


def good(capsys, args: list[str]) -> str:
    status = main(args)
    out, err = capsys.readouterr()
    assert status == 0, err
    return out


def test_one_model_as_json(capsys, data, tok):
    found = json.loads(good(capsys, words(data, "--limit", "4", "--json")))
    assert found == json.loads(
        json.dumps(run(checkpoints.model("qwen2-untied"), tok, ASKED[:4], chat=True).summary())
    )
    assert found["problems"] == 4


def test_base_against_adapter_as_json_with_all_answers(capsys, data, tok, tmp_path):
    adapter = str(folder_of("peft-adapter"))
    saved = tmp_path / "answers.jsonl"
    found = json.loads(
        good(capsys, words(data, "--adapter", adapter, "--json", "--save", str(saved)))
    )
    both = exact_match.compare(adapted(), tok, ASKED, max_new_tokens=8, progress=False)
    assert found == json.loads(json.dumps(both.summary()))
    rows = [json.loads(line) for line in saved.read_text().splitlines()]
    assert [row["base"]["text"] for row in rows] == both.base.texts
    assert [row["adapter"]["text"] for row in rows] == both.adapter.texts
    assert rows[0]["messages"] == ASKED[0].messages and rows[0]["answer"] == "5"
    assert set(rows[0]["base"]) == {"text", "finish_reason", "answer", "correct", "formatted"}
    assert [row["adapter"]["finish_reason"] for row in rows] == [
        c.finish_reason for c in both.adapter.completions
    ]


def test_a_table_for_people(capsys, data):
    table = good(capsys, words(data, "--adapter", str(folder_of("peft-adapter")))).splitlines()
    assert (
        table[0].startswith("5 problems")
        and "exact match" in table[0]
        and "95% interval" in table[0]
    )
    assert [line.split()[0] for line in table[1:]] == ["base", "adapter", "difference", "The"]
    assert "+0.0%" in table[3] and "0.0% to" in table[1]
    alone = good(capsys, words(data)).splitlines()
    assert len(alone) == 2


def test_a_template_and_plain_text(capsys, data, tok):
    text = good(capsys, words(data, "--no-chat", "--template", "Q: {problem}", "--json"))
    put = [problem("Q: " + p.messages[0]["content"]) for p in ASKED]
    result = run(checkpoints.model("qwen2-untied"), tok, put, chat=False)
    assert json.loads(text) == json.loads(json.dumps(result.summary()))


@pytest.mark.parametrize(
    "more, said",
    [
        (["--limit", "0"], "limit"),
        (["--split", "valid"], "split"),
        (["--batch-size", "0"], "batch"),
        (["--max-new-tokens", "0"], "max_new_tokens"),
        (["--max-new-tokens", "many"], "max-new-tokens"),
        (["--adapter", "nowhere"], "nowhere"),
        (["--data", "gsm9k"], "gsm9k"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--template", "no hole"], "{problem}"),
        (["--temperature", "-1"], "temperature"),
        (["--model", "nowhere/at/all"], "nowhere"),
        (["--save", "nowhere/at/all/answers.jsonl"], "nowhere"),
        (["--dtype", "int4"], "dtype"),
        (["--colour"], "colour"),
    ],
)
def test_bad_input_is_one_line(capsys, data, more, said):
    status = main(words(data, *more))
    out, err = capsys.readouterr()
    lines = err.strip().splitlines()
    assert (status, out) == (2, "") and said in lines[-1] and "Traceback" not in err, err
    assert lines[-1].startswith("python -m utils: ") and len(lines[-1]) < 500
    assert lines[:-1] in ([], [f"5 test problems of {data}: own file"]), (
        err
    )  # the words may be good and the folder bad


def test_problems_without_answers(capsys, tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}')
    assert main(words(str(path))) == 2
    assert "problem 1 (own.jsonl, line 1): expected an answer" in capsys.readouterr().err
