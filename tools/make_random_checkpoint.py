"""Make a checkpoint of a real model's size with random weights, to try loading, memory and speed
without a download.

    python tools/make_random_checkpoint.py --like R1 /somewhere/r1-random     # 3.55 GB of bfloat16

`random_checkpoint.save` on the command line. The folder is a Hugging Face model folder without a tokenizer.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import CourseError
from utils.course import random_checkpoint
from utils.transformer import Config

R1 = Config(  # deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B
    model_type="qwen2",
    vocab_size=151_936,
    hidden_size=1536,
    num_hidden_layers=28,
    num_attention_heads=12,
    num_key_value_heads=2,
    head_dim=128,
    intermediate_size=8960,
    max_position_embeddings=131_072,
    rope_theta=10_000.0,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
    attention_bias=True,
    bos_token_id=151_643,
    eos_token_id=(151_643,),
    dtype="bfloat16",
)
SMOLLM2 = Config(  # HuggingFaceTB/SmolLM2-135M-Instruct
    model_type="llama",
    vocab_size=49_152,
    hidden_size=576,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    intermediate_size=1536,
    max_position_embeddings=8192,
    rope_theta=100_000.0,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    attention_bias=False,
    bos_token_id=1,
    eos_token_id=(2,),
    dtype="bfloat16",
)
LIKE = {"R1": R1, "SmolLM2": SMOLLM2}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--like", choices=LIKE, default="R1")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        random_checkpoint.save(LIKE[args.like], args.directory, seed=args.seed)
    except CourseError as error:
        print(error, file=sys.stderr)
        return 2
    size = (args.directory / "model.safetensors").stat().st_size
    print(f"{args.directory}: {size / 1e9:.2f} GB of random bfloat16 in the shapes of {args.like}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
