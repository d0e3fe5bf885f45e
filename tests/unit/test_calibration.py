"""Calibration sets of given data: what is drawn, what the model is shown and asked, and how bad rows are named."""

import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from conftest import ROOT
from PIL import Image

from mgvq.calibration.chat import ChatLines
from mgvq.calibration.drawn import Drawn
from mgvq.calibration.hub import Hub
from mgvq.calibration.image_text import ImageText
from mgvq.calibration.sharegpt4v import ShareGPT4V
from mgvq.calibration.tiny_vqa import TinyVQA
from mgvq.curvature.statistics import collect
from mgvq.errors import UserError
from mgvq.model.answers import answer_logits
from mgvq.model.chat import Chat, Turn
from mgvq.model.encode import Example, encode
from mgvq.model.passes import Rows
from mgvq.model.sites import linear, list_sites
from mgvq.quantization.subject import Samples, Subject
from mgvq.quantization.teacher import Teacher
from mgvq.types import Batch, Needs, Site

DATA = ROOT / "tests/data/calibration"
DRAW: dict[str, Any] = {"num_samples": 3, "heldout_samples": 1, "batch_size": 2, "seed": 0, "label_seed": 0}
HUB: dict[str, Any] = {"subset": None, "split": "train", "revision": None}
QUESTIONS = {"images": "image", "question": "query", "answer": "label"}


def chat_lines(file: Path, **settings: Any) -> ChatLines:
    return ChatLines(path=str(file), **DRAW | settings)


def hub(folder: Path, columns: dict[str, str | None], **settings: Any) -> Hub:
    return Hub(path=str(folder), columns=columns, **DRAW | HUB | settings)


def sharegpt4v(file: Path = DATA / "sharegpt4v.json", images: Path = DATA / "coco", **settings: Any) -> ShareGPT4V:
    return ShareGPT4V(path=str(file), images=str(images), prefix="coco/", **DRAW | settings)


SETS: dict[str, Drawn] = {
    "chat": chat_lines(DATA / "chat.jsonl", num_samples=5),
    "text": chat_lines(DATA / "text.jsonl", num_samples=4),
    "sharegpt4v": sharegpt4v(num_samples=5),
    "hub": hub(DATA / "hub", QUESTIONS),
}


def answers_by_hand() -> dict[str, dict[str, list[str]]]:
    """The answers that stand in the files, by set and sample."""
    lines = {
        name: {f"{name}.jsonl, line {n}": [m["content"] for m in json.loads(line)["messages"] if m["role"] == "assistant"]
               for n, line in enumerate((DATA / f"{name}.jsonl").read_text().splitlines(), start=1)}
        for name in ("chat", "text")
    }  # fmt: skip
    text = (DATA / "sharegpt4v.json").read_text()
    captions = {
        f"sharegpt4v.json, entry {n} (line {text[: text.index(entry['id'])].count(chr(10))})": [
            entry["conversations"][1]["value"]
        ]
        for n, entry in enumerate(json.loads(text), start=1)
        if entry["image"].startswith("coco/")
    }
    rows = map(json.loads, (DATA / "hub/metadata.jsonl").read_text().splitlines())
    labels = {f"hub, split train, row {n}": [row["label"][0]] for n, row in enumerate(rows)}
    return {**lines, "sharegpt4v": captions, "hub": labels}


@pytest.mark.parametrize("name", SETS)
def test_the_loss_is_that_of_the_answers_in_the_file(name: str, loaded: Any) -> None:
    """All image tokens are marked, too."""
    drawn, expected, tokenizer = SETS[name].draw(), answers_by_hand()[name], loaded.processor.tokenizer
    image = loaded.processor.image_token
    images = {chat.sample_id: len(chat.images) for chat in (*drawn.examples, *drawn.heldout_examples)}
    seen = {}
    for batch in (*drawn.batches(loaded.processor), *drawn.heldout(loaded.processor)):
        assert len(batch.sample_ids) <= 2
        assert (batch.valid_mask == batch.inputs["attention_mask"].bool()).all()
        for number, sample in enumerate(batch.sample_ids):
            ids = batch.inputs["input_ids"][number]
            seen[sample] = tokenizer.decode(ids[batch.loss_mask[number]])
            assert (tokenizer.decode(ids).count(image) > 0) == (images[sample] > 0)
            assert batch.image_mask[number].sum() == tokenizer.decode(ids).count(image)
    end = tokenizer.eos_token
    spaced = {sample: text.strip().replace(f"{end} ", end) for sample, text in seen.items()}
    assert spaced == {sample: "".join(f"{answer}{end}" for answer in answers) for sample, answers in expected.items()}
    assert set(seen) == set(images)


