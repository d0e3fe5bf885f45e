"""Draws the pictures of this folder and writes a small calibration set in each format: python tests/data/calibration/make.py"""

import itertools
import json
from pathlib import Path
from typing import Any

from PIL import Image

from mgvq.data.tiny_vqa.dataset import DrawnImage, draw_images

HERE = Path(__file__).parent
ASK = "What do you see happening in this image?"


def show(picture: DrawnImage, file: Path) -> str:
    """Write it, and say where it is in this folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture.pixels).save(file)
    return file.relative_to(HERE).as_posix()


def lines(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def turns(*texts: Any) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def main() -> None:
    pictures = draw_images("calibration", 0, 6, 3)
    coco = [show(p, HERE / f"coco/train2017/{p.index:012d}.jpg") for p in pictures]

    # The published form: a list; images of other sources in between, as there.
    captions = [
        {"id": Path(name).stem, "image": name,
         "conversations": [{"from": "human", "value": f"{ASK}\n<image>" if p.index % 2 else f"<image>\n{ASK}"},
                           {"from": "gpt", "value": " , ".join(f"{q.text} {q.answer}" for q in p.questions)}]}
        for p, name in zip(pictures, coco, strict=True)
    ]  # fmt: skip
    captions.insert(2, {**captions[0], "id": "sa_1", "image": "sam/images/sa_1.jpg"})
    (HERE / "sharegpt4v.json").write_text(json.dumps(captions, indent=1) + "\n")

    asked = [p.questions for p in pictures]
    text, image = {"type": "text"}, {"type": "image"}
    lines(HERE / "chat.jsonl", [
        {"messages": turns(f"<image>{asked[0][0].text}", asked[0][0].answer, asked[0][1].text, asked[0][1].answer),
         "images": [coco[0]]},
        {"messages": turns([text | {"text": "look at"}, image | {"image": coco[1]}, text | {"text": asked[1][0].text}],
                           asked[1][0].answer)},
        {"messages": turns("<image>", asked[2][0].answer), "images": [coco[2]]},  # the image alone
        {"messages": turns(f"<image>{asked[3][0].text}", asked[3][0].answer, f"and here ? <image>{asked[4][0].text}",
                           asked[4][0].answer), "images": [coco[3], coco[4]]},
        {"messages": turns("how many are two and one ?", "three")},
        {"messages": [{"role": "system", "content": "answer in one word ."}, *turns([image, text | {"text": asked[5][0].text}],
                      asked[5][0].answer)], "images": [coco[5]]},
    ])  # fmt: skip
    numbers = ["zero", "one", "two", "three", "four", "five"]
    lines(HERE / "text.jsonl", [{"messages": turns(f"what is behind {a} ?", b)} for a, b in itertools.pairwise(numbers)])

    questions = [(name, p.questions[0]) for name, p in zip(coco, pictures, strict=True)]
    lines(HERE / "image_text.jsonl", [{"image": name, "question": q.text, "answer": q.answer} for name, q in questions])

    # An image folder, which load_dataset("tests/data/calibration/hub") reads.
    for p in pictures[:4]:
        show(p, HERE / f"hub/{p.index}.jpg")
    rows = [{"file_name": f"{p.index}.jpg", "query": q.text, "label": [q.answer, "something else"]}
            for p in pictures[:4] for q in p.questions[:1]]  # fmt: skip
    lines(HERE / "hub/metadata.jsonl", rows)


if __name__ == "__main__":
    main()
