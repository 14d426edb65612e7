"""`python -m utils generate`: a model continues prompts, or answers them."""

import dataclasses

from utils import generate, lora
from utils.commands.options import Generate
from utils.hf import hub, peft, weights


@dataclasses.dataclass(frozen=True)
class Result:
    """Prompts as they were given, each with its completion."""

    prompts: tuple[str, ...]
    completions: list[generate.Completion]

    def __str__(self) -> str:
        return "\n\n".join(completion.text for completion in self.completions)

    def summary(self) -> list[dict]:
        """What --json prints."""
        return [
            {"prompt": prompt, "text": completion.text, "finish_reason": completion.finish_reason}
            for prompt, completion in zip(self.prompts, self.completions)
        ]


def run(options: Generate) -> Result | None:
    """Generate text; None where it has been printed already, with `options.stream`."""
    sampling = vars(options.sampling)
    generate.Options(**sampling)  # refuses what is wrong with them before the model is loaded
    path = hub.model(options.model)
    tok, model = hub.tokenizer(path), weights.load(path, dtype=options.dtype)
    if options.adapter is not None:
        lora.merge(peft.load(model, options.adapter))
    prompts = list(options.prompt)
    if options.chat:
        system = [] if options.system is None else [{"role": "system", "content": options.system}]
        prompts = [tok.chat([*system, {"role": "user", "content": prompt}]) for prompt in prompts]
    if options.stream:
        for text in generate.stream(model, tok, prompts[0], options.max_new_tokens, **sampling):
            print(text, end="", flush=True)
        print()
        return None
    completions = generate.generate(model, tok, prompts, options.max_new_tokens, **sampling)
    return Result(options.prompt, completions)
