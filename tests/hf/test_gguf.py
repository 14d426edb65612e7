"""GGUF files: names, layout and settings as Hugging Face has them, values as `gguf` itself dequantises them."""

import json
import struct

import gguf as library
import numpy as np
import pytest
import tokenizers

from utils import CourseError
from utils.hf import gguf

KINDS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]
D, F, N, KV, H, LAYERS = 64, 96, 4, 2, 16, 2
WORDS = [
    "a",
    "b",
    "c",
    "Ġ",
    "1",
    "2",
    "x",
    "ab",
    "Ġa",
    "Ġab",
    "<|end|>",
    "<|user|>",
    "<think>",
    "[PAD13]",
]
MERGES = ["a b", "Ġ a", "Ġ ab"]
TEMPLATE = "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}"


def permuted(weight, heads):
    """llama.cpp's order of rows, written from its definition: row 2j + i of a head is Hugging Face's row i·H/2 + j."""
    rows = weight.reshape(heads, -1, *weight.shape[1:])
    half = rows.shape[1] // 2
    order = [i * half + j for j in range(half) for i in range(2)]
    return rows[:, order].reshape(weight.shape)


def hf_tensors(arch="llama", tied=True, biases=False, words=WORDS, heads=N, kv=KV, size=H):
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (len(words), D), "model.norm.weight": (D,)}
    if not tied:
        shapes["lm_head.weight"] = (len(words), D)
    for i in range(LAYERS):
        at = f"model.layers.{i}."
        shapes |= {f"{at}{part}_layernorm.weight": (D,) for part in ("input", "post_attention")}
        for part, rows in (("q", heads * size), ("k", kv * size), ("v", kv * size)):
            shapes[f"{at}self_attn.{part}_proj.weight"] = (rows, D)
            if biases or arch == "qwen2":
                shapes[f"{at}self_attn.{part}_proj.bias"] = (rows,)
        shapes[f"{at}self_attn.o_proj.weight"] = (D, heads * size)
        shapes |= {f"{at}mlp.gate_proj.weight": (F, D), f"{at}mlp.up_proj.weight": (F, D)}
        shapes[f"{at}mlp.down_proj.weight"] = (D, F)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


BACK = {v.removeprefix("model.layers.{}."): k for k, v in gguf.MODULES.items()}


def their_name(name):
    parts = name.split(".")
    if parts[:2] == ["model", "layers"]:
        return f"blk.{parts[2]}.{BACK['.'.join(parts[3:-1])]}.{parts[-1]}"
    return f"{BACK['.'.join(parts[:-1])]}.{parts[-1]}"


