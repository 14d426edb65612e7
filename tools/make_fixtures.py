"""Make tiny random checkpoints, with what transformers and peft compute from them.

    make install-peers
    .venv-peers/bin/python tools/make_fixtures.py [FOLDER]          # seconds

Without FOLDER, those that pages read too go to utils/course/assets/models, the others to
tests/fixtures. Each folder is a Hugging Face checkpoint as `save_pretrained` writes it, and beside it
`reference.safetensors`: tokens [2, 12], and, computed by transformers in float32, logits [2, 12,
V], every hidden state [L+1, 2, 12, D] and the next 12 greedy tokens. So the course's port is
compared with the original where torch is not installed. Weights are larger than usual at random
initialisation: logits then differ by whole numbers, and a wrong port shows.

A seed is skipped when one of its greedy choices is nearly a tie, since another machine might choose
otherwise, when its continuation repeats itself, or when it ends early.
"""

import copy
import json
import platform
import shutil
import sys
from pathlib import Path

import peft
import safetensors
import tokenizers
import torch
import transformers
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
FIXTURES, MODELS = ROOT / "tests" / "fixtures", ROOT / "utils" / "course" / "assets" / "models"
FOR_TESTS = ("qwen2-fp16", "peft-adapter", "peft-adapter-rslora")
PROMPTS = ("The cat sat on the mat and slept all day.", "One day a red bird came to the big tree.")
TEXTS = [
    *PROMPTS,
    "0123456789 apples, 2 + 2 = 4!",
    "Who is it? It is I: the small dog of the king.",
]
T, MAX_NEW_TOKENS = 12, 12
SMALL = dict(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    max_position_embeddings=128,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500_000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=128,  # so small that all three branches of the scaling are taken
)
TEMPLATE = (
    "{% for message in messages %}"
    "<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)

CHECKPOINTS = {
    # 6 query heads share 2 key/value heads; heads of 16 although 48 / 6 = 8; 160 rows for a
    # tokenizer of 150 words
    "qwen2-untied": transformers.Qwen2Config(
        vocab_size=160,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        eos_token_id=1,
        bos_token_id=0,
    ),
    "qwen2-tied-sharded": transformers.Qwen2Config(
        **SMALL,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        rms_norm_eps=1e-5,
    ),
    "qwen2-fp16": transformers.Qwen2Config(
        **SMALL,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        dtype="float16",
    ),
    "llama-tied": transformers.LlamaConfig(
        **(SMALL | {"vocab_size": 150}),
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        bos_token_id=0,
        eos_token_id=1,
    ),
    "llama-untied-sharded": transformers.LlamaConfig(
        **(SMALL | {"max_position_embeddings": 512}),
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=12,
        rope_parameters=LLAMA3,
        rms_norm_eps=1e-5,
        bos_token_id=0,
        eos_token_id=[1, 2],
    ),
    "llama-bf16": transformers.LlamaConfig(
        **SMALL,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        mlp_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        bos_token_id=0,
        eos_token_id=1,
        dtype="bfloat16",
    ),
}
TOKENIZERS = {
    "qwen2-untied": "inside",
    "llama-tied": "file",
}  # where the chat template is kept; Llama's adds bos


class Unsuitable(Exception):
    """This seed's continuation would be a poor test."""


def build(config, seed: int):
    """A model with normal weights as large as a trained one's, or a little larger; norms near 1."""
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if "norm" in name:
                p.copy_(
                    (2 if config.tie_word_embeddings and name == "model.norm.weight" else 1)
                    * (1 + 0.2 * noise)
                )
            elif name.endswith("bias"):
                p.copy_(0.4 * noise)
            elif "embed_tokens" in name:
                p.copy_((0.1 if config.tie_word_embeddings else 0.5) * noise)
            elif "lm_head" in name:
                p.copy_(1.5 * noise / p.shape[1] ** 0.5)
            else:
                p.copy_(0.9 * noise / p.shape[1] ** 0.5)
    return model


def tokenizer(adds_bos: bool) -> transformers.PreTrainedTokenizerFast:
    """150 tokens: beginning and end of text, two of the chat, printable ASCII, merges from four
    texts."""
    t = tokenizers.Tokenizer(tokenizers.models.BPE())
    t.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = tokenizers.decoders.ByteLevel()
    special = ["<|begin|>", "<|eos|>", "<|start|>", "<|end|>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=150,
        special_tokens=special,
        initial_alphabet=[
            *map(chr, range(0x21, 0x7F)),
            "Ġ",
            "Ċ",
        ],  # the last two: space and newline
        show_progress=False,
    )
    t.train_from_iterator(TEXTS * 2, trainer)
    if adds_bos:
        t.post_processor = tokenizers.processors.TemplateProcessing(
            single="<|begin|> $A", pair="<|begin|> $A $B", special_tokens=[("<|begin|>", 0)]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=t, bos_token="<|begin|>", eos_token="<|eos|>", chat_template=TEMPLATE
    )


def reference(model, tokens: torch.Tensor, n_vocab: int) -> dict[str, torch.Tensor]:
    """What transformers computes in float32; ids from `n_vocab` on, which no token has, are not
    chosen."""
    with torch.no_grad():
        out = model(tokens, output_hidden_states=True)
        extended, gaps = tokens, []
        for _ in range(MAX_NEW_TOKENS):
            last = model(extended, use_cache=False).logits[:, -1, :n_vocab]
            best = last.topk(2).values
            gaps.append((best[:, 0] - best[:, 1]).min())
            extended = torch.cat([extended, last.argmax(-1, keepdim=True)], 1)
    greedy = extended[:, T:]
    if (
        min(gaps) < 0.005
        or min(len(set(row)) for row in greedy.tolist()) < 4
        or (n_vocab == 150 and (greedy < 4).any())
    ):
        raise Unsuitable
    generated = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        eos_token_id=-1,
        pad_token_id=0,
        suppress_tokens=list(range(n_vocab, model.config.vocab_size)) or None,
    )[:, T:]
    if not torch.equal(greedy, generated):
        raise SystemExit("transformers' generate does not agree with its own logits")
    return {
        "tokens": tokens.to(torch.int32),
        "logits": out.logits.contiguous(),
        "hidden_states": torch.stack(out.hidden_states),
        "greedy": greedy.to(torch.int32).contiguous(),
    }


