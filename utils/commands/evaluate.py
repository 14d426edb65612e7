"""`python -m utils evaluate`: how many problems a model answers right, and what an adapter changes."""

from utils import generate
from utils.commands.options import Evaluate
from utils.data import problems
from utils.evaluation import exact_match
from utils.hf import hub, peft, weights


def run(options: Evaluate) -> exact_match.ExactMatch | exact_match.Paired:
    """The model's answers; with an adapter, the base's and the adapter's to the same problems."""
    generation = vars(options.sampling)
    generate.Options(**generation)  # what is wrong is said before a model is loaded
    if options.adapter is not None:
        peft.read(options.adapter)
    problem_set = problems.load(options.data, options.split, options.limit, options.template)
    path = hub.model(options.model)
    tok, model = hub.tokenizer(path), weights.load(path, dtype=options.dtype)
    for name in ("max_new_tokens", "batch_size", "chat"):
        generation = generation | {name: getattr(options, name)}
    if options.adapter is None:
        result = exact_match.evaluate(model, tok, problem_set, **generation)
    else:
        peft.load(model, options.adapter)
        result = exact_match.compare(model, tok, problem_set, **generation)
    if options.save is not None:
        exact_match.save(options.save, problem_set, result)
    return result