def write(
    path,
    arch="llama",
    kind="F32",
    tied=True,
    biases=False,
    tensors=None,
    skip=(),
    meta=None,
    pre="smollm",
    **more,
):
    """A small GGUF file, as llama.cpp's converter would write it; returns what the tensors should come out as."""
    out = library.GGUFWriter(path, arch)
    values = {
        "block_count": LAYERS, "context_length": 128, "embedding_length": D, "feed_forward_length": F,
        "attention.head_count": N, "attention.head_count_kv": KV,
    }  # fmt: skip
    numbers = {"attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 1e6}
    for key, value in (values | numbers | (meta or {})).items():
        if key in skip or value is None:
            continue
        write_one = out.add_float32 if isinstance(value, float) else out.add_uint32
        if isinstance(value, str):
            write_one = out.add_string
        elif isinstance(value, list):
            write_one = out.add_array
        write_one(f"{arch}.{key}", value)
    tokenizer = {
        "model": "gpt2", "pre": pre, "tokens": WORDS, "merges": MERGES, "bos_token_id": 11, "eos_token_id": 10,
        "token_type": [1] * 10 + [3, 3, 4, 5],
    } | more  # fmt: skip
    for key, value in tokenizer.items():
        if value is None or key in skip:
            continue
        add = {str: out.add_string, list: out.add_array, bool: out.add_bool, int: out.add_uint32}[
            type(value)
        ]
        add(f"tokenizer.ggml.{key}" if key != "chat_template" else "tokenizer.chat_template", value)
    expected = {}
    quantised = library.GGMLQuantizationType[kind]
    for name, value in (hf_tensors(arch, tied, biases) if tensors is None else tensors).items():
        theirs = their_name(name) if name.startswith(("model.", "lm_head.")) else name
        heads = N if ".q_proj" in name else KV if ".k_proj" in name else 0
        if value.ndim == 1 or kind == "F32":
            data, t = value, library.GGMLQuantizationType.F32
        else:
            data, t = None, quantised
        if arch == "llama" and heads:
            value = permuted(value, heads)
            data = value if data is not None else None
        data = library.quants.quantize(value, t) if data is None else data
        if t == library.GGMLQuantizationType.F16:
            out.add_tensor(theirs, data)
        else:
            out.add_tensor(theirs, data, raw_dtype=t)
        back = library.quants.dequantize(data, t)
        if arch == "llama" and heads:  # rows one by one, to where they came from
            pairs = permuted(np.arange(len(back), dtype=np.float32)[:, None], heads)[:, 0].astype(
                int
            )
            undone = np.empty_like(back)
            undone[pairs] = back
            back = undone
        expected[name] = back
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return expected


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", KINDS)
def test_values_equal_ggufs_own(tmp_path, arch, kind):
    expected = write(tmp_path / "m.gguf", arch, kind)
    found = gguf.read(tmp_path / "m.gguf")
    assert set(found.shapes()) == set(expected)
    for name, value in expected.items():
        tensor = found.tensor(name)
        assert (
            tensor.dtype == np.float32
            and tensor.flags.c_contiguous
            and found.shapes()[name] == value.shape
        )
        np.testing.assert_array_equal(tensor, value, err_msg=name)


def test_float32_comes_back_bit_for_bit(tmp_path):
    write(tmp_path / "m.gguf", biases=True)
    found = gguf.read(tmp_path / "m.gguf")
    for name, value in hf_tensors(biases=True).items():
        np.testing.assert_array_equal(found.tensor(name), value, err_msg=name)
    assert found.config["attention_bias"] is True and found.config["mlp_bias"] is False


def test_the_permutation_matters(tmp_path):
    # The same rows read as qwen2, whose rows are not reordered, are not those of the llama model.
    write(tmp_path / "m.gguf")
    found = gguf.read(tmp_path / "m.gguf")
    found.architecture = "qwen2"
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not np.array_equal(found.tensor(name), hf_tensors()[name])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_settings(tmp_path, arch, tied):
    write(tmp_path / "m.gguf", arch, tied=tied)
    config = gguf.read(tmp_path / "m.gguf").config
    expected = {
        "architectures": ["LlamaForCausalLM" if arch == "llama" else "Qwen2ForCausalLM"],
        "vocab_size": len(WORDS), "hidden_size": D, "intermediate_size": F, "num_hidden_layers": LAYERS,
        "num_attention_heads": N, "num_key_value_heads": KV, "head_dim": H, "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5, "rope_theta": 1e6, "rope_scaling": None, "tie_word_embeddings": tied,
        "bos_token_id": 11, "eos_token_id": 10,
    }  # fmt: skip
    assert {key: config[key] for key in expected} == expected
    json.dumps(config)


def test_settings_left_out_have_llama_cpps_defaults(tmp_path):
    write(
        tmp_path / "m.gguf",
        tensors=hf_tensors(kv=N),
        skip=("attention.head_count_kv", "rope.freq_base"),
    )
    config = gguf.read(tmp_path / "m.gguf").config
    assert config["num_key_value_heads"] == N and config["rope_theta"] == 10_000.0


def test_a_head_size_of_its_own(tmp_path):
    meta = {"attention.key_length": 8, "attention.value_length": 8, "rope.dimension_count": 8}
    write(tmp_path / "m.gguf", tensors=hf_tensors(size=8), meta=meta)
    assert gguf.read(tmp_path / "m.gguf").config["head_dim"] == 8


def llama3_factors(size=H, theta=1e6, factor=8.0, low=1.0, high=4.0, context=8192):
    """As llama.cpp's converter computes them, frequency by frequency."""
    factors = []
    for i in range(0, size, 2):
        wavelength = 2 * np.pi * theta ** (i / size)
        if wavelength < context / high:
            factors.append(1.0)
        elif wavelength > context / low:
            factors.append(factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


def test_llama_3s_scaling_is_recognised(tmp_path):
    write(tmp_path / "m.gguf", tensors=hf_tensors() | {"rope_freqs.weight": llama3_factors()})
    found = gguf.read(tmp_path / "m.gguf")
    assert found.config["rope_scaling"] == {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    assert "rope_freqs.weight" not in found.shapes()


# ------------------------------------------------------------------------------------------------------ the tokenizer


def test_tokenizer_files(tmp_path):
    write(tmp_path / "m.gguf", chat_template=TEMPLATE, add_bos_token=True, padding_token_id=10)
    files = gguf.read(tmp_path / "m.gguf").tokenizer_files()
    tok = tokenizers.Tokenizer.from_str(files["tokenizer.json"])
    assert tok.encode("ab ab12<think><|end|>").ids == [
        11,
        7,
        9,
        4,
        5,
        12,
        10,
    ]  # bos first, digits one by one
    assert (
        tok.decode([7, 9, 12, 10]) == "ab ab<think>"
    )  # control tokens are special, those of the user are not
    assert (
        tok.get_vocab_size(with_added_tokens=True) == 13
    )  # the row that pads the embedding is no token
    settings = json.loads(files["tokenizer_config.json"])
    assert (settings["bos_token"], settings["eos_token"], settings["pad_token"]) == (
        "<|user|>",
        "<|end|>",
        "<|end|>",
    )
    assert settings["chat_template"] == TEMPLATE and settings["add_bos_token"] is True
    assert json.loads(files["generation_config.json"]) == {"bos_token_id": 11, "eos_token_id": 10}


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "qwen2", "deepseek-r1-qwen", "llama-bpe"])
def test_words_are_cut_as_the_model_learned_them(tmp_path, pre):
    write(tmp_path / "m.gguf", pre=pre)
    files = gguf.read(tmp_path / "m.gguf").tokenizer_files()
    cut = tokenizers.Tokenizer.from_str(files["tokenizer.json"]).pre_tokenizer
    numbers = [word for word, _ in cut.pre_tokenize_str("x 12345") if "1" in word or "4" in word]
    expected = {"gpt-2": ["Ġ12345"], "llama-bpe": ["123", "45"]}.get(pre, ["1", "4"])
    assert numbers == expected
    assert json.loads(files["tokenizer_config.json"])["add_bos_token"] is (pre == "llama-bpe")


def test_several_ends(tmp_path):
    write(tmp_path / "m.gguf", eot_token_id=11)
    files = gguf.read(tmp_path / "m.gguf").tokenizer_files()
    assert json.loads(files["generation_config.json"])["eos_token_id"] == [10, 11]


# ---------------------------------------------------------------------------------------------------------- bad files


def bad_nothing(path):
    path.unlink()
    return "m.gguf: expected a GGUF file, found none"


def bad_magic(path):
    path.write_bytes(b"PK\3\4" + path.read_bytes()[4:])
    return "found b'PK"


def bad_empty(path):
    path.write_bytes(b"")
    return "expected a GGUF file"


def bad_version(path):
    content = bytearray(path.read_bytes())
    content[4:8] = struct.pack("<I", 99)
    path.write_bytes(content)
    return "truncated or damaged"


def bad_counts(path):
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack("<Q", 2**62)
    path.write_bytes(content)
    return "truncated or damaged"


def bad_array_length(path):
    content = path.read_bytes()
    at = content.index(b"tokenizer.ggml.token_type") + len(b"tokenizer.ggml.token_type") + 8
    path.write_bytes(content[:at] + struct.pack("<Q", 2**60) + content[at + 8 :])
    return "truncated or damaged"


def bad_header_only(path):
    path.write_bytes(path.read_bytes()[:200])
    return "truncated or damaged"


def bad_half(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return "truncated or damaged"


def bad_last_bytes(path):
    path.write_bytes(path.read_bytes()[:-100])
    return "truncated or damaged"


def bad_architecture(path):
    write(path, "gemma3")
    return "expected the architecture llama or qwen2, found 'gemma3'"


def bad_type(path):
    tensors = hf_tensors()
    tensors["model.norm.weight"] = np.zeros(D, np.int32)
    out = library.GGUFWriter(path, "llama")
    for key, value in {
        "block_count": 1,
        "context_length": 8,
        "embedding_length": D,
        "feed_forward_length": F,
    }.items():
        out.add_uint32(f"llama.{key}", value)
    out.add_uint32("llama.attention.head_count", N)
    out.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    out.add_tensor("token_embd.weight", np.zeros((4, D), np.int32))
    out.add_tensor("blk.0.attn_norm.weight", np.zeros(D, np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return "tensor token_embd.weight: expected F32, F16, BF16 or a quantised type.* found I32"


def bad_no_layers_key(path):
    write(path, skip=("block_count",))
    return "metadata llama.block_count: expected a number, found no such key"


def bad_no_eps(path):
    write(path, skip=("attention.layer_norm_rms_epsilon",))
    return "metadata llama.attention.layer_norm_rms_epsilon: expected a number"


def bad_zero_heads(path):
    write(path, meta={"attention.head_count": 0})
    return "metadata llama.attention.head_count: expected a positive integer, found 0"


def bad_heads_per_layer(path):
    write(path, meta={"attention.head_count": [4, 4]})
    return "metadata llama.attention.head_count: expected one number"


def bad_text_for_number(path):
    write(path, meta={"embedding_length": "wide"})
    return "metadata llama.embedding_length: expected a positive integer, found 'wide'"


def bad_experts(path):
    write(path, meta={"expert_count": 8})
    return "metadata llama.expert_count: expected none, found 8: not supported"


def bad_window(path):
    write(path, "qwen2", meta={"attention.sliding_window": 4096})
    return "attention.sliding_window: expected none, found 4096"


def bad_scaling(path):
    write(path, meta={"rope.scaling.type": "yarn"})
    return "rope.scaling.type: expected none, found 'yarn'"


def bad_freqs(path):
    write(
        path,
        tensors=hf_tensors() | {"rope_freqs.weight": np.linspace(1, 5, H // 2, dtype=np.float32)},
    )
    return "rope_freqs.weight: expected Llama 3's RoPE scaling"


def bad_partial_rotation(path):
    write(path, meta={"attention.key_length": 16, "rope.dimension_count": 8})
    return "rope.dimension_count: expected the head dimension 16, found 8"


def bad_value_length(path):
    write(path, meta={"attention.value_length": 32})
    return "attention.value_length: expected that of the keys"


def bad_missing_layer(path):
    write(path, tensors={k: v for k, v in hf_tensors().items() if ".layers.1." not in k})
    return "expected tensors of 2 layers, as block_count says, found those of 1"


def bad_extra_tensor(path):
    write(path, tensors=hf_tensors() | {"blk.0.attn_q_norm.weight": np.ones(H, np.float32)})
    return "tensor blk.0.attn_q_norm.weight: expected one of a llama model"


def bad_no_embedding(path):
    write(path, tensors={k: v for k, v in hf_tensors().items() if "embed" not in k})
    return "tensor token_embd.weight: expected the embedding"


BAD = [value for name, value in list(globals().items()) if name.startswith("bad_")]


@pytest.mark.parametrize("damage", BAD, ids=lambda damage: damage.__name__)
def test_bad_files_end_in_one_line(tmp_path, damage):
    path = tmp_path / "m.gguf"
    write(path)
    expected = damage(path)
    with pytest.raises(CourseError, match=expected) as error:
        found = gguf.read(path)
        for name in found.shapes():
            found.tensor(name)
    assert "\n" not in str(error.value) and str(error.value).startswith("m.gguf: ")


TOKENIZER_FAULTS = {
    "sentencepiece": ({"model": "llama"}, "tokenizer.ggml.model: expected gpt2 .*found 'llama'"),
    "unknown-pre": (
        {"pre": "deepseek-v3"},
        "tokenizer.ggml.pre: expected one of gpt-2, .*found 'deepseek-v3'",
    ),
    "no-tokens": ({"tokens": None}, "expected tokenizer.ggml.tokens and tokenizer.ggml.merges"),
    "no-merges": ({"merges": None}, "expected tokenizer.ggml.tokens and tokenizer.ggml.merges"),
    "strange-merge": ({"merges": ["a q"]}, "tokenizer.ggml.merges: expected pairs of known tokens"),
    "merge-of-one": ({"merges": ["ab"]}, "tokenizer.ggml.merges: expected pairs of known tokens"),
    "short-types": ({"token_type": [1, 1, 3]}, "expected different tokens, a type for each"),
    "same-tokens": ({"tokens": ["a"] * 14}, "expected different tokens, a type for each"),
    "eos-outside": (
        {"eos_token_id": 99},
        "tokenizer.ggml.eos_token_id: expected below 13, found 99",
    ),
}


@pytest.mark.parametrize("case", TOKENIZER_FAULTS)
def test_bad_tokenizers_end_in_one_line(tmp_path, case):
    settings, expected = TOKENIZER_FAULTS[case]
    write(tmp_path / "m.gguf", **({"pre": "smollm"} | settings))
    found = gguf.read(tmp_path / "m.gguf")
    with pytest.raises(CourseError, match=expected) as error:
        found.tokenizer_files()
    assert "\n" not in str(error.value)


def test_a_name_it_does_not_have(tmp_path):
    write(tmp_path / "m.gguf")
    with pytest.raises(
        CourseError, match="tensor lm_head.weight: expected one of 20, found no such tensor"
    ):
        gguf.read(tmp_path / "m.gguf").tensor("lm_head.weight")


def test_any_cut_and_any_changed_byte_is_met_with_one_line(tmp_path):
    path = tmp_path / "m.gguf"
    write(path)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    head = (
        whole.index(b"model") + 2500
    )  # settings, tokenizer and the list of tensors; after that come weights
    damaged = [whole[:n] for n in rng.integers(1, len(whole) - 64, 60)]
    for at in rng.integers(4, head, 150):
        damaged.append(whole[:at] + bytes([whole[at] ^ (1 << rng.integers(8))]) + whole[at + 1 :])
    for number, content in enumerate(damaged):
        path.write_bytes(content)
        try:
            found = gguf.read(path)
            found.tokenizer_files()
            [found.tensor(name) for name in found.shapes()]
            assert number >= 60, (
                f"a file cut at {len(content)} of {len(whole)} bytes was taken for whole"
            )
        except CourseError as error:
            assert "\n" not in str(error)
