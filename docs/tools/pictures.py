"""Draw the pictures of docs/concepts.md:  python docs/tools/pictures.py

Plain SVG from numbers that are computed here, without a plotting library, so that the same script
gives the same bytes everywhere; a test compares them with the committed files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "pictures"
WIDTH = 480  # small, so that text stays readable on a phone
INK, PALE, LINE = "#24292f", "#6e7781", "#d0d7de"
BLUE, ORANGE, GREEN, GREY = "#0969da", "#bc4c00", "#1a7f37", "#eaeef2"
CLIP = 0.2

Point = tuple[float, float]


class Drawing:
    """An SVG picture with a light ground of its own, readable on dark pages too."""

    def __init__(self, height: int, title: str) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
            f'width="{WIDTH}" height="{height}" font-family="system-ui, sans-serif" '
            f'font-size="13" role="img"><title>{escape(title)}</title>',
            f'<rect width="{WIDTH}" height="{height}" rx="8" fill="#ffffff"/>',
        ]

    def rect(self, x: float, y: float, width: float, height: float, fill: str, **more: str) -> None:
        """A filled rectangle; a negative height grows upwards."""
        top, tall = (y, height) if height >= 0 else (y + height, -height)
        extra = "".join(f' {k.replace("_", "-")}="{v}"' for k, v in more.items())
        self.parts.append(
            f'<rect x="{x:.1f}" y="{top:.1f}" width="{width:.1f}" height="{tall:.1f}" '
            f'fill="{fill}"{extra}/>'
        )

    def text(
        self,
        x: float,
        y: float,
        words: str,
        color: str = INK,
        anchor: str = "middle",
        size: int = 13,
    ) -> None:
        """A line of text, centred on `x` or beginning there (anchor: start)."""
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" fill="{color}" text-anchor="{anchor}" '
            f'font-size="{size}">{escape(words)}</text>'
        )

    def line(self, points: Iterable[Point], color: str, width: float = 2, dashes: str = "") -> None:
        """A line through points."""
        shown = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
        self.parts.append(
            f'<polyline points="{shown}" fill="none" stroke="{color}" '
            f'stroke-width="{width:g}"{dashed}/>'
        )

    def arrow(self, start: Point, end: Point, color: str = PALE) -> None:
        """A straight arrow."""
        (x0, y0), (x1, y1) = start, end
        angle = math.atan2(y1 - y0, x1 - x0)
        self.line([start, end], color, 1.5)
        wings = [
            (x1 - 8 * math.cos(angle + turn), y1 - 8 * math.sin(angle + turn))
            for turn in (-0.45, 0.45)
        ]
        self.line([wings[0], end, wings[1]], color, 1.5)

    def box(self, x: float, y: float, width: float, height: float, color: str, *lines: str) -> None:
        """A rounded box with lines of text in its middle, the first of them in its colour."""
        self.rect(x, y, width, height, "#ffffff", rx="6", stroke=color, stroke_width="1.5")
        first = y + height / 2 + 5 - 9 * (len(lines) - 1)
        for i, words in enumerate(lines):
            self.text(x + width / 2, first + 18 * i, words, color if i == 0 else INK)

    def svg(self) -> str:
        """The picture as text."""
        return "\n".join([*self.parts, "</svg>\n"])


def clipped(ratio: float, advantage: float) -> float:
    """The objective of a token: the worse of the plain and the clipped term."""
    return min(ratio * advantage, min(max(ratio, 1 - CLIP), 1 + CLIP) * advantage)


def gae(rewards: Sequence[float], values: Sequence[float], gamma: float, lam: float) -> list[float]:
    """Advantages of one response's tokens, from its end to its beginning."""
    found: list[float] = []
    carry, following = 0.0, 0.0
    for reward, value in zip(reversed(rewards), reversed(values), strict=True):
        carry = reward + gamma * following - value + gamma * lam * carry
        found.append(carry)
        following = value
    return found[::-1]


