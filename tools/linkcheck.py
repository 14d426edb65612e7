"""Ask every link to another site whether it still answers (`make linkcheck`, weekly on GitHub).

Needs the network, so it is no part of `make check` or `make test`. A link counts as dead when its
server answers 404 or 410, or when no server answers in three tries; a server that refuses robots
(403, 429 and the like) is not held against the link.
"""

import re
import sys
import time
import urllib.error
import urllib.request
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools import check, pairs

AGENT = {"User-Agent": "Mozilla/5.0 (link check of a course; one request a link a week)"}
DEAD = {404, 410}


def external_links(root: Path) -> dict[str, list[str]]:
    """Address -> the places (file:line) that link to it; this repository's own address is left out."""
    own = pairs.settings(root)
    links = defaultdict(list)
    for page in [*check.pages(root), root / "book" / "references.bib"]:
        if not page.exists():
            continue
        text = page.read_text(encoding="utf-8")
        text = text if page.suffix == ".bib" else check.prose(text)
        for match in re.finditer(r"https?://[^\s<>\"'`\]}]+", text):
            url = match.group().rstrip(".,;:*_")
            while url.endswith(")") and url.count(")") > url.count("("):
                url = url[:-1]
            url = url.partition("#")[0]
            ours = own.repository.removeprefix("https://github.com/") in url or url.startswith(
                own.website
            )
            if not ours and not re.match(r"https?://(127\.0\.0\.1|localhost|example\.)", url):
                links[url].append(
                    f"{page.relative_to(root)}:{text.count(chr(10), 0, match.start()) + 1}"
                )
    return dict(links)


def verdict(url: str, tries: int = 3, pause: float = 5.0, timeout: float = 20.0) -> str:
    """ "" when the link is alive, else why it is not."""
    why = ""
    for attempt in range(tries):
        if attempt:
            time.sleep(pause)
        try:
            with urllib.request.urlopen(
                urllib.request.Request(url, headers=AGENT), timeout=timeout
            ):
                return ""
        except urllib.error.HTTPError as error:
            if error.code in DEAD:
                return f"answers {error.code}"
            if error.code < 500:
                return ""
            why = f"answers {error.code}"
        except (OSError, ValueError) as error:
            why = str(getattr(error, "reason", error)) or type(error).__name__
    return why


def main() -> int:
    """Status 0: all alive; 1: dead links, one a line with the places that hold them."""
    links = external_links(pairs.ROOT)
    with ThreadPoolExecutor(8) as pool:
        verdicts = dict(zip(links, pool.map(verdict, links)))
    dead = {url: why for url, why in verdicts.items() if why}
    for url, why in dead.items():
        print(f"{url}: {why} (in {', '.join(links[url])})")
    print(f"{len(links)} links, {len(dead)} dead")
    return 1 if dead else 0


if __name__ == "__main__":
    sys.exit(main())
