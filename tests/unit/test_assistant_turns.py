"""Which tokens of a chat are the assistant's, in five formats, with {% generation %} markers and without."""

import functools
import json
from pathlib import Path

import pytest

from chat_formats import CHATS, FORMATS, write_chat_tokenizer
from megatron_lrc.config import ConfigError
from megatron_lrc.data.assistant_turns import MarkedIds, MarkedText, mark_tokens
from megatron_lrc.data.loaded_tokenizer import Tokenizer
from megatron_lrc.data.records import as_marked_chat
from megatron_lrc.data.tokenizers import load_tokenizer
from tokenizer_files import llama2_style, write_directory


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    @functools.cache
    def write(name: str, markers: bool) -> str:
        form = FORMATS[name]
        folder = tmp_path_factory.mktemp("tokenizer")
        return write_chat_tokenizer(folder, form.template(markers=markers), form.special_tokens)

    return write


def marked(folder: str, chat: list[dict]) -> MarkedIds:
    tokenizer = load_tokenizer(folder)
    return mark_tokens(as_marked_chat(chat, "messages", tokenizer.chat), tokenizer.encode_batch)


def expected_mask(folder: str, form_name: str, text: str) -> tuple[list[int], list[bool]]:
    """By transformers' tokenizer and its offsets: a token counts if all of it lies in an answer."""
    from transformers import AutoTokenizer

    encoded = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = FORMATS[form_name].expected_spans(text)
    offsets = encoded["offset_mapping"]
    return encoded["input_ids"], [
        any(first <= start and end <= last for first, last in spans) for start, end in offsets
    ]


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("markers", [True, False], ids=["markers", "prefixes"])
@pytest.mark.parametrize("name", FORMATS)
def test_the_answer_and_its_end_of_turn_are_the_assistants_and_nothing_else(folder_of, name, markers, chat):
    from transformers import AutoTokenizer

    folder, messages = folder_of(name, markers), CHATS[chat]
    transformers_own = AutoTokenizer.from_pretrained(folder)
    text = transformers_own.apply_chat_template(messages, tokenize=False)
    found = marked(folder, messages)
    ids, mask = expected_mask(folder, name, text)
    assert sum(mask) >= 3 * sum(message["role"] == "assistant" for message in messages)
    assert found.ids == ids and found.mask.tolist() == mask
    if markers:
        own = transformers_own.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        assert own["assistant_masks"] == found.mask.tolist()


def test_a_tokenizer_that_puts_a_blank_before_every_text_is_marked_alike(tmp_path):
    """Its parts, encoded one by one, are not the parts of the whole."""
    form = FORMATS["mistral"]
    folder = write_directory(tmp_path / "llama", llama2_style(), label="LlamaTokenizer", model_type="llama")
    (folder / "chat_template.jinja").write_text(form.template(markers=False))
    tokenizer = load_tokenizer(str(folder))
    for messages in CHATS.values():
        chat = as_marked_chat(messages, "messages", tokenizer.chat)
        found = mark_tokens(chat, tokenizer.encode_batch)
        (whole,) = tokenizer.encode_batch([chat.text])
        assert found.ids == whole
        backend = llama2_style().encode(chat.text, add_special_tokens=False)
        assert backend.ids == whole
        spans = form.expected_spans(chat.text)
        inside = [any(first <= start and end <= last for first, last in spans) for start, end in backend.offsets]
        assert found.mask.tolist() == inside


class Letters:
    """Encodes runs of one letter as one token, whatever their length: the letter's code times 100, and the length."""

    def __call__(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for letter in text:
            if ids and ids[-1] // 100 == ord(letter):
                ids[-1] += 1
            else:
                ids.append(100 * ord(letter) + 1)
        return ids


@pytest.mark.parametrize(
    "text, span, expected",
    [
        ("ab", (1, 2), [False, True]),
        ("aabbc", (2, 4), [False, True, False]),
        ("aabbc", (1, 4), [False, True, False]),  # the run of a belongs to both sides
        ("aabbc", (2, 3), [False, False, False]),
        ("aabbcca", (3, 6), [False, False, True, False]),
        ("aaa", (0, 3), [True]),
        ("", (0, 0), []),
    ],
)
def test_a_token_that_holds_text_of_both_does_not_count(text, span, expected):
    assert mark_tokens(MarkedText(text, (span,)), Letters()).mask.tolist() == expected


def refusal(folder: Path, template: str, messages: list[dict], *special_tokens: str) -> str:
    tokenizer: Tokenizer = load_tokenizer(write_chat_tokenizer(folder, template, special_tokens))
    with pytest.raises(ConfigError) as caught:
        as_marked_chat(messages, "messages", tokenizer.chat)
    message = str(caught.value)
    assert "\n" not in message and "--no-assistant-mask" in message
    assert tokenizer.chat is not None and tokenizer.chat(messages)  # it can be rendered all the same
    return message


def test_a_header_without_a_generation_prompt_is_refused(tmp_path):
    template = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    assert "no generation prompt" in refusal(tmp_path, template, CHATS["one question"])


def test_a_template_that_writes_earlier_turns_otherwise_is_refused(tmp_path):
    """As those that take the reasoning out of all answers but the last."""
    form = FORMATS["chatml"]
    template = form.template(markers=False).replace(
        "{{ m.content }}{%", "{% if loop.last %}thought {% endif %}{{ m.content }}{%", 1
    )
    chat = CHATS["system prompt, several turns"]
    assert "writes message 3, or what comes before it, otherwise" in refusal(
        tmp_path, template, chat, *form.special_tokens
    )


def test_an_answer_before_any_question_is_refused_where_nothing_can_be_rendered_before_it(tmp_path):
    form = FORMATS["chatml"]
    message = refusal(tmp_path, form.template(markers=False), CHATS["one question"][1:], *form.special_tokens)
    assert "refuses to render what comes before or up to message 1 by itself" in message


def test_a_prompt_that_is_written_for_users_only_is_no_prompt_elsewhere(tmp_path):
    form = FORMATS["chatml"]
    template = form.template(markers=False).replace(
        "{% if add_generation_prompt %}", "{% if add_generation_prompt and messages[-1].role == 'user' %}"
    )
    assert "where message 4 begins after its header" in refusal(
        tmp_path, template, CHATS["tools"], *form.special_tokens
    )


def test_sharegpts_and_parts_are_marked_as_the_messages_they_stand_for(folder_of):
    folder = folder_of("llama3", False)
    parts = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in CHATS["one question"]]
    names = {"user": "human", "assistant": "gpt"}
    turns = [{"from": names[m["role"]], "value": m["content"]} for m in CHATS["one question"]]
    wanted = marked(folder, CHATS["one question"])
    for form in (parts, turns):
        found = marked(folder, json.loads(json.dumps(form)))
        assert found.ids == wanted.ids and (found.mask == wanted.mask).all()
