"""Built-in stories (rough)."""

import random


def generate(n: int, seed: int = 0) -> list[str]:
    """n stories."""
    rng = random.Random(seed)
    names = ["Lily", "Tom", "Mia", "Ben"]
    things = ["ball", "kite", "hat", "book", "cup"]
    return [
        f"Once upon a time there was a child named {rng.choice(names)}. The child lost a {rng.choice(things)} on day "
        f"{rng.randrange(10**6)}. A friend found it. They were happy."
        for _ in range(n)
    ]
