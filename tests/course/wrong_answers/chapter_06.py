"""Wrong answers to the exercises of chapter 6, each with the name under which its check must recognise it."""

WRONG = {
    "6.1": [
        (
            "half-the-smaller-side",
            """
def break_even(inside, outside):
    return min(inside, outside) // 2
""",
        ),
        (
            "rounded-up",
            """
def break_even(inside, outside):
    return -(-inside * outside // (inside + outside))
""",
        ),
        (
            "only-one-factor",
            """
def break_even(inside, outside):
    return min(inside * outside // inside, inside * outside // outside)
""",
        ),
        (
            "not-a-whole-number",
            """
def break_even(inside, outside):
    return inside * outside / (inside + outside)
""",
        ),
    ],
    "6.2": [
        (
            "rounded-down",
            """
def samples_needed(p, half):
    return int(p * (1 - p) * (1.96 / half) ** 2)
""",
        ),
        (
            "not-squared",
            """
def samples_needed(p, half):
    return math.ceil(p * (1 - p) * 1.96 / half)
""",
        ),
        (
            "worst-case-rate",
            """
def samples_needed(p, half):
    return math.ceil(0.25 * (1.96 / half) ** 2)
""",
        ),
        (
            "whole-width",
            """
def samples_needed(p, half):
    return math.ceil(p * (1 - p) * (1.96 / (2 * half)) ** 2)
""",
        ),
    ],
    "6.3": [
        (
            "factors-added",
            """
def add_adapters(first, second):
    (A1, B1, s1), (A2, B2, s2) = first, second
    return A1 + A2, s1 * B1 + s2 * B2, 1.0
""",
        ),
        (
            "scale-forgotten",
            """
def add_adapters(first, second):
    (A1, B1, s1), (A2, B2, s2) = first, second
    return np.concatenate([A1, A2]), np.concatenate([B1, B2], axis=1), 1.0
""",
        ),
        (
            "one-scale-for-both",
            """
def add_adapters(first, second):
    (A1, B1, s1), (A2, B2, s2) = first, second
    return np.concatenate([A1, A2]), np.concatenate([B1, B2], axis=1), s1
""",
        ),
        (
            "scale-twice",
            """
def add_adapters(first, second):
    (A1, B1, s1), (A2, B2, s2) = first, second
    return np.concatenate([s1 * A1, s2 * A2]), np.concatenate([s1 * B1, s2 * B2], axis=1), 1.0
""",
        ),
        (
            "paired-with-the-wrong-factor",
            """
def add_adapters(first, second):
    (A1, B1, s1), (A2, B2, s2) = first, second
    return np.concatenate([A2, A1]), np.concatenate([s1 * B1, s2 * B2], axis=1), 1.0
""",
        ),
    ],
    "6.4": [
        (
            "any-question",
            """
def ends_with_question(story):
    return "?" in story
""",
        ),
        (
            "closing-quote-missed",
            """
def ends_with_question(story):
    return story.strip().endswith("?")
""",
        ),
        (
            "white-space-missed",
            """
def ends_with_question(story):
    return story.endswith(("?", '?"'))
""",
        ),
        (
            "empty-text",
            """
def ends_with_question(story):
    return story.rstrip(' \\n"')[-1:] in "?"
""",
        ),
    ],
    "6.5": [
        (
            "alpha-kept",
            """
def same_scale_alpha(rank, alpha, new_rank, use_rslora):
    return alpha
""",
        ),
        (
            "inverted",
            """
def same_scale_alpha(rank, alpha, new_rank, use_rslora):
    return alpha * rank / new_rank
""",
        ),
        (
            "no-square-root",
            """
def same_scale_alpha(rank, alpha, new_rank, use_rslora):
    return alpha * new_rank / rank
""",
        ),
    ],
}
