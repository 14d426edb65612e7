"""Train the weights kept in utils/course/assets/minigpt: chapter 04 for longer, and larger.

    COURSE_MIRROR=... python tools/train_minigpt.py --directory /somewhere/run

Twice the depth and twice the context of the chapter's `cpu` model, several passes over the stories,
and Muon (Jordan et al. 2024) in place of AdamW for the matrices of the blocks: on so small a model
it reaches the same loss in about two thirds of the steps. The run can be killed and started again.
The result is written with its provenance: data, device, versions, seconds, and the score on all
validation stories.
"""

import argparse
import datetime
import os
import platform
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import flax
import jax
import numpy as np
import optax
from flax import nnx
from jax.tree_util import keystr, tree_map_with_path

from utils import minigpt, train
from utils.course import pretrained, sources, tokenizer
from utils.data import corpus, packing
from utils.evaluation import perplexity


def muon(
    learning_rate, weight_decay: float, max_grad_norm: float = 1.0
) -> optax.GradientTransformation:
    """Muon for the blocks' matrices (stacked: axis 0 is the layer), AdamW for embeddings and norms."""

    def dimensions(params):
        kernel = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
        return tree_map_with_path(
            lambda path, _: kernel if "kernel" in keystr(path) else None, params
        )

    optimizer = optax.contrib.muon(
        learning_rate,
        adam_b2=0.98,
        weight_decay=weight_decay,
        adam_weight_decay=weight_decay,
        muon_weight_dimension_numbers=dimensions,
    )
    return optax.chain(optax.clip_by_global_norm(max_grad_norm), optimizer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--directory", required=True, help="where checkpoints go, outside the repository"
    )
    parser.add_argument("--out", default=pretrained.MINIGPT, help="where the weights go")
    parser.add_argument("--steps", type=int, default=16_000)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-position-embeddings", type=int, default=256)
    parser.add_argument("--hidden-size", type=int, default=144)
    parser.add_argument("--num-hidden-layers", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    args = parser.parse_args()

    tok = tokenizer.get("stories2048")
    stories, held_out = sources.tinystories("train"), sources.tinystories("validation")
    rows = corpus.encode(stories.texts, tok)
    config = minigpt.Config(
        vocab_size=tok.n_vocab,
        max_position_embeddings=args.max_position_embeddings,
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_hidden_layers,
        intermediate_size=4 * args.hidden_size,
    )
    model = minigpt.MiniGPT(config, rngs=nnx.Rngs(0))
    print(f"{config.count_parameters()['total']:,} parameters", flush=True)
    history = train.fit(
        model,
        packing.batches(rows, config.max_position_embeddings, args.batch_size, eot=tok.eot_token),
        train.next_token_loss,
        muon(train.schedule(args.learning_rate, args.steps), args.weight_decay),
        steps=args.steps,
        directory=args.directory,
        save_every=1000,
        evaluate=lambda m: (
            perplexity.bits_per_character(m, tok, held_out.texts[:100]).bits_per_character
        ),
        evaluate_every=2000,
    )
    print(history.evaluations)
    pretrained.save(model, Path(args.directory) / "float16", dtype=np.float16)
    model = pretrained.load(
        Path(args.directory) / "float16"
    )  # score what is kept: the rounded weights
    score = perplexity.bits_per_character(model, tok, held_out.texts)
    tokens = args.steps * args.batch_size * config.max_position_embeddings
    provenance = {
        "made_by": "tools/train_minigpt.py",
        "data": f"TinyStories (Eldan and Li 2023, CDLA-Sharing-1.0), {len(rows):,} stories",
        "tokens": tokens,
        "epochs": round(tokens / sum(len(row) + 1 for row in rows), 2),
        "steps": args.steps,
        "batch": [args.batch_size, config.max_position_embeddings],
        "optimizer": f"Muon and AdamW, peak {args.learning_rate}, weight decay {args.weight_decay}",
        "seconds": round(history.seconds),
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, {platform.machine()}",
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "flax": flax.__version__,
        },
        "date": datetime.date.today().isoformat(),
        "validation": {
            "stories": len(held_out.texts),
            "bits_per_character": round(score.bits_per_character, 4),
            "nats_per_token": round(score.nats_per_token, 4),
        },
        "licence": "weights Apache-2.0; trained on TinyStories, CDLA-Sharing-1.0",
    }
    pretrained.save(model, args.out, dtype=np.float16, provenance=provenance)
    print(provenance)


if __name__ == "__main__":
    main()