def before_transformers_5(config: dict) -> dict:
    """The same configuration as transformers 4 wrote it."""
    config = {name: value for name, value in config.items() if name != "head_dim"}
    rope = config.pop("rope_parameters")
    config |= {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None,
        "torch_dtype": config.pop("dtype"),
    }
    return dict(sorted(config.items()))


def write_config(folder: Path, dtype: str, rewrite) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"dtype": dtype}
    path.write_text(json.dumps(rewrite(dict(sorted(config.items()))), indent=1) + "\n")


def checkpoint(name: str, config, *, seed: int) -> None:
    folder = home(name) / name
    shutil.rmtree(folder, ignore_errors=True)
    dtype = str(config.dtype or "float32").removeprefix("torch.")
    model = build(copy.deepcopy(config), seed)
    n_vocab, metadata = config.vocab_size, {}
    tokens = torch.randint(3, n_vocab, (2, T), generator=torch.Generator().manual_seed(seed))
    if name in TOKENIZERS:
        tok = tokenizer(adds_bos=name.startswith("llama"))
        n_vocab = len(tok)
        # Whole prompts that are 12 tokens long, so that text in, text out can be compared too.
        ids = [tok(prompt)["input_ids"][:T] for prompt in PROMPTS]
        prompts = [tok.decode(row, skip_special_tokens=True) for row in ids]
        assert [tok(prompt)["input_ids"] for prompt in prompts] == ids
        tokens = torch.tensor(ids)
        tok.save_pretrained(folder, save_jinja_files=TOKENIZERS[name] == "file")
        if n_vocab < config.vocab_size:  # rows that would win if they took part
            with torch.no_grad():
                model.lm_head.weight[n_vocab:] *= 2
    model = model.to(getattr(torch, dtype))
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id
    )
    model.save_pretrained(folder, max_shard_size="40KB" if "sharded" in name else "50GB")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    computed = reference(model, tokens, n_vocab)
    if name in TOKENIZERS:
        texts = [tok.decode(row, skip_special_tokens=True) for row in computed["greedy"].tolist()]
        metadata = {"texts": json.dumps({"prompts": prompts, "greedy": texts})}
    save_file(computed, folder / "reference.safetensors", metadata=metadata)
    write_config(folder, dtype, before_transformers_5 if name == "llama-tied" else dict)
    logits = computed["logits"]
    size = sum(path.stat().st_size for path in folder.iterdir())
    spread = f"|logits| std {logits.std():.2f} max {logits.abs().max():.1f}"
    print(f"{name:22} {spread}  {size / 1e3:.0f} kB  {computed['greedy'].tolist()[0]}")


