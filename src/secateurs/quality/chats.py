"""Conversations -> tokens, written as the model's own chat template writes them; and which of these the assistant wrote."""

import re
from collections.abc import Sequence
from typing import Any

from secateurs.base.errors import CalibrationError
from secateurs.quality.documents import Chat

# a template that says itself what the assistant wrote
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")


def tokens(
    chats: Sequence[Chat], tokenizer: Any, wanted: int | None, answers: bool = False
) -> tuple[list[int], list[int] | None]:
    """The tokens of conversations, one after the other, until there are `wanted`; and of each, 1 if the assistant wrote it, else 0.

    answers: whether that is asked; None where it is not. An answer ends with what the template writes after it, the token that ends
    a turn among them. Raises CalibrationError for a conversation that the template refuses.
    """
    try:
        template = tokenizer.get_chat_template()
    except ValueError:
        raise CalibrationError(
            f"{chats[0].place} is a conversation, and the model's tokenizer has no chat template; give rows with text"
        ) from None
    marked = bool(_MARKS.search(template))
    if answers and not tokenizer.is_fast:
        raise CalibrationError(
            "this model's tokenizer does not say where its tokens are in a text, so answers cannot be found"
        )
    ids: list[int] = []
    marks: list[int] = []
    for chat in chats:
        text = _written(chat, tokenizer)
        if answers and marked:
            found = tokenizer.apply_chat_template(chat.messages, return_dict=True, return_assistant_tokens_mask=True)
            marks += found["assistant_masks"]
        elif answers:
            found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            spans = _answers(chat, text, tokenizer)
            marks += [int(any(a <= at < b for a, b in spans)) for at, _ in found["offset_mapping"]]
        else:
            found = tokenizer(text, add_special_tokens=False, verbose=False)
        ids += found["input_ids"]
        if wanted is not None and len(ids) >= wanted:
            break
    return ids, marks if answers else None


def _written(chat: Chat, tokenizer: Any, turns: int | None = None, answer: bool = False) -> str:
    """The first `turns` messages as text. answer: up to where the assistant's next one begins."""
    try:
        text: str = tokenizer.apply_chat_template(chat.messages[:turns], tokenize=False, add_generation_prompt=answer)
    # a template raises what it likes: jinja2's errors, or TypeError for content that is not as it expects
    except Exception as error:
        raise CalibrationError(f"{chat.place}: the model's chat template refuses this conversation: {error}") from None
    return text


def _answers(chat: Chat, text: str, tokenizer: Any) -> list[tuple[int, int]]:
    """Where the assistant's messages are in the conversation's text.

    From where a template says that an answer begins to where a conversation that stopped after it would end.
    """
    spans = []
    for i, message in enumerate(chat.messages):
        if message["role"] != "assistant":
            continue
        before, after = _written(chat, tokenizer, i, True) if i else "", _written(chat, tokenizer, i + 1)
        if not (text.startswith(before) and text.startswith(after) and len(before) <= len(after)):
            raise CalibrationError(
                f"{chat.place}: the model's chat template writes message {i + 1} in another way when more messages follow, so "
                "answers cannot be told from the rest; train on all tokens, or give a template with {% generation %}"
            )
        spans.append((len(before), len(after)))
    return spans
