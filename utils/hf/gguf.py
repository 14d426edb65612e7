"""Read a GGUF file, llama.cpp's format, as if it were a Hugging Face checkpoint.

A GGUF file is one file with everything: settings as key and value, the tokenizer, and the weights, most of them
quantised. Blocks of 32 weights share a scale: in Q8_0 a block is one fp16 scale and 32 signed bytes, in Q4_1 a scale, a
minimum and 32 half-bytes. `gguf` reads the format (through a memory map: a tensor is read when it is asked for) and
undoes the quantisation. What is left to this module is the translation:

- llama.cpp's names into Hugging Face's (`blk.3.attn_q.weight` is `model.layers.3.self_attn.q_proj.weight`), and the
  settings into the keys of `config.json`;
- the order of rows in q_proj and k_proj. llama.cpp rotates neighbouring rows of a head together, Hugging Face row i
  and row i + H/2, so the converter from Hugging Face to GGUF reorders the rows of Llama models. That is undone here;
  Qwen2 models are left in order by the converter, and so here. No error would tell: the text would just be nonsense.
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
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from utils import CourseError

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
REFUSED = ("expert_count", "attention.sliding_window", "rope.scaling.type", "attn_logit_softcapping")
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_CONTEXT = 8192  # what Llama 3 was first trained with, in every release that scales its rotations

# How text is cut into words before the merges apply, by the name in `tokenizer.ggml.pre`.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLIT = {"qwen2": WORDS % "", "deepseek-r1-qwen": WORDS % "", "llama-bpe": WORDS % "{1,3}"}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # kinds of token


class Reader(gguf.GGUFReader):
    """gguf's reader, which stops at the end of the file: a damaged length would let it count to 2**64."""

    def _get(self, offset, dtype, count=1, *rest, **more):
        found = super()._get(offset, dtype, count, *rest, **more)
        if len(found) < count:
            raise ValueError(f"the file ends at byte {len(self.data):,}, in the middle of a value")
        return found


