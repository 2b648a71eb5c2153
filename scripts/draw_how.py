"""Draws docs/how.svg: from a key to its code, the page, the scores and the selected tokens.

    python scripts/draw_how.py [--check]

Codes, scores and selected tokens are those of the reference for sixteen keys of whole numbers, so the picture is
the same on every machine. With --check nothing is written; the exit status is 1 when the picture differs.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from vllm_adamas.backends.reference.signature import (
    bucketize,
    code_scale,
    dot_score,
    hadamard,
    quantize_query,
    thresholds,
)
from vllm_adamas.config import AdamasConfig

PICTURE = Path(__file__).parent.parent / "docs" / "how.svg"
TOKENS = SIZE = 16
BUDGET = 4  #: tokens, for the picture
ROW = 10  #: height of a token's row in the page
TOP = 262  #: of the page
STAGES = 7
SECONDS = 14
#: Left edge and width of each plane of the page.
PLANES = {"K": (40, 240), "V": (290, 240), "hi": (540, 112), "lo": (662, 112), "scale": (784, 34)}
SCORES, LONGEST = 838, 100  #: left edge of the bars of the scores, and the length of the longest

STYLE = """
svg { --paper: #fff; --ink: #1f2430; --soft: #5b6475; --line: #c3c9d4; --plane: #eef1f6; --key: #2f6fde;
  --query: #b4480f; --bit: #55607a; --best: #0f8a5f; font: 14px system-ui, "Segoe UI", Roboto, sans-serif }
@media (prefers-color-scheme: dark) { svg { --paper: #1b1e27; --ink: #eceff5; --soft: #a9b2c3; --line: #4a5163;
  --plane: #272c38; --key: #74a7ff; --query: #ffa066; --bit: #aab4ca; --best: #45d3a0 } }
.paper { fill: var(--paper); stroke: var(--line) } .plane { fill: var(--plane); stroke: var(--line) }
text { fill: var(--ink) } .soft { fill: var(--soft); font-size: 13px } .step { font-weight: 600 }
.key { fill: var(--key) } .query { fill: var(--query) } .bit { fill: var(--bit) } .best { fill: var(--best) }
.axis { stroke: var(--soft); fill: none } .limit { stroke: var(--soft); stroke-dasharray: 3 3; fill: none }
.arrow { stroke: var(--soft); stroke-width: 1.5; fill: none; marker-end: url(#head) } #head { fill: var(--soft) }
"""


def animation() -> str:
    """Each stage appears in its turn and stays; without motion all of them are there."""
    rules = []
    for stage in range(1, STAGES + 1):
        at = round(90 * (stage - 1) / STAGES)
        rules.append(
            f"@keyframes s{stage} {{ 0%, {at}% {{ opacity: .3 }} {at + 5}%, 97% {{ opacity: 1 }} "
            f"100% {{ opacity: .3 }} }}\n.s{stage} {{ animation: s{stage} {SECONDS}s infinite }}"
        )
    inner = "\n".join(rules)
    return f"@media (prefers-reduced-motion: no-preference) {{\n{inner}\n}}\n"


def integers(seed: int) -> torch.Tensor:
    """Whole numbers of -7 to 7, ``[SIZE]``, by a congruential generator: the same everywhere."""
    values = []
    for _ in range(SIZE):
        seed = (1103515245 * seed + 12345) % 2**31
        values.append((seed >> 16) % 15 - 7)
    return torch.tensor(values, dtype=torch.float32)


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{words}</text>'


def box(x: float, y: float, width: float, height: float, kind: str) -> str:
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="1" class="{kind}"/>'
    )


def arrow(*points: tuple[float, float]) -> str:
    return f'<path class="arrow" d="M{" L".join(f"{x:g} {y:g}" for x, y in points)}"/>'


def bars(x: float, y: float, values: torch.Tensor, unit: float, kind: str) -> list[str]:
    """Values as bars of 7 pixels from an axis at height ``y``, ``unit`` pixels each."""
    drawn = [f'<path class="axis" d="M{x:g} {y:g} h{10 * len(values)}"/>']
    for at, value in enumerate(values.tolist()):
        height = round(abs(value) * unit, 1)
        drawn.append(box(x + 10 * at + 1, y - height if value > 0 else y, 7, height, kind))
    return drawn


def stage(number: int, *parts: str | list[str]) -> str:
    inner = "\n".join(part if isinstance(part, str) else "\n".join(part) for part in parts)
    return f'<g class="s{number}">\n{inner}\n</g>'


def row(token: int) -> float:
    return TOP + ROW * token


def draw() -> str:
    keys = torch.stack([integers(seed) for seed in range(3, 3 + TOKENS)])  # [L, D]
    query = keys[4] + keys[9] - keys[12]  # [D]
    coding = AdamasConfig().coding(SIZE)
    turned = hadamard(keys)  # [L, D]
    codes = bucketize(turned, coding)  # [L, D]
    scales = code_scale(turned, codes)  # [L]
    scores = dot_score(hadamard(query), codes, scales)  # [L]
    best = sorted(scores.topk(BUDGET).indices.tolist())
    last = TOKENS - 1
    limit = float(thresholds(turned[last], coding)) * 5

    shown = [
        text(40, 34, "When a token is cached", "step"),
        text(600, 34, "When a token is generated", "step"),
    ]
    shown.append(
        stage(
            1,
            text(40, 60, "1  key"),
            bars(40, 122, keys[last], 6, "key"),
            arrow((205, 122), (226, 122)),
        )
    )
    shown.append(
        stage(
            2,
            text(230, 60, "2  Hadamard transform"),
            bars(230, 122, turned[last], 5, "key"),
            *(f'<path class="limit" d="M230 {122 + s * limit:.1f} h160"/>' for s in (-1, 1)),
            arrow((395, 122), (416, 122)),
        )
    )
    cells = []
    for at, code in enumerate(codes[last].tolist()):
        x, y = 420 + 17 * (at % 8), 100 + 22 * (at // 8)
        cells += [box(x, y, 15, 19, "plane"), text(x + 7.5, y + 14, str(code), "soft", "middle")]
    shown.append(
        stage(3, text(420, 60, "3  2-bit codes"), text(420, 80, "0 to 3 per value", "soft"), cells)
    )

    shown.append(text(40, TOP - 30, "Page: one block of one KV head", "step"))
    for name, (x, width) in PLANES.items():
        shown += [text(x, TOP - 8, name, "soft"), box(x, TOP, width, ROW * TOKENS, "plane")]
    written = []
    for token in range(TOKENS):
        y = row(token)
        bits = []
        for name, shift in (("hi", 1), ("lo", 0)):
            for at, code in enumerate(codes[token].tolist()):
                if code >> shift & 1:
                    bits.append(box(PLANES[name][0] + 7 * at + 0.5, y + 1, 6, ROW - 2, "bit"))
        bits.append(box(PLANES["scale"][0] + 12, y + 2, 10, ROW - 4, "bit"))
        written += bits if token < last else []
    shown += written
    new = [box(PLANES[name][0], row(last), PLANES[name][1], ROW, "key") for name in ("K", "V")]
    shown.append(
        stage(
            4,
            text(420, 172, "4  append to the page"),
            arrow((488, 180), (488, 206), (592, 206), (592, 238)),
            new,
            bits,
        )
    )

    integer = quantize_query(hadamard(query))[0]
    lengths = [max(0.0, score) * LONGEST / float(scores.max()) for score in scores.tolist()]
    drawn = [
        box(SCORES, row(at) + 2, round(n, 1), ROW - 4, "query") for at, n in enumerate(lengths)
    ]
    shown.append(
        stage(
            5,
            text(600, 60, "5  query: Hadamard transform, 4 bits per value"),
            text(600, 80, "compared with every code, not with the keys", "soft"),
            bars(600, 140, integer, 6, "query"),
            arrow((770, 140), (SCORES + 20, 140), (SCORES + 20, TOP - 28)),
            text(SCORES, TOP - 8, "score", "soft"),
            drawn,
        )
    )
    marks = [
        box(SCORES, row(token) + 1, round(lengths[token], 1), ROW - 2, "best") for token in best
    ]
    bottom = row(TOKENS)
    shown.append(
        stage(6, text(SCORES - 54, bottom + 30, f"6  top-k: here {BUDGET} of {TOKENS}"), marks)
    )
    rows = [
        box(PLANES[name][0], row(token), PLANES[name][1], ROW, "best")
        for name in ("K", "V")
        for token in best
    ]
    shown.append(
        stage(
            7,
            rows,
            arrow((160, bottom + 4), (160, bottom + 46)),
            arrow((410, bottom + 4), (410, bottom + 46)),
            text(
                40,
                bottom + 66,
                "7  attend: exact softmax over the K and V of the selected tokens alone",
            ),
            text(40, bottom + 86, "The other rows of K and V are not read in this step.", "soft"),
        )
    )
    body = "\n".join(shown)
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 960 530" role="img" aria-labelledby="title">
<title id="title">A key is transformed, coded in 2 bits per value and stored in the page beside K and V. A query is
compared with all codes, the best tokens are selected, and attention reads their K and V alone.</title>
<style>{STYLE}{animation()}</style>
<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">
<path d="M0 0 L8 4 L0 8 z"/></marker></defs>
<rect x="1" y="1" width="958" height="528" rx="10" class="paper"/>
{body}
</svg>
"""


if __name__ == "__main__":
    drawn = draw()
    if "--check" in sys.argv:
        sys.exit(int(PICTURE.read_text() != drawn))
    PICTURE.write_text(drawn)
