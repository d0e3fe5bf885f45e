"""Rows of calibration data: reading them from files, and making conversations of what they say; errors name their place."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from mgvq.calibration.images import read_image, whole_images_only
from mgvq.checks import short_words, told_as
from mgvq.errors import UserError
from mgvq.model.chat import Turn

IMAGE_MARK = "<image>"  # in a text: the next image of the row stands here
_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
_IMAGE_KEYS = ("image", "images")


@dataclass(frozen=True, slots=True)
class Row:
    """One row of calibration data, which is read when it is asked for."""

    source: str  # the file or the data set
    where: str  # the row's place in it: `line 3`
    read: Callable[[], Any]  # gives the content; raises what the library that reads it raises

    @property
    def sample_id(self) -> str:
        """The row's name, which is the same wherever its file lies."""
        return f"{Path(self.source).name}, {self.where}"

    def error(self, text: str) -> UserError:
        """The error of this row, its place in front of the text."""
        return UserError(f"{self.source}, {self.where}: {text}")

    def content(self, *keys: str) -> dict[str, Any]:
        """The content of the row. Raises UserError where it cannot be read (no JSON, a broken image in an image column), where
        a text in it is no Unicode, or where one of `keys` is missing."""
        with told_as(f"{self.source}, {self.where}: cannot be read", "Fix the row or take it out."), whole_images_only():
            content = self.read()
        if not isinstance(content, dict):
            raise self.error(f"must be an object with {', '.join(keys)}, got {_short(content)}.")
        if missing := [key for key in keys if key not in content]:
            raise self.error(f"has no {' and no '.join(missing)}; its keys are {', '.join(map(str, content))}. Rename them.")
        if bad := next((text for text in _texts(content) if not _is_unicode(text)), None):
            raise self.error(f"holds half of a surrogate pair, which is no character: {_short(bad)}. Take it out.")
        return content


def json_lines(path: str) -> list[Row]:
    """A row for every line of `calibration.path` that is not blank.

    Raises UserError where it is no UTF-8 text, or one JSON list instead of lines.
    """
    found = [(number, line) for number, line in enumerate(lines(read_text(path)), start=1) if line.strip()]
    if found and (found[0][1].strip() == "[" or found[0][1].strip().startswith("[{")):
        raise UserError(
            f"{path}, line {found[0][0]}: it is one JSON list, and rows are lines, each an object. jq -c '.[]' {path} makes them."
        )
    return [Row(path, f"line {number}", lambda line=line: _object(line)) for number, line in found]


def _object(line: str) -> Any:
    """The JSON of a line. Raises ValueError for a key that stands in an object twice, of which json would keep the last."""
    return json.loads(line, object_pairs_hook=_once_each)


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands in it twice")
    return found


def lines(text: str) -> list[str]:
    """The lines of a JSON-lines file: they end at a newline, with or without a carriage return before it, and nowhere else.

    Characters such as U+2028, where `str.splitlines` cuts too, may stand in the strings of a row.
    """
    return [line.removesuffix("\r") for line in text.split("\n")]


def read_text(path: str) -> str:
    """The file `calibration.path`, in UTF-8 whatever the locale, without a byte-order mark.

    Raises UserError where there is none, or no such text in it.
    """
    if not Path(path).is_file():
        raise UserError(f"calibration.path={path} is not a file; give the one that holds the rows.")
    try:
        return Path(path).read_bytes().decode("utf-8-sig")  # bytes: universal newlines would turn a lone \r into a line's end
    except UnicodeDecodeError as error:
        raise UserError(f"calibration.path={path} is not a text file in UTF-8 ({error}); give JSON.") from error
    except OSError as error:
        raise UserError(f"calibration.path={path} cannot be read ({short_words(error)}).") from error


def open_image(row: Row, image: Any, folder: Path) -> Image.Image:
    """The image in RGB (`images.read_image`): from a file name in `folder`, the image itself, or `{"bytes": ..}` as data sets
    have it.

    Raises UserError, with the row's place, for a file that is not there and for whatever Pillow raises.
    """
    if isinstance(image, Image.Image):
        source, shown = image, f"the image of {image.size}"
    elif isinstance(image, dict) and isinstance(image.get("bytes"), bytes) and image["bytes"]:
        source, shown = image["bytes"], f"the image of {len(image['bytes'])} bytes"
    elif isinstance(image, str) and image:
        source = shown = folder / image
        with told_as(f"{row.source}, {row.where}: {shown!s:.200} cannot be looked for", "Fix the path."):
            if not source.is_file():
                raise row.error(f"{shown!s:.200} cannot be read as an image: there is no such file. Fix the path.")
    else:
        raise row.error(f"an image must be a file name or the image itself, got {_short(image)}.")
    with told_as(f"{row.source}, {row.where}: {shown!s:.200} cannot be read as an image", "Fix the path or the file."):
        return read_image(source)


