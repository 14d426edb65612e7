"""Wrong answers to the exercises of chapter 1, each with the name under which its check must recognise it."""

WRONG = {
    "1.1": [
        ("not-recounted", 'first_three = ["in", "ng", "nk"]'),
        ("words-counted-once", 'first_three = ["in", "ing", "sing"]'),
        ("words-counted-once", 'first_three = ["in", "ing", "ings"]'),
        ("order-swapped", 'first_three = ["in", "ink", "ing"]'),
    ],
    "1.2": [
        (
            "mean-of-ratios",
            """
def characters_per_token(tok, texts):
    return np.mean([len(text) / len(tok.encode_ordinary(text)) for text in texts])
""",
        ),
        (
            "bytes-not-characters",
            """
def characters_per_token(tok, texts):
    return sum(len(text.encode()) for text in texts) / sum(len(tok.encode_ordinary(text)) for text in texts)
""",
        ),
        (
            "upside-down",
            """
def characters_per_token(tok, texts):
    return sum(len(ids) for ids in corpus.encode(texts, tok)) / sum(map(len, texts))
""",
        ),
    ],
    "1.3": [
        (
            "share-of-the-rest",
            """
def largest_vocabulary(hidden_size, rest, share):
    return int(share * rest / hidden_size)
""",
        ),
        (
            "over-the-limit",
            """
def largest_vocabulary(hidden_size, rest, share):
    return int(np.ceil(share * rest / ((1 - share) * hidden_size)))
""",
        ),
        (
            "parameters-not-rows",
            """
def largest_vocabulary(hidden_size, rest, share):
    return int(share * rest / (1 - share))
""",
        ),
    ],
    "1.4": [
        (
            "long-stories-not-cut",
            """
def padding_cost(lengths, context):
    positions = len(lengths) * context
    return 1 - np.sum(lengths) / positions, 0.0
""",
        ),
        (
            "dropped-over-positions",
            """
def padding_cost(lengths, context):
    lengths = np.asarray(lengths)
    positions = len(lengths) * context
    cut = np.maximum(lengths - context, 0).sum()
    return 1 - np.minimum(lengths, context).sum() / positions, cut / positions
""",
        ),
        (
            "mean-over-stories",
            """
def padding_cost(lengths, context):
    lengths = np.asarray(lengths)
    kept_tokens = np.minimum(lengths, context)
    return np.mean(1 - kept_tokens / context), np.mean(1 - kept_tokens / lengths)
""",
        ),
    ],
    "1.5": [
        (
            "end-never-learned",
            """
def training_row(tokens, segment_ids):
    same = segment_ids[:-1] == segment_ids[1:]
    return tokens[:-1], tokens[1:], same & (segment_ids[:-1] > 0)
""",
        ),
        (
            "end-never-learned",
            """
def training_row(tokens, segment_ids):
    return tokens[:-1], tokens[1:], tokens[1:] != tokens[0]
""",
        ),
        (
            "last-end-lost",
            """
def training_row(tokens, segment_ids):
    return tokens[:-1], tokens[1:], segment_ids[1:] > 0
""",
        ),
        (
            "padding-learned",
            """
def training_row(tokens, segment_ids):
    return tokens[:-1], tokens[1:], np.ones(len(tokens) - 1, bool)
""",
        ),
        (
            "targets-not-shifted",
            """
def training_row(tokens, segment_ids):
    return tokens[:-1], tokens[:-1], segment_ids[:-1] > 0
""",
        ),
    ],
    "1.6": [
        (
            "half-characters",
            """
def stream(tok, ids):
    for i in ids:
        yield tok.decode([i])
""",
        ),
        (
            "characters-lost",
            """
def stream(tok, ids):
    for i in ids:
        yield tok.decode_single_token_bytes(i).decode("utf-8", errors="ignore")
""",
        ),
        (
            "waits-for-the-end",
            """
def stream(tok, ids):
    yield tok.decode(list(ids))
""",
        ),
        (
            "late",
            """
def stream(tok, ids):
    held = b""
    for i in ids:
        held += tok.decode_single_token_bytes(i)
        try:
            text = held.decode("utf-8")
        except UnicodeDecodeError:
            yield ""
            continue
        held = b""
        yield text
    yield held.decode("utf-8", errors="replace")
""",
        ),
        (
            "end-forgotten",
            """
def stream(tok, ids):
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for i in ids:
        yield decoder.decode(tok.decode_single_token_bytes(i))
""",
        ),
    ],
}