def clip_picture() -> str:
    """The clipped objective over the ratio, for a token that was good and for one that was bad."""
    picture = Drawing(276, "The clipped objective over the ratio, for either sign of the advantage")
    for left, advantage, words in ((14, 1.0, "a good token"), (250, -1.0, "a bad token")):
        wide, top, tall = 216, 44, 178
        middle = top + tall / 2

        def x(ratio: float, left: float = left, wide: float = wide) -> float:
            return left + ratio / 2 * wide

        def y(value: float, middle: float = middle, tall: float = tall) -> float:
            return middle - value / 2 * tall / 2

        picture.text(left + wide / 2, 24, f"{words}: advantage {advantage:+.0f}")
        picture.rect(x(1 - CLIP), top, x(1 + CLIP) - x(1 - CLIP), tall, GREY)
        picture.line([(x(0), middle), (x(2), middle)], LINE, 1)
        grid = [i / 100 for i in range(201)]
        picture.line([(x(r), y(r * advantage)) for r in (0.0, 2.0)], PALE, 1.5, "4 4")
        picture.line([(x(r), y(clipped(r, advantage))) for r in grid], BLUE, 2.5)
        for ratio, label in ((1 - CLIP, "0.8"), (1.0, "1"), (1 + CLIP, "1.2")):
            picture.text(x(ratio), top + tall + 17, label, PALE, size=11)
        flat = 1.62 if advantage > 0 else 0.4
        picture.text(x(flat), y(clipped(flat, advantage)) + 19, "no gradient", ORANGE, size=12)
    picture.text(240, 264, "ratio: probability of the token now / at the rollout", PALE)
    return picture.svg()


NEXT_WORDS = ("calm", "blue", "deep", "cold", "lovely")
REFERENCE = (0.30, 0.26, 0.20, 0.16, 0.08)
POLICY = (0.24, 0.20, 0.10, 0.06, 0.40)


def divergence(p: Sequence[float], q: Sequence[float]) -> float:
    """KL(p || q) in nats."""
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def kl_picture() -> str:
    """One token's distribution under reference and policy, and the KL between them."""
    picture = Drawing(
        260, "The next token's probabilities under reference and policy, and their KL"
    )
    base, tall = 196, 300
    picture.text(20, 26, '"The sea is ..."', INK, "start")
    picture.rect(190, 15, 12, 12, LINE)
    picture.text(208, 26, "reference", PALE, "start")
    picture.rect(290, 15, 12, 12, BLUE)
    picture.text(308, 26, "policy, after some steps", BLUE, "start")
    for i, (word, q, p) in enumerate(zip(NEXT_WORDS, REFERENCE, POLICY, strict=True)):
        left = 28 + 88 * i
        picture.rect(left, base, 32, -q * tall, LINE)
        picture.rect(left + 36, base, 32, -p * tall, BLUE)
        picture.text(left + 34, base + 18, word)
    picture.line([(14, base), (466, base)], PALE, 1)
    kl = divergence(POLICY, REFERENCE)
    picture.text(240, 244, f"KL at this token: {kl:.2f} nats; a response's KL is the sum", ORANGE)
    return picture.svg()


def roles_picture() -> str:
    """Four roles on one frozen base."""
    picture = Drawing(290, "Actor, reference, reward and critic on one frozen language model")
    columns = (
        ("actor", BLUE, "LoRA", "trains", "log-probs"),
        ("reference", PALE, "no adapter", "frozen", "log-probs"),
        ("reward", PALE, "LoRA + head", "frozen", "one score"),
        ("critic", BLUE, "LoRA + head", "trains", "values"),
    )
    for i, (name, color, parts, trains, output) in enumerate(columns):
        left = 12 + 115 * i
        picture.text(left + 55, 30, output, INK)
        picture.arrow((left + 55, 84), (left + 55, 40))
        picture.box(left, 86, 110, 84, color, name, parts, trains)
        picture.arrow((left + 55, 212), (left + 55, 174))
    picture.rect(12, 214, 456, 56, GREY, rx="6")
    picture.text(240, 247, "one frozen language model, in memory once")
    return picture.svg()