def test_every_answer_is_predicted_from_what_stands_before_it(loaded: Any) -> None:
    """Of two with an image before each: another answer changes no prediction of its first token or before, and some behind."""
    (chat,) = (c for c in SETS["chat"].draw().examples if len(c.images) == 2)

    def logits(*changed: int) -> torch.Tensor:
        turns = (Turn(t.role, ("yes",)) if n in changed else t for n, t in enumerate(chat.turns))
        with torch.no_grad():
            return answer_logits(loaded.model, encode(loaded.processor, [Chat("other", tuple(turns))]))

    as_it_is, other_first, other_second = logits(), logits(1), logits(3)
    assert len(as_it_is) == 4  # "no" and its end, twice
    for other, same in ((other_first, 1), (other_second, 3)):
        torch.testing.assert_close(other[:same], as_it_is[:same], atol=1e-4, rtol=1e-4)
        assert (other[same] - as_it_is[same]).abs().max() > 0.01


def test_a_question_is_the_same_as_conversation_and_as_example(loaded: Any) -> None:
    image = Image.open(DATA / "coco/train2017/000000000001.jpg").convert("RGB")
    chat = Chat("x", (Turn("user", (image, "how many ?")), Turn("assistant", ("one",))))
    one, other = (encode(loaded.processor, [sample]) for sample in (chat, Example("x", image, "how many ?", "one")))
    for a, b in ((one.inputs["input_ids"], other.inputs["input_ids"]), (one.loss_mask, other.loss_mask)):
        assert torch.equal(a, b)


class Written:
    """A processor that is its chat template."""

    def __init__(self, family: str) -> None:
        self.family, self.tokenizer, self.image_token = family, self, "<image>"
        self.added_tokens_decoder: dict[int, Any] = {}
        self.all_special_tokens: list[str] = []
        self.eos_token = {"smolvlm": "<end>", "llava": "</s>"}.get(family, "<|im_end|>")

    def apply_chat_template(self, messages: list[dict[str, Any]], tokenize: bool, add_generation_prompt: bool = False) -> str:
        text = ""
        for message in messages:
            content = "".join(part.get("text", "<image>") for part in message["content"])
            role = message["role"]
            text += {
                "smolvlm": f"{role.capitalize()}: {content}<end>\n",
                "llava": f"{role.upper()}: {content} ",
                "qwen": f"<|im_start|>{role}\n{content}<|im_end|>\n",
                "llava_onevision": f"<|im_start|>{role} \n{content}<|im_end|>",  # with a space that the generation prompt lacks
                "silent": f"<|im_start|>{role}\n{content if role == 'user' else ''}<|im_end|>\n",
                "blind": f"<|im_start|>{role}\n{content.replace('<image>', '')}<|im_end|>\n",
                "thoughtful": f"<|im_start|>{role}\n{content}<|im_end|>\n",
            }[self.family]
        prompts = {"smolvlm": "Assistant:", "llava": "ASSISTANT:", "thoughtful": "<|im_start|>assistant\n<think>\n"}
        return text + (prompts.get(self.family, "<|im_start|>assistant\n") if add_generation_prompt else "")


ASKED = Chat("rows.jsonl, line 7", (Turn("user", (Image.new("RGB", (8, 8)), "What?")), Turn("assistant", ("A cat.",)),
                                    Turn("user", ("And?",)), Turn("assistant", ("A dog.\n",))))  # fmt: skip


@pytest.mark.parametrize(
    ("family", "first", "second"),
    [
        ("qwen", "A cat.<|im_end|>", "A dog.\n<|im_end|>"),
        ("llava_onevision", "A cat.<|im_end|>", "A dog.\n<|im_end|>"),
        ("smolvlm", " A cat.<end>", " A dog.\n<end>"),  # the space is the model's to say
        ("llava", " A cat.", " A dog.</s>"),  # the template ends no turn; the last one has to end
    ],
)
def test_answers_lie_where_the_template_puts_them(family: str, first: str, second: str) -> None:
    rendered = ASKED.render(Written(family))
    assert [rendered.text[a.start : a.stop] for a in rendered.answers] == [first, second]
    prompt = Written(family).apply_chat_template([turn.message() for turn in ASKED.turns[:3]], False, add_generation_prompt=True)
    assert rendered.text == prompt + second
    assert [a.num_images for a in rendered.answers] == [1, 1]


