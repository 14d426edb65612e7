"""Read a GGUF file, llama.cpp's format, as if it were a Hugging Face checkpoint.

A GGUF file holds settings, tokenizer and weights, most of them quantised in blocks of 32 that share
a scale: in Q8_0 a block is one fp16 scale and 32 signed bytes, in Q4_1 a scale, a minimum and 32
half-bytes. The library `gguf` reads it through a memory map and dequantises. Translated here are:

- llama.cpp's names into Hugging Face's (`blk.3.attn_q.weight` is
  `model.layers.3.self_attn.q_proj.weight`), and the settings into the keys of `config.json`;
- the order of rows in q_proj and k_proj. llama.cpp rotates neighbouring rows of a head together,
  Hugging Face rows i and i + H/2, so the converter to GGUF reorders the rows of Llama models, not
  of Qwen2. That is undone here: no error would tell, the text would be nonsense;
- the tokenizer, from its lists of tokens and merges into a `tokenizer.json`.
"""

import json
import re
from pathlib import Path

import gguf
import numpy as np
import tokenizers
from gguf.quants import dequantize
from jaxtyping import Float32
from safetensors.numpy import save_file
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from utils import CourseError, first_line, unexpected

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
MODULES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "model.layers.{}.input_layernorm",
    "attn_q": "model.layers.{}.self_attn.q_proj",
    "attn_k": "model.layers.{}.self_attn.k_proj",
    "attn_v": "model.layers.{}.self_attn.v_proj",
    "attn_output": "model.layers.{}.self_attn.o_proj",
    "ffn_norm": "model.layers.{}.post_attention_layernorm",
    "ffn_gate": "model.layers.{}.mlp.gate_proj",
    "ffn_up": "model.layers.{}.mlp.up_proj",
    "ffn_down": "model.layers.{}.mlp.down_proj",
}
# Metadata that would change what the model computes, and that the course's models do not have.
REFUSE = ("expert_count", "attention.sliding_window", "attn_logit_softcapping", "rope.scaling.type")
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_CONTEXT = 8192  # of Llama 3's first training, in every release that scales its rotations

# How text is cut into words before the merges apply, by the name in `tokenizer.ggml.pre`.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLIT = {"qwen2": WORDS % "", "deepseek-r1-qwen": WORDS % "", "llama-bpe": WORDS % "{1,3}"}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # kinds of token


class Reader(gguf.GGUFReader):
    """gguf's reader, but it stops at the end of the file: a damaged length may be 2**64."""

    def _get(self, offset, dtype, count=1, *rest, **more):
        values = super()._get(offset, dtype, count, *rest, **more)
        if len(values) < count:
            raise ValueError(f"the file ends at byte {len(self.data):,}, in the middle of a value")
        return values