def adapter(name: str, *, seed: int, **options) -> None:
    """An adapter as peft makes it, on qwen2-untied, its B set to random numbers as if it had been
    trained."""
    base, folder = home("qwen2-untied") / "qwen2-untied", home(name) / name
    shutil.rmtree(folder, ignore_errors=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    torch.manual_seed(seed)
    options |= {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    config = peft.LoraConfig(r=4, lora_alpha=8, **options)
    model = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "lora_B" in key:
                p.copy_(0.2 * torch.randn(p.shape))
    model.peft_config["default"].base_model_name_or_path = "qwen2-untied"
    model.save_pretrained(folder)
    (folder / "README.md").unlink()  # peft's empty model card
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(
        json.dumps(config | {"target_modules": sorted(config["target_modules"])}, indent=1) + "\n"
    )
    n_vocab = len(tokenizer(adds_bos=False))
    with safetensors.safe_open(base / "reference.safetensors", "pt") as file:
        tokens, plain = file.get_tensor("tokens").long(), file.get_tensor("logits")
    computed = reference(model.merge_and_unload(), tokens, n_vocab)
    save_file(computed, folder / "reference.safetensors")
    print(f"{name:22} changes logits by up to {(computed['logits'] - plain).abs().max():.1f}")


def first_good(make, *args, **options) -> None:
    for seed in range(100):
        try:
            return make(*args, seed=seed, **options)
        except Unsuitable:
            continue
    raise SystemExit(f"{args[0]}: no seed suits")


def home(name: str) -> Path:
    """Where a checkpoint or an adapter goes: into the folder that was named, or to its like."""
    return Path(sys.argv[1]) if len(sys.argv) > 1 else FIXTURES if name in FOR_TESTS else MODELS


def main() -> None:
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    for name, config in CHECKPOINTS.items():
        first_good(checkpoint, name, config)
    first_good(adapter, "peft-adapter")
    first_good(adapter, "peft-adapter-rslora", use_rslora=True)
    places = {home(name) for name in (*CHECKPOINTS, *FOR_TESTS)}
    files = [path for place in places for path in place.rglob("*.safetensors")]
    for path in files:
        path.chmod(0o644)  # safetensors makes files that only their owner may read
    modules = (torch, transformers, peft, safetensors, tokenizers)
    versions = {"python": platform.python_version()}
    versions |= {module.__name__: module.__version__ for module in modules}
    (home(FOR_TESTS[0]) / "versions.json").write_text(json.dumps(versions, indent=1) + "\n")
    total = sum(path.stat().st_size for path in files)
    print(f"{total / 1e6:.2f} MB of safetensors in all, with {versions}")


if __name__ == "__main__":
    main()
