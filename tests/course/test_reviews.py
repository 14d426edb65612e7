"""SST-2 from a mirror, damaged ones, and the reviews that the package makes itself."""

import hashlib
import json
import logging

import pytest

from utils import CourseError
from utils.course import reviews, sources


def test_built_in_reviews_are_different_balanced_and_reproducible():
    rows = reviews.generate(2_000, seed=3)
    assert rows[:50] == reviews.generate(50, seed=3) != reviews.generate(50, seed=4)
    assert (
        len({sentence for sentence, _ in rows}) == 2_000
        and sum(label for _, label in rows) == 1_000
    )
    assert len({word for sentence, _ in rows for word in sentence.split()}) > 150


def sst2_mirror(tmp_path, monkeypatch, table) -> None:
    import pyarrow
    import pyarrow.parquet

    path = (
        tmp_path
        / "m"
        / "datasets"
        / "stanfordnlp"
        / "sst2"
        / "data"
        / "validation-00000-of-00001.parquet"
    )
    path.parent.mkdir(parents=True)
    if isinstance(table, bytes):
        path.write_bytes(table)
    else:
        pyarrow.parquet.write_table(pyarrow.table(table), path)
    content = path.read_bytes()
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (tmp_path / "m" / "manifest.json").write_text(
        json.dumps({str(path.relative_to(tmp_path / "m")): entry})
    )
    monkeypatch.setenv("COURSE_MIRROR", str(tmp_path / "m"))


def test_sst2_from_the_mirror(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "utils")
    sst2_mirror(
        tmp_path, monkeypatch, {"idx": [0, 1], "sentence": ["good . ", "bad "], "label": [1, 0]}
    )
    assert sources.load_sst2("validation") == [("good .", 1), ("bad", 0)]
    assert caplog.messages == ["2 validation reviews of SST-2: mirror"]


@pytest.mark.parametrize(
    "table",
    [
        b"no parquet",
        {"text": ["good"]},
        {"sentence": ["good"], "label": [-1]},
        {"sentence": ["good"], "label": ["x"]},
        {"sentence": [None], "label": [1]},
        {"sentence": [], "label": []},
    ],
    ids=[
        "no parquet",
        "other columns",
        "no label",
        "words for labels",
        "empty cell",
        "empty table",
    ],
)
def test_a_damaged_sst2_ends_in_one_line(tmp_path, monkeypatch, table):
    sst2_mirror(tmp_path, monkeypatch, table)
    with pytest.raises(CourseError, match="validation-00000-of-00001.parquet: expected") as error:
        sources.load_sst2("validation")
    assert "\n" not in str(error.value)


def test_another_split():
    with pytest.raises(CourseError, match="split: expected train or validation, found 'test'"):
        sources.load_sst2("test")