class Checkpoint:
    """An open GGUF file: `config` is as config.json would be, `tensor` gives float32 [out, in]."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        name = self.path.name
        if not self.path.is_file():
            raise unexpected(name, "a GGUF file", "none", "correct the path")
        with open(self.path, "rb") as file:
            magic = file.read(4)
        if magic != b"GGUF":
            raise unexpected(name, "a GGUF file (it begins with GGUF)", f"{magic!r} at its start")
        try:
            reader = Reader(self.path)
            self._fields = {key: field.contents() for key, field in reader.fields.items()}
        except Exception as error:  # a damaged file fails anywhere in the parser, with any type
            found = f"a truncated or damaged one ({first_line(error)})"
            raise unexpected(name, "a whole GGUF file", found) from error
        self.architecture = self._fields.get("general.architecture")
        if self.architecture not in ARCHITECTURES:
            expected = f"the architecture {' or '.join(ARCHITECTURES)}"
            raise unexpected(name, expected, repr(self.architecture), "not supported")
        stored = {tensor.name: tensor for tensor in reader.tensors}
        self._rope_factors = stored.pop("rope_freqs.weight", None)
        self._tensors = {self._hf_name(name): tensor for name, tensor in stored.items()}
        self.config = self._read_config()

    def _wrong(self, where: str, *what: object) -> CourseError:
        return unexpected(f"{self.path.name}: {where}", *what)

    def _hf_name(self, name: str) -> str:
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
        module = MODULES.get(match[2], "") if match else ""
        if not module or ("{}" in module) != (match[1] is not None):
            expected = f"one of a {self.architecture} model"
            raise self._wrong(f"tensor {name}", expected, "one it does not have")
        return f"{module.format(match[1])}.{match[3]}"

    # -------------------------------------------------------------------------------- the settings

    def _setting(self, key: str, default=None, whole: bool = True):
        """A number of the architecture's metadata; required unless there is a default."""
        name = f"{self.architecture}.{key}"
        where, value = f"metadata {name}", self._fields.get(name, default)
        if value is None:
            raise self._wrong(where, "a number", "no such key", "convert the model again")
        if isinstance(value, list):
            raise self._wrong(where, "one number", "one for each layer", "not supported")
        number = type(value) in (int, float) and value > 0
        if not number or whole and value != int(value):
            raise self._wrong(where, f"a positive {'integer' if whole else 'number'}", repr(value))
        # A float is stored in 32 bits: 1e-05 would come out as 9.999999747378752e-06.
        return int(value) if whole else float(str(np.float32(value)))

    def _read_config(self) -> dict:
        for key in (f"{self.architecture}.{key}" for key in REFUSE):
            if (value := self._fields.get(key)) not in (None, 0, "none"):
                raise self._wrong(f"metadata {key}", "none", repr(value), "not supported")
        if "model.embed_tokens.weight" not in self._tensors:
            raise self._wrong("tensor token_embd.weight", "the embedding", "no such tensor")
        width, heads = self._setting("embedding_length"), self._setting("attention.head_count")
        rotated = self._setting("rope.dimension_count", width // heads)
        head_dim = self._setting("attention.key_length", rotated)
        if rotated != head_dim:
            expected = f"the head dimension {head_dim}"
            raise self._wrong("rope.dimension_count", expected, rotated, "not supported")
        if self._setting("attention.value_length", head_dim) != head_dim:
            where = "attention.value_length"
            raise self._wrong(where, "that of the keys", "another", "not supported")
        theta = self._setting("rope.freq_base", 10_000.0, whole=False)  # llama.cpp's default
        layers = self._setting("block_count")
        stored = {int(name.split(".")[2]) for name in self._tensors if ".layers." in name}
        if stored != set(range(layers)):
            expected = f"tensors of {layers} layers, as block_count says"
            raise unexpected(self.path.name, expected, f"those of {len(stored)}")
        biases = {}
        if self.architecture == "llama":  # Qwen2 has biases on q, k and v always
            for key, part in (("attention_bias", ".self_attn."), ("mlp_bias", ".mlp.")):
                biases[key] = any(part in n and n.endswith(".bias") for n in self._tensors)
        return biases | {
            "architectures": [ARCHITECTURES[self.architecture]],
            "model_type": self.architecture,
            "vocab_size": self.shapes()["model.embed_tokens.weight"][0],
            "hidden_size": width,
            "intermediate_size": self._setting("feed_forward_length"),
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": self._setting("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self._setting("context_length"),
            "rms_norm_eps": self._setting("attention.layer_norm_rms_epsilon", whole=False),
            "rope_theta": theta,
            "rope_scaling": self._rope_scaling(theta, head_dim),
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
            "bos_token_id": self._fields.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self._fields.get("tokenizer.ggml.eos_token_id"),
            "torch_dtype": "float32",
        }

    def _rope_scaling(self, theta: float, head_dim: int) -> dict | None:
        """Llama 3's scaling, of which a GGUF file holds what each frequency is divided by."""
        if self._rope_factors is None:
            return None
        factors = self._values(self._rope_factors).ravel()
        factor = float(factors.max())
        low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
        turns = LLAMA3_CONTEXT / (2 * np.pi) * theta ** (-np.arange(0, head_dim, 2) / head_dim)
        smooth = np.clip((turns - low) / (high - low), 0, 1)
        expected = 1 / ((1 - smooth) / factor + smooth)
        if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
            where = "tensor rope_freqs.weight"
            raise self._wrong(where, "Llama 3's RoPE scaling", "another", "not supported")
        return LLAMA3 | {"factor": factor, "original_max_position_embeddings": LLAMA3_CONTEXT}

    # --------------------------------------------------------------------------------- the weights

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Hugging Face's name -> [out, in]. GGUF lists dimensions from the innermost."""
        return {name: tuple(t.shape[::-1].tolist()) for name, t in self._tensors.items()}

    def dtype(self, name: str) -> np.dtype:
        """Of `tensor`, however it is stored."""
        return np.dtype(np.float32)

    def tensor(self, name: str) -> Float32[np.ndarray, "..."]:
        """One tensor, dequantised, rows of q and k in Hugging Face's order; reads no other."""
        if name not in self._tensors:
            raise self._wrong(f"tensor {name}", f"one of {len(self._tensors)}", "no such tensor")
        values = self._values(self._tensors[name])
        if self.architecture == "llama" and (match := re.search(r"\.([qk])_proj\.", name)):
            heads = self.config[f"num_{'attention' if match[1] == 'q' else 'key_value'}_heads"]
            if (rows := len(values)) % (2 * heads):
                raise self._wrong(f"tensor {name}", f"rows for {heads} heads", f"{rows} rows")
            # head, pair, first and second of the pair -> head, first or second, pair
            pairs = values.reshape(heads, -1, 2, *values.shape[1:]).swapaxes(1, 2)
            values = np.ascontiguousarray(pairs.reshape(values.shape))
        return values

    def save(self, directory: Path) -> None:
        """Write a Hugging Face folder in float32: `config.json`, tokenizer files, weights."""
        files = self.tokenizer_files() | {"config.json": json.dumps(self.config, indent=2)}
        for name, text in files.items():
            (directory / name).write_text(text, encoding="utf-8")
        tensors = {name: self.tensor(name) for name in self._tensors}
        mark = {"format": "pt"}  # transformers asks for it
        save_file(tensors, directory / "model.safetensors", metadata=mark)

    def _values(self, tensor: gguf.ReaderTensor) -> Float32[np.ndarray, "..."]:
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
        except (NotImplementedError, KeyError) as error:
            expected = "F32, F16, BF16 or a quantised type that gguf can undo"
            raise self._wrong(f"tensor {tensor.name}", expected, tensor.tensor_type.name) from error
        return np.array(values, np.float32)  # a copy: F32 would stay a view of the file

    # ------------------------------------------------------------------------------- the tokenizer

    def tokenizer_files(self) -> dict[str, str]:
        """The texts of tokenizer.json, tokenizer_config.json and generation_config.json."""
        fields = {n.removeprefix("tokenizer.ggml."): value for n, value in self._fields.items()}
        kind, cut = fields.get("model"), fields.get("pre", "gpt-2")
        if kind != "gpt2":
            expected = "gpt2 (byte-level BPE)"
            raise self._wrong("tokenizer.ggml.model", expected, repr(kind), "not supported")
        if cut not in (known := ("gpt-2", "smollm", *SPLIT)):
            expected = f"one of {', '.join(known)}"
            raise self._wrong("tokenizer.ggml.pre", expected, repr(cut), "not supported")
        tokens, merges = fields.get("tokens"), fields.get("merges")
        if not tokens or merges is None:
            expected = "tokenizer.ggml.tokens and tokenizer.ggml.merges"
            raise unexpected(self.path.name, expected, "no such keys")
        types = list(fields.get("token_type") or [NORMAL] * len(tokens))
        while len(types) == len(tokens) and types[-1] == UNUSED:  # rows that pad the embedding
            types.pop()
            tokens = tokens[:-1]
        if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
            expected = "different tokens, a type for each"
            raise self._wrong("tokenizer.ggml.tokens", expected, "otherwise")
        tok = self._tokenizer(tokens, merges, types, cut)

        settings = dict(
            tokenizer_class="PreTrainedTokenizerFast", clean_up_tokenization_spaces=False
        )
        settings["model_max_length"] = self.config["max_position_embeddings"]
        for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
            number = fields.get(f"{key}_token_id")
            if number is not None and not 0 <= number < len(tokens):
                raise self._wrong(f"tokenizer.ggml.{key}_token_id", f"below {len(tokens)}", number)
            settings[f"{role}_token"] = None if number is None else tokens[number]
        settings["add_bos_token"] = adds = bool(fields.get("add_bos_token", cut == "llama-bpe"))
        if (template := self._fields.get("tokenizer.chat_template")) is not None:
            settings["chat_template"] = template
        if adds and (bos := settings["bos_token"]) is not None:
            special, pair = [(bos, tok.token_to_id(bos))], f"{bos}:0 $A:0 $B:1"
            tok.post_processor = processors.TemplateProcessing(f"{bos}:0 $A:0", pair, special)
        ends = [fields.get(f"{key}_token_id") for key in ("eos", "eot")]
        ends = [number for number in dict.fromkeys(ends) if number is not None]
        eos = ends[0] if len(ends) == 1 else ends
        generation = {"bos_token_id": self.config["bos_token_id"], "eos_token_id": eos}
        return {
            "tokenizer.json": tok.to_str(pretty=True),
            "tokenizer_config.json": json.dumps(settings, indent=2, ensure_ascii=False),
            "generation_config.json": json.dumps(generation, indent=2),
        }

    def _tokenizer(self, tokens, merges, types, cut: str) -> tokenizers.Tokenizer:
        try:
            pairs = [tuple(merge.split(" ")) for merge in merges]
            vocabulary = {token: number for number, token in enumerate(tokens)}
            bpe = models.BPE(vocabulary, pairs, ignore_merges=cut == "llama-bpe")
        except Exception as error:  # tokenizers raises plain exceptions
            where, found = "tokenizer.ggml.merges", f"otherwise ({first_line(error)})"
            raise self._wrong(where, "pairs of known tokens", found) from error
        tok = tokenizers.Tokenizer(bpe)
        steps = [pre_tokenizers.Digits(individual_digits=True)] * (cut == "smollm")
        if cut in SPLIT:
            steps = [pre_tokenizers.Split(tokenizers.Regex(SPLIT[cut]), "isolated")]
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut not in SPLIT))
        tok.pre_tokenizer = pre_tokenizers.Sequence(steps)
        if "qwen" in cut:
            tok.normalizer = normalizers.NFC()
        tok.decoder = decoders.ByteLevel()
        for kind, special in ((CONTROL, True), (USER_DEFINED, False)):
            chosen = [token for token, of in zip(tokens, types) if of == kind]
            tok.add_tokens([AddedToken(t, normalized=False, special=special) for t in chosen])
        return tok


def read(path: str | Path) -> Checkpoint:
    """Open a GGUF file. Raises CourseError for another, a damaged or an unsupported one."""
    return Checkpoint(path)