def question_turns(row: Row, images: Sequence[Image.Image], question: Any, answer: Any) -> tuple[Turn, ...]:
    """The images, the question (None: they ask for themselves) and its answer; of several answers the first."""
    if isinstance(answer, list) and answer:
        answer = answer[0]
    if not isinstance(answer, str) or not isinstance(question, str | None):
        raise row.error(f"question and answer must be texts, got {_short(question)} and {_short(answer)}.")
    asked = Turn("user", (*images, *([question] if question else [])))
    return _checked(row, [asked, Turn("assistant", (answer,))])


def chat_turns(row: Row, messages: Any, images: Any, folder: Path) -> tuple[Turn, ...]:
    """The turns of `messages`, each `{"role", "content"}` or `{"from", "value"}` (LLaVA's); what follows the last answer is cut
    off.

    A content is a text or a list of parts `{"type": "text", "text"}` and `{"type": "image"}`. Its image is in the part
    (`"image": name`) or the next of `images`, as it is for every `<image>` in a text.
    """
    if not (isinstance(messages, list) and isinstance(images, list)):
        raise row.error(f"messages and images must be lists, got {_short(messages)} and {_short(images)}.")
    rest = list(images)
    turns = []
    for number, message in enumerate(messages, start=1):
        role, content = _role_and_content(row, number, message)
        parts = tuple(part for piece in _pieces(row, number, content) for part in _parts(row, piece, rest, folder))
        turns.append(Turn(role, parts))
    if rest:
        raise row.error(
            f"{len(images)} images come with it, but its messages show {len(images) - len(rest)}. Put {IMAGE_MARK} into a text "
            'where an image belongs, or a part {"type": "image"}.'
        )
    return _checked(row, turns)


def image_names(content: Any) -> Iterator[str]:
    """The image files that a row of JSON names, in any of the forms above."""
    if isinstance(content, list):
        for value in content:
            yield from image_names(value)
    elif isinstance(content, dict):
        for key, value in content.items():
            names = value if isinstance(value, list) else [value]
            yield from (n for n in names if key in _IMAGE_KEYS and isinstance(n, str))
            yield from image_names(value)


def _role_and_content(row: Row, number: int, message: Any) -> tuple[str, Any]:
    for role_key, content_key in (("role", "content"), ("from", "value")):
        if isinstance(message, dict) and role_key in message and content_key in message:
            role = _ROLES.get(str(message[role_key]))
            if role is None:
                raise row.error(f"message {number} is of the role {message[role_key]!r}; there are {', '.join(_ROLES)}.")
            return role, message[content_key]
    raise row.error(f'message {number} must be {{"role": .., "content": ..}}, got {_short(message)}.')


def _pieces(row: Row, number: int, content: Any) -> Iterator[dict[str, Any]]:
    """The content as parts with a type."""
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise row.error(f"the content of message {number} must be a text or a list of parts, got {_short(content)}.")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            for place, text in enumerate(part["text"].split(IMAGE_MARK)):
                if place:
                    yield {"type": "image"}
                if text := text.strip("\n"):  # LLaVA puts the mark on a line of its own; how it is set off is the template's part
                    yield {"type": "text", "text": text}
        elif kind == "image":
            yield part
        else:
            raise row.error(
                f'a part of message {number} must be {{"type": "text", "text": ..}} or {{"type": "image", "image": ..}}, '
                f"got {_short(part)}."
            )


def _parts(row: Row, piece: dict[str, Any], rest: list[Any], folder: Path) -> Iterator[str | Image.Image]:
    if piece["type"] == "text":
        yield piece["text"]
        return
    image = piece.get("image")
    if image is None:
        if not rest:
            raise row.error(
                f'its messages show more images than come with it: add them to "images" in their order, or take {IMAGE_MARK} out.'
            )
        image = rest.pop(0)
    yield open_image(row, image, folder)


def _checked(row: Row, turns: Sequence[Turn]) -> tuple[Turn, ...]:
    last = max((n for n, turn in enumerate(turns, start=1) if turn.role == "assistant"), default=0)
    roles = [turn.role for turn in turns[:last]]
    if not last or "user" not in roles[: roles.index("assistant")]:
        raise row.error(
            "no answer tokens: there is no answer to a user's message, and the loss is that of answers. Add one (a message of "
            f"the role assistant behind one of the role user), or leave the row out; its roles are {[t.role for t in turns]}."
        )
    for number, turn in enumerate(turns[:last], start=1):
        if turn.role == "assistant" and not turn.text.strip():
            raise row.error(f"no answer tokens: message {number} is an empty answer. Fill it, or leave the row out.")
        if turn.role == "assistant" and any(not isinstance(part, str) for part in turn.parts):
            raise row.error(f"message {number} is an answer and shows an image. Move the image into a user's message.")
        if not turn.parts:
            raise row.error(f"message {number} is empty. Give it a text or an image, or leave it out.")
    return tuple(turns[:last])


def _texts(content: Any) -> Iterator[str]:
    """All texts of a row of JSON, keys included."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, dict):
        for key, value in content.items():
            yield from (*_texts(key), *_texts(value))
    elif isinstance(content, list):
        for value in content:
            yield from _texts(value)


def _is_unicode(text: str) -> bool:
    """Whether it can be written: JSON may name half of a surrogate pair (`\\ud800`), which no tokenizer takes."""
    return text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