@pytest.mark.parametrize(
    ("family", "named"),
    [
        ("silent", r"rows\.jsonl, line 7: no answer tokens.*should write 'A cat\.'"),
        ("thoughtful", r"line 7: no answer tokens.*behind .*<think>"),
        ("blind", r"line 7: 1 images, but 0 times '<image>'"),
    ],
)
def test_a_template_that_hides_the_answers_is_named(family: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        ASKED.render(Written(family))


def test_templates_are_checked_before_the_first_batch(loaded: Any) -> None:
    """This holds for the held-out samples too; the text of one holds the image token."""
    drawn, image = SETS["text"].draw(), loaded.processor.image_token
    bad = Chat("rows.jsonl, line 3", (Turn("user", (f"what is {image} ?",)), Turn("assistant", ("a mark",))))
    drawn = type(drawn)(drawn.examples, [bad], 0, 2)
    with pytest.raises(UserError, match=re.escape(f"line 3: {image!r} in a text is a special token")):
        drawn.batches(loaded.processor)


def test_the_draw_is_seeded_and_held_out_rows_have_images_of_their_own(tmp_path: Path) -> None:
    """Every image comes in two files, each with two questions: no content may be in both parts."""
    rows = []
    for number in range(12):
        image = Image.new("RGB", (8, 8), (number // 2, 0, 0))
        image.save(tmp_path / f"{number}.png")
        rows += [{"image": f"{number}.png", "question": f"{q} ?", "answer": "a"} for q in "pq"]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))

    def ids(seed: int) -> tuple[list[str], list[str]]:
        drawn = ImageText(path=str(file), **DRAW | {"num_samples": 4, "heldout_samples": 3, "seed": seed}).draw()
        parts = drawn.examples, drawn.heldout_examples
        contents = [{c.images[0].tobytes() for c in part} for part in parts]
        assert not contents[0] & contents[1]
        return [c.sample_id for c in parts[0]], [c.sample_id for c in parts[1]]

    assert ids(0) == ids(0)
    assert len({tuple(ids(seed)[0]) for seed in range(4)}) == 4
    for seed in range(4):
        draw = DRAW | {"num_samples": 4, "heldout_samples": 2, "seed": seed}
        few, more = (ImageText(path=str(file), **draw, gram_samples=number).draw() for number in (None, 6))
        assert (more.examples, more.heldout_examples) == (few.examples, few.heldout_examples)
        further, heldout = ({c.images[0].tobytes() for c in part} for part in (more.gram_examples, more.heldout_examples))
        assert len(more.gram_examples) == 2
        assert not further & heldout
    with pytest.raises(UserError, match=r"only \d+ rows share no image with the 2 held-out ones.*gram_samples=22"):
        ImageText(path=str(file), **DRAW | {"num_samples": 4, "heldout_samples": 2}, gram_samples=22).draw()
    file.write_text("\n".join(json.dumps(rows[0] | {"question": f"{q} ?"}) for q in range(9)))
    with pytest.raises(UserError, match=r"only 0 rows share no image with the 3 that are drawn.*heldout_samples=1"):
        ImageText(path=str(file), **DRAW).draw()


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "a"}], **more}


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ("{", "cannot be read"),
        ("[]", "must be an object with messages"),
        ({"message": []}, "has no messages; its keys are message. Rename"),
        ({"messages": "hello"}, "messages and images must be lists"),
        (user("q", images="a.png"), "messages and images must be lists"),
        ({"messages": []}, "no answer tokens"),
        ({"messages": [{"role": "user", "content": "q"}]}, "no answer tokens: there is no answer"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "no answer tokens: there is no answer to a user's message"),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": " "}]}, "no answer tokens: message 2"),
        ({"messages": [{"role": "tool", "content": "q"}]}, "message 1 is of the role 'tool'"),
        ({"messages": [{"speaker": "user"}]}, 'message 1 must be {"role"'),
        (user(3), "content of message 1 must be"),
        (user([{"type": "video"}]), 'a part of message 1 must be {"type": "text"'),
        (user(""), "message 1 is empty"),
        (user("<image>q"), "show more images than come with it"),
        (user("q", images=["a.png"]), "1 images come with it, but its messages show 0"),
        (user("<image>q", images=["missing.png"]), "missing.png cannot be read as an image"),
        (user([{"type": "image", "image": "note.png"}]), "note.png cannot be read as an image"),
        (user("<image>q", images=[7]), "an image must be a file name or the image itself, got 7"),
    ],
)
def test_a_bad_row_is_named_with_its_line(row: Any, named: str, tmp_path: Path) -> None:
    (tmp_path / "note.png").write_text("this is text")
    file = tmp_path / "rows.jsonl"
    file.write_text("\n" + (row if isinstance(row, str) else json.dumps(row)))
    with pytest.raises(UserError) as caught:
        chat_lines(file, num_samples=1, heldout_samples=0).draw()
    assert str(caught.value).startswith(f"{file}, line 2: ")
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", r"line 1: expected a JSON list"),
        ('{"image": "coco/a.jpg"}', r"line 1: expected a JSON list"),
        ('[\n{"image": "coco/a.jpg",\n', r"line 3: .*whole"),
        ('[\n{"image": "coco/a.jpg"}\n', r"line 2: expected a JSON list"),
        (
            '[{"image": "sam/a.jpg"}]',
            r"of its 1 entries no image begins with calibration\.prefix='coco/'; the first is 'sam/a.jpg'",
        ),
        ('[\n{"image": "coco/a.jpg"}\n]', r"has 1 rows, but calibration\.num_samples \+ heldout_samples asks for 4"),
        ('[1,\n\n{"image": "coco/a.jpg"}]', r"entry 2 \(line 3\): has no conversations"),
        (
            '[{"image": "coco/a.jpg", "conversations": [{"from": "human", "value": "<image>"}]}]',
            r"line 1\): .*/a\.jpg cannot be read as an image",
        ),
    ],
)
def test_a_bad_caption_file_is_named_with_its_line(text: str, named: str, tmp_path: Path) -> None:
    file = tmp_path / "captions.json"
    file.write_text(text)
    one = {} if "asks for" in named else {"num_samples": 1, "heldout_samples": 0}
    with pytest.raises(UserError, match=named):
        sharegpt4v(file, **one).draw()
    with pytest.raises(UserError, match=r"calibration\.images=.*/nowhere is not a folder"):
        sharegpt4v(images=tmp_path / "nowhere").draw()


