"""`config.json`: read in both spellings, written again, and refused by name where the model is not computed here."""

import json

import pytest

from tests.helpers import checkpoints
from tests.helpers.checkpoints import NAMES
from utils import CourseError, rope
from utils.hf import config as hf_config


@pytest.mark.parametrize("name", NAMES)
def test_config_goes_to_hugging_face_and_back(name):
    config = hf_config.read(checkpoints.folder_of(name))
    assert hf_config.read(hf_config.to_dict(config)) == config
    assert hash(config) == hash(hf_config.read(json.loads(json.dumps(hf_config.to_dict(config)))))


def test_configs_of_the_fixtures():
    llama = hf_config.read(checkpoints.folder_of("llama-untied-sharded"))
    assert (
        llama.model_type,
        llama.rope_theta,
        llama.num_attention_heads,
        llama.num_key_value_heads,
    ) == ("llama", 500_000, 4, 1)
    assert (llama.head_dim, llama.hidden_size, llama.tie_word_embeddings, llama.eos_token_id) == (
        12,
        32,
        False,
        (1, 2),
    )
    assert llama.rope_scaling == rope.Llama3Scaling(8, 1, 4, 128)
    old = hf_config.read(checkpoints.folder_of("llama-tied"))
    assert (old.rope_theta, old.head_dim, old.tie_word_embeddings, old.attention_bias) == (
        100_000,
        8,
        True,
        False,
    )
    assert hf_config.read(checkpoints.folder_of("llama-bf16")).dtype == "bfloat16"
    qwen = hf_config.read(checkpoints.folder_of("qwen2-untied"))
    assert (
        qwen.attention_bias,
        qwen.o_proj_bias,
        qwen.mlp_bias,
        qwen.bos_token_id,
        qwen.eos_token_id,
    ) == (True, False, False, 0, (1,))


def test_old_and_new_spelling_are_one_config():
    new = json.loads((checkpoints.folder_of("llama-untied-sharded") / "config.json").read_text())
    old = {name: value for name, value in new.items() if name not in ("rope_parameters", "dtype")}
    scaling = {
        name: value for name, value in new["rope_parameters"].items() if name != "rope_theta"
    }
    old |= {"rope_theta": 500_000.0, "rope_scaling": scaling, "torch_dtype": "float32"}
    assert hf_config.read(old) == hf_config.read(new)


def test_qwens_unused_sliding_window_is_no_reason_to_refuse():
    hf = json.loads((checkpoints.folder_of("qwen2-untied") / "config.json").read_text())
    changed = hf | {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 21}
    assert hf_config.read(changed) == hf_config.read(hf)


REFUSED = {
    "a sliding window": (
        "qwen2-untied",
        {"use_sliding_window": True, "sliding_window": 64},
        "use_sliding_window",
    ),
    "a sliding window, by layer": (
        "qwen2-untied",
        {"layer_types": ["sliding_attention"] * 3},
        "layer_types",
    ),
    "a sliding window in Llama": ("llama-tied", {"sliding_window": 64}, "sliding_window"),
    "another rope": ("llama-tied", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
    "linear rope, old spelling": (
        "llama-tied",
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        "linear",
    ),
    "another rope, new spelling": (
        "qwen2-untied",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "dynamic",
    ),
    "part of a rope": (
        "llama-untied-sharded",
        {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
        "low_freq",
    ),
    "rope scaling that is no object": ("llama-tied", {"rope_scaling": "llama3"}, "rope_scaling"),
    "rope scaling with words": (
        "llama-tied",
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": "eight",
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 128,
            }
        },
        "factor",
    ),
    "partial rotation": ("llama-tied", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "gelu": ("llama-tied", {"hidden_act": "gelu"}, "hidden_act"),
    "quantised": (
        "qwen2-untied",
        {"quantization_config": {"quant_method": "gptq"}},
        "quantization_config",
    ),
    "another architecture": ("llama-tied", {"model_type": "mistral"}, "model_type"),
    "a mixture of experts": ("qwen2-untied", {"model_type": "qwen2_moe"}, "model_type"),
    "no architecture": ("llama-tied", {"model_type": ...}, "model_type"),
    "heads that share unevenly": (
        "qwen2-untied",
        {"num_key_value_heads": 4},
        "num_attention_heads",
    ),
    "width not a multiple of heads": (
        "llama-tied",
        {"num_attention_heads": 5, "num_key_value_heads": 5},
        "hidden_size",
    ),
    "an odd head": ("qwen2-untied", {"head_dim": 15}, "head_dim"),
    "no width": ("llama-tied", {"hidden_size": ...}, "hidden_size"),
    "no layers": ("llama-tied", {"num_hidden_layers": ...}, "num_hidden_layers"),
    "zero layers": ("llama-tied", {"num_hidden_layers": 0}, "num_hidden_layers"),
    "no MLP width": ("llama-tied", {"intermediate_size": ...}, "intermediate_size"),
    "no vocabulary": ("llama-tied", {"vocab_size": ...}, "vocab_size"),
    "no eps": ("llama-tied", {"rms_norm_eps": ...}, "rms_norm_eps"),
    "eps as text": ("llama-tied", {"rms_norm_eps": "1e-6"}, "rms_norm_eps"),
    "width as text": ("llama-tied", {"hidden_size": "32"}, "hidden_size"),
    "width as a fraction": ("llama-tied", {"hidden_size": 32.5}, "hidden_size"),
    "negative rope base": ("llama-tied", {"rope_theta": -1.0}, "rope_theta"),
    "a dtype that is none": ("llama-tied", {"torch_dtype": "float7"}, "dtype"),
    "an end that is no number": ("llama-tied", {"eos_token_id": "</s>"}, "eos_token_id"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_computed_is_refused_by_name(case):
    name, changes, word = REFUSED[case]
    hf = json.loads((checkpoints.folder_of(name) / "config.json").read_text()) | changes
    with pytest.raises(CourseError) as caught:
        hf_config.read({key: value for key, value in hf.items() if value is not ...})
    message = str(caught.value)
    assert word in message and "\n" not in message and len(message) < 300


@pytest.mark.parametrize(
    "content, word", [("{", "JSON"), ("[]", "object"), ("", "JSON"), (b"\xff\xfe\x00", "JSON")]
)
def test_a_damaged_config_is_named(tmp_path, content, word):
    path = tmp_path / "config.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CourseError, match=word) as caught:
        hf_config.read(tmp_path)
    assert str(path) in str(caught.value)


def test_a_folder_without_config(tmp_path):
    with pytest.raises(CourseError, match=r"config\.json: not found"):
        hf_config.read(tmp_path)