class Checkpoint:
    """An open GGUF file. `config` is what a `config.json` would hold; `tensor` gives float32 in (out, in) layout."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise self._wrong("expected a GGUF file, found none: correct the path")
        with open(self.path, "rb") as file:
            magic = file.read(4)
        if magic != b"GGUF":
            raise self._wrong(f"expected a GGUF file (it begins with GGUF), found {magic!r} at its start")
        try:
            self._reader = Reader(self.path)
            self._fields = {name: field.contents() for name, field in self._reader.fields.items()}
        except Exception as error:  # a damaged file fails anywhere in the parser, with any kind of exception
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise self._wrong(f"expected a whole GGUF file, found a truncated or damaged one ({said})") from error
        self.architecture = self._fields.get("general.architecture")
        if self.architecture not in ARCHITECTURES:
            raise self._wrong(
                f"expected the architecture {' or '.join(ARCHITECTURES)}, found {self.architecture!r}: not supported"
            )
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self._ours = {self._hf_name(name): name for name in self._tensors if name != "rope_freqs.weight"}
        self.config = self._read_config()

    def _wrong(self, message: str) -> CourseError:
        return CourseError(f"{self.path.name}: {message}")

    def _hf_name(self, name: str) -> str:
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
        module = MODULES.get(match[2], "") if match else ""
        if not module or ("{}" in module) != (match[1] is not None):
            raise self._wrong(f"tensor {name}: expected one of a {self.architecture} model, found one it does not have")
        return f"{module.format(match[1])}.{match[3]}"

    # ------------------------------------------------------------------------------------------------- the settings

    def _setting(self, key: str, default=None, whole: bool = True):
        """A number of the architecture's metadata; required unless there is a default."""
        name = f"{self.architecture}.{key}"
        value = self._fields.get(name, default)
        if value is None:
            raise self._wrong(f"metadata {name}: expected a number, found no such key: convert the model again")
        if isinstance(value, list):
            raise self._wrong(f"metadata {name}: expected one number, found one for each layer: not supported")
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not value > 0
            or whole
            and value != int(value)
        ):
            raise self._wrong(
                f"metadata {name}: expected a positive {'integer' if whole else 'number'}, found {value!r}"
            )
        # A float is stored in 32 bits: 1e-05 would come out as 9.999999747378752e-06.
        return int(value) if whole else float(str(np.float32(value)))

    def _read_config(self) -> dict:
        for key in REFUSED:
            if (value := self._fields.get(f"{self.architecture}.{key}")) not in (None, 0, "none"):
                raise self._wrong(f"metadata {self.architecture}.{key}: expected none, found {value!r}: not supported")
        if "token_embd.weight" not in self._tensors:
            raise self._wrong("tensor token_embd.weight: expected the embedding, found no such tensor")
        width, heads = self._setting("embedding_length"), self._setting("attention.head_count")
        rotated = self._setting("rope.dimension_count", width // heads)
        head_size = self._setting("attention.key_length", rotated)
        if rotated != head_size:
            raise self._wrong(
                f"rope.dimension_count: expected the head size {head_size}, found {rotated}: not supported"
            )
        if self._setting("attention.value_length", head_size) != head_size:
            raise self._wrong("attention.value_length: expected that of the keys, found another: not supported")
        theta = self._setting("rope.freq_base", 10_000.0, whole=False)  # llama.cpp's default
        layers = self._setting("block_count")
        found = {int(name.split(".")[1]) for name in self._tensors if name.startswith("blk.")}
        if found != set(range(layers)):
            raise self._wrong(f"expected tensors of {layers} layers, as block_count says, found those of {len(found)}")
        biases = {}
        if self.architecture == "llama":  # Qwen2 has biases on q, k and v always
            for key, part in (("attention_bias", "attn"), ("mlp_bias", "ffn")):
                biases[key] = any(re.fullmatch(rf"blk\.\d+\.{part}_\w+\.bias", name) for name in self._tensors)
        return biases | {
            "architectures": [ARCHITECTURES[self.architecture]],
            "model_type": self.architecture,
            "vocab_size": int(self._tensors["token_embd.weight"].shape[1]),
            "hidden_size": width,
            "intermediate_size": self._setting("feed_forward_length"),
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": self._setting("attention.head_count_kv", heads),
            "head_dim": head_size,
            "hidden_act": "silu",
            "max_position_embeddings": self._setting("context_length"),
            "rms_norm_eps": self._setting("attention.layer_norm_rms_epsilon", whole=False),
            "rope_theta": theta,
            "rope_scaling": self._rope_scaling(theta, head_size),
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "bos_token_id": self._fields.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self._fields.get("tokenizer.ggml.eos_token_id"),
            "torch_dtype": "float32",
        }

    def _rope_scaling(self, theta: float, head_size: int) -> dict | None:
        """Llama 3's scaling, of which a GGUF file holds only the result: what each frequency is divided by."""
        if "rope_freqs.weight" not in self._tensors:
            return None
        factors = self._array("rope_freqs.weight").ravel()
        factor = float(factors.max())
        low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
        turns = LLAMA3_CONTEXT * theta ** (-np.arange(0, head_size, 2) / head_size) / (2 * np.pi)
        smooth = np.clip((turns - low) / (high - low), 0, 1)
        expected = 1 / ((1 - smooth) / factor + smooth)
        if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
            raise self._wrong("tensor rope_freqs.weight: expected Llama 3's RoPE scaling, found another: not supported")
        return LLAMA3 | {"factor": factor, "original_max_position_embeddings": LLAMA3_CONTEXT}

    # -------------------------------------------------------------------------------------------------- the weights

    def names(self) -> list[str]:
        """Hugging Face's names of all tensors, in the order of the file."""
        return list(self._ours)

    def _find(self, name: str) -> str:
        if name not in self._ours:
            raise self._wrong(f"tensor {name}: expected one of {len(self._ours)}, found no such tensor")
        return self._ours[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """(out, in), as in a Hugging Face checkpoint; GGUF counts dimensions from the innermost."""
        return tuple(int(n) for n in reversed(self._tensors[self._find(name)].shape))

    def tensor(self, name: str) -> Float32[np.ndarray, "..."]:
        """One tensor, dequantised, rows of q and k in Hugging Face's order. Reads that part of the file only."""
        theirs = self._find(name)
        values = self._array(theirs)
        if self.architecture == "llama" and (match := re.search(r"\.attn_([qk])\.", theirs)):
            heads = self.config["num_attention_heads" if match[1] == "q" else "num_key_value_heads"]
            if values.shape[0] % (2 * heads):
                raise self._wrong(f"tensor {name}: expected rows for {heads} heads, found {values.shape[0]} rows")
            pairs = values.reshape(heads, -1, 2, *values.shape[1:])  # head, pair, first and second of the pair
            values = np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(values.shape))
        return values

    def _array(self, name: str) -> Float32[np.ndarray, "..."]:
        tensor = self._tensors[name]
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
        except (NotImplementedError, KeyError) as error:
            raise self._wrong(
                f"tensor {name}: expected F32, F16, BF16 or a quantised type that gguf can undo,"
                f" found {tensor.tensor_type.name}"
            ) from error
        return np.array(values, np.float32)  # a copy: F32 would stay a view of the file

    # ------------------------------------------------------------------------------------------------ the tokenizer

    def tokenizer_files(self) -> dict[str, str]:
        """`tokenizer.json`, `tokenizer_config.json` and `generation_config.json`, as text, for a byte-level BPE."""
        kind, cut = self._fields.get("tokenizer.ggml.model"), self._fields.get("tokenizer.ggml.pre", "gpt-2")
        if kind != "gpt2":
            raise self._wrong(f"tokenizer.ggml.model: expected gpt2 (byte-level BPE), found {kind!r}: not supported")
        if cut not in SPLIT and cut not in ("gpt-2", "smollm"):
            known = ", ".join(["gpt-2", "smollm", *SPLIT])
            raise self._wrong(f"tokenizer.ggml.pre: expected one of {known}, found {cut!r}: not supported")
        tokens = self._fields.get("tokenizer.ggml.tokens")
        merges = self._fields.get("tokenizer.ggml.merges")
        if not tokens or merges is None:
            raise self._wrong("expected tokenizer.ggml.tokens and tokenizer.ggml.merges, found no such keys")
        types = list(self._fields.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens))
        while len(types) == len(tokens) and types[-1] == UNUSED:  # rows that pad the embedding to a round number
            types.pop()
            tokens = tokens[:-1]
        if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
            raise self._wrong("tokenizer.ggml.tokens: expected different tokens, a type for each, found otherwise")

        try:
            pairs = [tuple(merge.split(" ")) for merge in merges]
            vocabulary = {token: number for number, token in enumerate(tokens)}
            tok = tokenizers.Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=cut == "llama-bpe"))
        except Exception as error:  # tokenizers raises plain exceptions
            said = str(error).splitlines()[0]
            raise self._wrong(
                f"tokenizer.ggml.merges: expected pairs of known tokens, found otherwise ({said})"
            ) from error
        if cut in SPLIT:
            words = pre_tokenizers.Split(tokenizers.Regex(SPLIT[cut]), "isolated")
            tok.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
        else:
            bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
            digits = [pre_tokenizers.Digits(individual_digits=True)] if cut == "smollm" else []
            tok.pre_tokenizer = pre_tokenizers.Sequence([*digits, bytes_])
        if "qwen" in cut:
            tok.normalizer = normalizers.NFC()
        tok.decoder = decoders.ByteLevel()
        special = [AddedToken(t, special=True, normalized=False) for t, k in zip(tokens, types) if k == CONTROL]
        tok.add_special_tokens(special)
        tok.add_tokens([AddedToken(t, normalized=False) for t, k in zip(tokens, types) if k == USER_DEFINED])

        settings: dict = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        settings["model_max_length"] = self.config["max_position_embeddings"]
        for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
            number = self._fields.get(f"tokenizer.ggml.{key}_token_id")
            if number is not None and not 0 <= number < len(tokens):
                raise self._wrong(f"tokenizer.ggml.{key}_token_id: expected below {len(tokens)}, found {number}")
            settings[f"{role}_token"] = None if number is None else tokens[number]
        adds_bos = bool(self._fields.get("tokenizer.ggml.add_bos_token", cut == "llama-bpe"))
        settings["add_bos_token"] = adds_bos
        if (template := self._fields.get("tokenizer.chat_template")) is not None:
            settings["chat_template"] = template
        if adds_bos and (bos := settings["bos_token"]) is not None:
            tok.post_processor = processors.TemplateProcessing(
                single=f"{bos}:0 $A:0", pair=f"{bos}:0 $A:0 $B:1", special_tokens=[(bos, vocabulary[bos])]
            )
        ends = [self._fields.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot")]
        ends = [number for number in dict.fromkeys(ends) if number is not None]
        generation = {"bos_token_id": self.config["bos_token_id"], "eos_token_id": ends[0] if len(ends) == 1 else ends}
        return {
            "tokenizer.json": tok.to_str(pretty=True),
            "tokenizer_config.json": json.dumps(settings, indent=2, ensure_ascii=False),
            "generation_config.json": json.dumps(generation, indent=2),
        }


def read(path: str | Path) -> Checkpoint:
    """Open a GGUF file. Raises CourseError for another kind of file, a damaged one, and what is not supported."""
    return Checkpoint(path)
