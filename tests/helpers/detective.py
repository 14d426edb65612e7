"""The port detective's rule in Python: which probes tell two bugs apart."""


def separates(probe: dict, one: dict, other: dict) -> bool:
    """Readings of another kind; or values, when they are texts that differ or numbers a factor of two apart."""
    a, b = one["results"][probe["id"]], other["results"][probe["id"]]
    if probe["told_apart_by"] == "reading":
        return a["reading"] != b["reading"]
    a, b = a["value"], b["value"]
    if isinstance(a, str) or isinstance(b, str):
        return a != b
    small, large = sorted((abs(a), abs(b)))
    return large > 0 and (large >= 2 * small or a * b < 0)
