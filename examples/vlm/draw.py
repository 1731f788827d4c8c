"""Draw the example dataset of `model_type: vlm`: zips of small pictures, each with a question whose answer is one word.

    python examples/vlm/draw.py FOLDER [--rows 4000] [--held-out 400] [--seed 0]

writes FOLDER/train.zip to train on and FOLDER/held-out.zip, whose pictures are none of those. Needs Pillow only; the same
arguments draw the same pictures.
"""

from __future__ import annotations

import argparse
import json
import random
import zipfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SIDE = 64  # pixels
COLOURS = {
    "red": (210, 30, 30),
    "green": (20, 140, 50),
    "blue": (40, 60, 220),
    "orange": (240, 140, 20),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "cross")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
MOST_SHAPES = 4


def draw_shape(pen: ImageDraw.ImageDraw, shape: str, x: int, y: int, size: int, fill: tuple[int, int, int]) -> None:
    """Draw a shape of `size` pixels, its upper left corner at (x, y)."""
    right, bottom, third = x + size, y + size, size // 3
    match shape:
        case "circle":
            pen.ellipse((x, y, right, bottom), fill=fill)
        case "square":
            pen.rectangle((x, y, right, bottom), fill=fill)
        case "triangle":
            pen.polygon([(x + size // 2, y), (x, bottom), (right, bottom)], fill=fill)
        case "cross":
            pen.rectangle((x + third, y, right - third, bottom), fill=fill)
            pen.rectangle((x, y + third, right, bottom - third), fill=fill)


def near_the_middle(rng: random.Random, size: float) -> int:
    """Where something of that size begins."""
    return round((SIDE - size) / 2) + rng.randint(-4, 4)


def one_shape(rng: random.Random, pen: ImageDraw.ImageDraw) -> tuple[str, str]:
    """Draw a shape; return its shape and its colour."""
    shape, colour = rng.choice(SHAPES), rng.choice(tuple(COLOURS))
    size = rng.randint(34, 44)
    draw_shape(pen, shape, near_the_middle(rng, size), near_the_middle(rng, size), size, COLOURS[colour])
    return shape, colour


def what_colour(rng: random.Random, pen: ImageDraw.ImageDraw) -> str:
    return one_shape(rng, pen)[1]


def what_shape(rng: random.Random, pen: ImageDraw.ImageDraw) -> str:
    return one_shape(rng, pen)[0]


def how_many(rng: random.Random, pen: ImageDraw.ImageDraw) -> str:
    """Draw up to MOST_SHAPES shapes, each in a cell of its own of a grid of 3 x 3."""
    count, cell = rng.randint(1, MOST_SHAPES), SIDE // 3
    for place in rng.sample(range(9), count):
        size = rng.randint(12, 16)
        x, y = (place % 3 * cell + rng.randint(1, cell - size - 1), place // 3 * cell + rng.randint(1, cell - size - 1))
        draw_shape(pen, rng.choice(SHAPES), x, y, size, COLOURS[rng.choice(tuple(COLOURS))])
    return NUMBERS[count]


def which_digit(rng: random.Random, pen: ImageDraw.ImageDraw) -> str:
    digit, font = rng.randrange(10), ImageFont.load_default(rng.randint(52, 60))
    left, top, right, bottom = pen.textbbox((0, 0), str(digit), font=font)
    x, y = near_the_middle(rng, right - left) - left, near_the_middle(rng, bottom - top) - top
    pen.text((x, y), str(digit), font=font, fill=COLOURS[rng.choice(tuple(COLOURS))])
    return NUMBERS[digit]


QUESTIONS: dict[str, Callable[[random.Random, ImageDraw.ImageDraw], str]] = {
    "What colour is it?": what_colour,
    "What shape is it?": what_shape,
    "How many shapes are there?": how_many,
    "Which digit is it?": which_digit,
}


def drawn(rng: random.Random) -> Iterator[tuple[bytes, str, str]]:
    """Pictures without end, as PNG, with question and answer; no two alike."""
    seen: set[bytes] = set()
    questions = tuple(QUESTIONS)
    while True:
        ground = tuple(rng.randint(220, 255) for _ in range(3))
        picture = Image.new("RGB", (SIDE, SIDE), ground)
        question = rng.choice(questions)
        answer = QUESTIONS[question](rng, ImageDraw.Draw(picture))
        if picture.tobytes() not in seen:
            seen.add(picture.tobytes())
            png = BytesIO()
            picture.save(png, "PNG")
            yield png.getvalue(), question, answer


def write_zip(path: Path, rows: Iterator[tuple[bytes, str, str]], num_rows: int) -> None:
    """Write a dataset of `dataset_type: zip`: train.jsonl (ShareGPT) at its root, and the pictures that its rows name."""
    lines = []
    with zipfile.ZipFile(path, "w") as archive:
        for i, (png, question, answer) in zip(range(num_rows), rows, strict=False):
            name = f"pictures/{i:05d}.png"
            archive.writestr(zipfile.ZipInfo(name), png)  # without a date: the same bytes every time
            turns = [{"from": "human", "value": f"<image>{question}"}, {"from": "gpt", "value": answer}]
            lines.append(json.dumps({"image": name, "conversations": turns}) + "\n")
        archive.writestr(zipfile.ZipInfo("train.jsonl"), "".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--held-out", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    rows = drawn(random.Random(given.seed))
    write_zip(given.folder / "train.zip", rows, given.rows)
    write_zip(given.folder / "held-out.zip", rows, given.held_out)


if __name__ == "__main__":
    main()