TOKENS = ("The", "sea", "is", "so", "lovely", "today", ".")
KLS = (0.05, 0.1, 0.05, 0.4, 1.1, 0.2, 0.1)
VALUES = (0.8, 0.8, 0.75, 0.7, 0.55, 0.95, 0.95)
SCORE, BETA = 1.0, 0.1


def token_rewards() -> list[float]:
    """Minus beta times the KL at every token, plus the score at the last."""
    rewards = [-BETA * kl for kl in KLS]
    rewards[-1] += SCORE
    return rewards


def advantages_picture() -> str:
    """Reward, value and advantage of each token of a response."""
    picture = Drawing(420, "Reward, value and advantage of each token of a response")
    rewards = token_rewards()
    advantages = gae(rewards, VALUES, gamma=1.0, lam=0.95)
    panels: tuple[tuple[float, float, str, Sequence[float], Callable[[float], str]], ...] = (
        (108, 70, "reward: minus beta times KL, the score at the end", rewards, lambda x: ORANGE),
        (234, 70, "value: what the critic expects from here on", VALUES, lambda x: PALE),
        (
            350,
            130,
            "advantage: better or worse than the critic expected",
            advantages,
            lambda x: GREEN if x > 0 else ORANGE,
        ),
    )
    for base, scale, words, numbers, color in panels:
        picture.text(14, base - 80, words, INK, "start")
        picture.line([(14, base), (466, base)], LINE, 1)
        for i, number in enumerate(numbers):
            left = 24 + 64 * i
            picture.rect(left, base, 40, -number * scale, color(number))
            below = base + 14 + max(-number, 0) * scale
            picture.text(left + 20, below, f"{number:.2f}".replace("-", "\u2212"), PALE, size=11)
    for i, token in enumerate(TOKENS):
        picture.text(44 + 64 * i, 408, token)
    return picture.svg()


def loop_picture() -> str:
    """What a step does with a prompt, and what it does not need."""
    picture = Drawing(268, "A step of PPO: prompts, sampled responses, scores, advantages, update")
    picture.box(14, 34, 100, 56, INK, "prompts")
    picture.box(182, 34, 116, 56, BLUE, "policy", "samples")
    picture.box(366, 34, 100, 56, PALE, "reward", "scores")
    picture.box(366, 150, 100, 56, PALE, "advantages")
    picture.box(182, 150, 116, 56, BLUE, "update")
    picture.arrow((114, 62), (180, 62))
    picture.arrow((298, 62), (364, 62))
    picture.text(332, 22, "responses", PALE, size=12)
    picture.arrow((416, 90), (416, 148))
    picture.arrow((366, 178), (300, 178))
    picture.arrow((240, 150), (240, 92))
    picture.text(250, 126, "new weights", PALE, "start", 12)
    picture.rect(
        14, 150, 100, 56, "#ffffff", rx="6", stroke=LINE, stroke_width="1.5", stroke_dasharray="4 4"
    )
    picture.text(64, 174, "answers of", PALE)
    picture.text(64, 192, "the records", PALE)
    for y, words in (
        (240, "Only prompts come from the data; a record's answer is shown beside"),
        (257, "the samples, and nothing learns from it."),
    ):
        picture.text(14, y, words, PALE, "start", 12)
    return picture.svg()


PICTURES: dict[str, Callable[[], str]] = {
    "advantages.svg": advantages_picture,
    "clip.svg": clip_picture,
    "kl.svg": kl_picture,
    "loop.svg": loop_picture,
    "roles.svg": roles_picture,
}


def main() -> None:
    """Write every picture into docs/pictures."""
    FOLDER.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        (FOLDER / name).write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