def test_data_sets_as_they_are_saved(tmp_path: Path) -> None:
    """Splits with lists of images and LLaVA's conversations; one without splits; the columns are those that the settings name."""
    talk = [{"from": "human", "value": "<image>\nwhat ?\n<image>"}, {"from": "gpt", "value": "two"}]
    files = sorted((DATA / "coco/train2017").iterdir())
    rows = {"talk": [talk] * 3, "shown": [[str(files[2 * n]), str(files[2 * n + 1])] for n in range(3)]}
    images = datasets.Features({"talk": [{"from": datasets.Value("string"), "value": datasets.Value("string")}],
                                "shown": datasets.List(datasets.Image())})  # fmt: skip
    data = datasets.Dataset.from_dict(rows, features=images)
    datasets.DatasetDict({"val": data}).save_to_disk(tmp_path / "splits")
    columns: dict[str, str | None] = {"messages": "talk", "images": "shown"}
    drawn = hub(tmp_path / "splits", columns, split="val", num_samples=2).draw()
    for chat in (*drawn.examples, *drawn.heldout_examples):
        first = int(chat.sample_id.removeprefix("splits, split val, row ")) * 2
        shown = [Image.open(files[n]).convert("RGB").tobytes() for n in (first, first + 1)]
        assert [p if isinstance(p, str) else p.tobytes() for p in chat.turns[0].parts] == [shown[0], "what ?", shown[1]]
        assert chat.turns[1].text == "two"
    datasets.Dataset.from_dict({"q": ["why ?"] * 3, "a": ["so", "thus", "hence"]}).save_to_disk(tmp_path / "plain")
    with pytest.raises(UserError, match=r"calibration\.split=train: in .*plain there is null"):
        hub(tmp_path / "plain", {"answer": "a"}).draw()
    plain = hub(tmp_path / "plain", {"question": "q", "answer": "a"}, num_samples=2, split=None)
    drawn = plain.draw()
    answers = sorted(chat.turns[1].text for chat in (*drawn.examples, *drawn.heldout_examples))
    assert answers == ["hence", "so", "thus"]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"columns": {}}, r"calibration\.columns names none"),
        ({"columns": {"answer": "label", "messages": "talk"}}, r"calibration\.columns names answer, messages"),
        ({"columns": {"question": "query"}}, r"calibration\.columns\.answer=COLUMN"),
        ({"columns": {"reply": "label"}}, r"calibration\.columns has no reply"),
        ({"columns": {"answer": "answer"}}, r"names answer; there are image, query, label"),
        ({"columns": QUESTIONS | {"answer": "image"}}, r"hub, split train, row \d: question and answer must be texts"),
        ({"split": "test"}, r"split test\) cannot be loaded"),
        ({"path": "org/name"}, r"calibration\.revision=<the 40 hex digits"),
        ({"revision": "main"}, r"calibration\.revision=main has no effect with the folder"),
        ({"split": None}, r"calibration\.split=None: in .* there is train"),
        ({"num_samples": 0}, r"calibration\.num_samples must be a whole number >= 1, got 0"),
    ],
)
def test_bad_settings_of_a_data_set_are_named(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        Hub(**{"path": str(DATA / "hub"), "columns": QUESTIONS, **DRAW, **HUB, **settings}).draw()


@pytest.mark.parametrize("source", ["sft", "kl", "block"])
def test_texts_between_images_only_thin_the_gradient_of_the_vision_tower(source: str, loaded: Any) -> None:
    """A batch without an image never calls it, and its answers count in the mean."""
    batches = [encode(loaded.processor, [chat]) for chat in SETS["chat"].draw().examples if len(chat.images) == 1][:2]
    texts = list(SETS["text"].draw().batches(loaded.processor))
    heldout = list(SETS["hub"].draw().heldout(loaded.processor))
    sites = list_sites(loaded.model, "all")
    block = [site for site in sites if site.tower == "vision" and site.block == 1]
    found = []
    for part in (batches, [*texts, *batches]):
        drift = Teacher(Subject(loaded.model, sites, Samples(part, heldout)), source)
        weight = linear(loaded.model, block[0]).weight
        kept = weight.detach().clone()
        weight.data.mul_(0.5)
        found.append(drift.gradient(block))
        weight.data.copy_(kept)
    answers = [sum(int(b.loss_mask.sum()) for b in part) for part in (batches, [*texts, *batches])]
    for site, gradient in found[0].items():
        assert gradient.any()
        torch.testing.assert_close(found[1][site], gradient * answers[0] / answers[1], atol=1e-7, rtol=1e-4)


def test_text_alone_knows_nothing_of_the_vision_tower(loaded: Any) -> None:
    def statistics(scope: str) -> Any:
        drawn = SETS["text"].draw()
        sites = list_sites(loaded.model, scope)
        return collect(loaded.model, sites, drawn.batches(loaded.processor), Needs(gram=True), 0)

    assert all(stats.num_tokens["text"] and not stats.num_tokens["image"] for stats in statistics("language").values())
    with pytest.raises(UserError, match=r"no calibration sample reaches the projector and the vision layers.*scope=language"):
        statistics("all")


def test_stacked_tiles_of_samples_with_unequal_numbers_of_images_are_unclear() -> None:
    """Two images of one sample and none of the other are as many tiles as one each."""
    image = torch.tensor([[True, True], [False, False]])
    batch = Batch({"pixel_values": torch.zeros(2, 1, 3, 8, 8)}, image, ~image, torch.ones_like(image), ("a", "b"))
    site = Site("x", "vision", "q_proj", 0, 4, 4)
    with pytest.raises(UserError, match="whose tile is whose"):
        Rows.of(batch).by_sample(site, torch.zeros(2, 5, 4))


def test_the_projects_own_questions_may_be_shown_in_part(loaded: Any) -> None:
    """Text alone has no image token, an image alone none of the question's words; the answers and their tokens stay."""
    settings: dict[str, Any] = {"num_images": 2, "questions_per_image": 3, "heldout_images": 1, "seed": 0, "label_seed": 0}
    drawn = {shown: TinyVQA(**settings, shown=shown).draw() for shown in ("both", "text", "image")}
    assert [part.packable for part in drawn.values()] == [True, False, False]
    rows = {
        shown: {
            name: (text, answer, bool(image.any()))
            for batch in part.batches(loaded.processor)
            for name, text, answer, image in zip(
                batch.sample_ids,
                loaded.processor.tokenizer.batch_decode(batch.inputs["input_ids"], skip_special_tokens=True),
                [row[mask].tolist() for row, mask in zip(batch.inputs["input_ids"], batch.loss_mask, strict=True)],
                batch.image_mask,
                strict=True,
            )
        }
        for shown, part in drawn.items()
    }
    for sample in drawn["both"].examples:
        assert isinstance(sample, Example)
        found = {shown: row[sample.sample_id] for shown, row in rows.items()}
        assert [shown_image for _, _, shown_image in found.values()] == [True, False, True]
        assert [sample.question in text for text, _, _ in found.values()] == [True, True, False]
        assert found["text"][1] == found["image"][1] == found["both"][1]


def test_what_is_shown_must_be_one_of_three() -> None:
    with pytest.raises(UserError, match=r"calibration\.shown must be one of both, text, image, got 'sound'"):
        TinyVQA(num_images=1, questions_per_image=1, heldout_images=0, shown="sound", seed=0, label_seed=0)
