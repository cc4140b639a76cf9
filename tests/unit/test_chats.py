"""Chats are rendered with the tokenizer's template; documents are joined as the flags say."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny_data
from megatron_lrc.config import ConfigError
from megatron_lrc.data import preparation
from megatron_lrc.data.chat_template import ChatTemplate
from megatron_lrc.data.records import as_text
from megatron_lrc.data.tokenizers import load_tokenizer
from megatron_lrc.hf.output_folder import copy_files
from preprocess_tool import check_refused, preprocess
from tiny_data import read_documents

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<s>{{ message.role }}: {{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
CHATS = [
    [{"role": "user", "content": "word1 word2"}, {"role": "assistant", "content": "word3 \u00e9"}],
    [{"role": "user", "content": "word4"}],
]


@pytest.fixture
def chat_tokenizer(tmp_path):
    folder = tmp_path / "tokenizer"
    tiny_data.write_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize("workers", [1, 2])
def test_chats_become_what_the_template_and_the_tokenizer_make_of_them(tmp_path, chat_tokenizer, workers):
    from transformers import AutoTokenizer

    source = write_lines(tmp_path / "chats.jsonl", [{"messages": chat} for chat in CHATS])
    flags = ("--tokenizer-model", chat_tokenizer, "--json-keys", "messages", "--workers", workers)
    assert preprocess("--input", source, *flags, "--output-prefix", tmp_path / "chats") == 0
    reference = AutoTokenizer.from_pretrained(chat_tokenizer)
    expected = [reference.apply_chat_template(chat, tokenize=False) for chat in CHATS]
    assert expected[1] == "<s>user: word4</s>"
    found = read_documents(tmp_path / "chats_messages_document")
    assert found == [reference(text, add_special_tokens=False)["input_ids"] for text in expected]
    assert found[1][0] == reference.bos_token_id and found[1][-1] == reference.eos_token_id


def test_documents_are_joined_as_eos_text_bos(tmp_path, chat_tokenizer):
    texts = ["word1 word2", "", "word3"]
    source = tiny_data.write_jsonl(tmp_path / "a.jsonl", texts)
    flags = ("--input", source, "--tokenizer-model", chat_tokenizer, "--output-prefix")
    assert preprocess(*flags, tmp_path / "plain") == 0
    assert preprocess(*flags, tmp_path / "joined", "--eos-before-bos-after") == 0
    plain = read_documents(tmp_path / "plain_text_document")
    assert read_documents(tmp_path / "joined_text_document") == [[1, *ids, 0] for ids in plain]
    manifest = json.loads((tmp_path / "joined_text_document.json").read_text())
    assert manifest["options"]["eos_before_bos_after"] and len(manifest["options"]["chat_template"]) == 64


def test_what_cannot_be_rendered_or_joined_is_one_sentence(tmp_path, chat_tokenizer, capsys):
    out = ("--output-prefix", tmp_path / "out")
    with_template = ("--tokenizer-model", chat_tokenizer, *out, "--json-keys", "messages")
    plain = tiny_data.write_tokenizer(tmp_path / "plain", eos=False)
    chats = write_lines(tmp_path / "chats.jsonl", [{"messages": chat} for chat in CHATS])
    without = ("--tokenizer-model", plain, *out, "--json-keys", "messages")
    check_refused(capsys, "chats.jsonl:1: the value of 'messages' is a chat, and", "--input", chats, *without)
    tool = write_lines(tmp_path / "tool.jsonl", [{"messages": [{"role": "tool", "content": "x"}]}])
    check_refused(capsys, "chat template refuses it (TemplateError: no tools here)", "--input", tool, *with_template)
    numbers = write_lines(tmp_path / "numbers.jsonl", [{"messages": [1, 2]}])
    check_refused(capsys, "is a list, but not of messages", "--input", numbers, *with_template)
    text = tiny_data.write_jsonl(tmp_path / "a.jsonl", ["word1"])
    both = ("--append-eod", "--eos-before-bos-after")
    check_refused(capsys, "two ways to join", "--input", text, "--tokenizer-model", chat_tokenizer, *out, *both)
    joined = ("--tokenizer-model", plain, *out, "--eos-before-bos-after")
    check_refused(capsys, "has no EOS token", "--input", text, *joined)


# ------------------------------------------------------------------------------------------------ what is rendered


@pytest.fixture
def chat_of(tmp_path, tokenizer_folder) -> Callable[..., ChatTemplate]:
    """The chat template of a tokenizer with this Jinja source, and with others by name."""

    def load(source: str | None = None, **others: str) -> ChatTemplate:
        shutil.copytree(tokenizer_folder, tmp_path / "with_template")
        if source is not None:
            (tmp_path / "with_template" / "chat_template.jinja").write_text(source)
        for name, other in others.items():
            (tmp_path / "with_template" / "additional_chat_templates").mkdir(exist_ok=True)
            (tmp_path / "with_template" / "additional_chat_templates" / f"{name}.jinja").write_text(other)
        chat = load_tokenizer(str(tmp_path / "with_template")).chat
        assert chat is not None
        return chat

    return load


def messages(*contents: Any, role: str = "user") -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for content in contents]


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


STRINGS = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{% endfor %}"
ONLY_PARTS = (
    "{% for m in messages %}<{{ m.role }}>{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}"
    "{% endif %}{% endfor %}{% endfor %}"
)
EITHER = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text }};{% endfor %}{% endif %}{% endfor %}"
)
PARTS_OF_USERS = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'user' and m.content is not string %}"
    "{% for part in m.content %}{{ part.text }};{% endfor %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


FIRST_PART = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is not string or m.role == 'user' %}{{ m.content[0].text }}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    "template, content, expected",
    [
        (STRINGS, parts("a ", "b"), "a b"),
        (STRINGS, [], ""),
        (STRINGS.replace("trim", "string | tojson"), parts("a", "b"), '"ab"'),
        (EITHER, "a", "a"),
        (EITHER, parts("a", "b"), "a;b;"),
        (ONLY_PARTS, "a", "a"),  # its characters have no type: transformers prints none of them
        (ONLY_PARTS, parts("a", "b"), "ab"),
        (FIRST_PART, "a", "a"),
        (FIRST_PART, parts("a", "b"), "ab"),
    ],
)
def test_content_is_given_in_a_form_that_the_template_prints(chat_of, template, content, expected):
    assert as_text(messages(content), "messages", chat_of(template)) == f"<user>{expected}"


def test_the_form_of_content_is_found_for_each_role(chat_of):
    chat = messages(parts("a", "b")) + messages(parts("c", "d"), role="assistant") + messages(parts("e"), role="tool")
    assert as_text(chat, "messages", chat_of(PARTS_OF_USERS)) == "<user>a;b;<assistant>cd<tool>e"


def test_parts_are_not_lost_where_only_the_first_is_printed(chat_of):
    chat = (
        messages(parts("s", "t"), role="system")
        + messages(parts("a", "b"))
        + messages(parts("c", "d"), role="assistant")
    )
    assert as_text(chat, "messages", chat_of(FIRST_PART)) == "<system>st<user>ab<assistant>cd"


def test_null_is_no_text_and_no_field(chat_of):
    calls = "{% if m.tool_calls is defined %}[{{ m.tool_calls[0].id }}]{% endif %}"
    template = STRINGS.replace("{% endfor %}", calls + "{% endfor %}")
    call: dict[str, Any] = {"role": "assistant", "tool_calls": [{"id": 7}]}
    chat = [call, {**call, "content": None}, {"role": "assistant", "content": None, "tool_calls": None, "name": None}]
    assert as_text(chat, "messages", chat_of(template)) == "<assistant>[7]<assistant>[7]<assistant>"


@pytest.mark.parametrize(
    "message, reason",
    [
        ({"role": "user", "content": 7}, "message 2 of 'messages' has a number as its content, which is not text"),
        ({"role": "user", "content": False}, "has false as its content"),
        ({"role": "user", "content": {"text": "x"}}, "has an object as its content"),
        ({"role": "user", "content": ["x"]}, "has text among the parts of its content"),
        ({"role": "user", "content": [{"type": "image", "image": None}]}, "has content of type 'image'"),
        ({"role": "user", "content": [{"type": "text", "text": None}]}, "has content of type 'text'"),
        ({"role": "user", "text": "x"}, "has no content, only role, text"),
        ({"role": 1, "content": "x"}, "has a number as its role"),
    ],
)
def test_what_is_no_text_is_a_bad_line(chat_of, message, reason):
    with pytest.raises(ConfigError) as caught:
        as_text([*messages("a"), message], "messages", chat_of(STRINGS))
    assert reason in str(caught.value)


def turns(*pairs: tuple[Any, Any], **more: Any) -> list[dict[str, Any]]:
    return [{"from": speaker, "value": value, **more} for speaker, value in pairs]


def test_sharegpt_turns_are_the_messages_of_their_roles(chat_of):
    """OpenHermes-2.5's rows, whose other fields (null where a table has them) are no text."""
    chat = turns(("system", "s"), ("human", "a"), ("gpt", "b"), ("user", "c"), ("assistant", None), weight=None)
    template = STRINGS.replace("{% endfor %}", "{{ m.weight is defined }}{% endfor %}")
    expected = "<system>sFalse<user>aFalse<assistant>bFalse<user>cFalse<assistant>False"
    assert as_text([*chat[:-1], {**chat[-1], "weight": 0}], "conversations", chat_of(template)) == expected


def test_a_table_of_both_forms_has_the_columns_of_the_other_null(chat_of):
    other = {"role": None, "content": None}
    chat = chat_of(STRINGS)
    assert as_text(turns(("human", "a"), **other), "messages", chat) == "<user>a"
    assert as_text([{**messages("a")[0], "from": None, "value": None}], "messages", chat) == "<user>a"


@pytest.mark.parametrize(
    "message, reason",
    [
        (
            {"from": "narrator", "value": "x"},
            "message 2 of 'c' is from 'narrator'; who speaks is expected to be one of",
        ),
        ({"from": 1, "value": "x"}, "message 2 of 'c' is from a number"),
        ({"from": "gpt", "text": "x"}, "message 2 of 'c' has no value, only from, text"),
        ({"from": "gpt", "value": 5}, "message 2 of 'c' has a number as its content"),
        ({"role": "user", "content": "x"}, "the messages of 'c' are of two forms"),
        ({"value": "x"}, "the value of 'c' is a list, but not of messages"),
    ],
)
def test_what_is_no_sharegpt_turn_is_a_bad_line(chat_of, message, reason):
    with pytest.raises(ConfigError) as caught:
        as_text([*turns(("human", "a")), message], "c", chat_of(STRINGS))
    assert reason in str(caught.value)


# ---------------------------------------------------------------------------------------------- which template and day


TODAY = (
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y %H:%M') %}{% endif %}"
    "{{ date_string }}{% macro year() %} {{ strftime_now('%Y') }}{% endmacro %}{{ year() }}"
)


def test_todays_date_is_a_fixed_one(chat_of):
    chat = chat_of(TODAY)
    assert chat(messages("x")) == "26 Jul 2024 00:00 2024"
    assert chat.with_options(name=None, date="2025-01-02")(messages("x")) == "02 Jan 2025 2025"
    assert chat(messages("x")) == "26 Jul 2024 00:00 2024"


def test_a_template_that_has_a_date_keeps_it_unless_one_is_given(chat_of):
    own = "{% if not date_string is defined %}{% set date_string = '1 Dec 2023' %}{% endif %}"
    chat = chat_of(own + "{{ date_string }}")
    assert chat(messages("x")) == "1 Dec 2023"
    assert chat.with_options(name=None, date="2025-01-02")(messages("x")) == "02 Jan 2025"


def test_only_our_renderings_have_the_fixed_date(chat_of):
    from transformers import AutoTokenizer

    source = "\n  {% for m in messages %}\n  {{ m.content }}\n{% endfor %}\n{{ strftime_now('%Y') > '2024' }}\n\n"
    chat = chat_of(source)
    assert chat(messages("x")) == "\n  x\nFalse\n"
    elsewhere = AutoTokenizer.from_pretrained(chat.path).apply_chat_template(messages("x"), tokenize=False)
    assert elsewhere == "\n  x\nTrue\n"


@pytest.mark.parametrize("chance", ["{{ [1, 2, 3] | random }}", "{{ lipsum() }}"])
def test_a_template_that_draws_random_numbers_is_refused(chat_of, chance):
    with pytest.raises(ConfigError, match="it draws random numbers"):
        chat_of(chance)(messages("x"))


@pytest.mark.parametrize(
    "printed",
    ["strftime_now", "messages[0].content.upper", "cycler('a')", "messages | map('length')", "'%s' % raise_exception"],
)
def test_a_template_that_prints_an_object_of_python_is_refused(chat_of, printed):
    """It would be other text in every worker process."""
    with pytest.raises(ConfigError, match=r"it prints an object of Python and its place in memory \(... at 0x\w+>\)"):
        chat_of(f"{{{{ {printed} }}}}")(messages("x"))


def test_a_chat_about_an_object_of_python_is_a_chat(chat_of):
    place = "What is <function f at 0x7f2b3c0d5e10>?"
    chat = chat_of("{% for m in messages %}{{ m.content }}{% endfor %}<object at 0x00000000>")
    assert chat(messages(place)) == f"{place}<object at 0x00000000>"
    assert chat(messages(parts("a", place))) == f"a{place}<object at 0x00000000>"


@pytest.mark.parametrize("format", ["%s", "%Y %s", "%%%s", "%-s", "%_Z"])
def test_a_template_that_asks_for_a_time_of_the_machines_zone_is_refused(chat_of, format):
    with pytest.raises(ConfigError, match="depends on the time zone of the machine"):
        chat_of(f"{{{{ strftime_now('{format}') }}}}")(messages("x"))


def test_times_of_no_zone_are_printed(chat_of):
    assert chat_of("{{ strftime_now('%%s%%Y %S %-d%Z%z s') }}")(messages("x")) == "%s%Y 00 26 s"


def test_the_default_template_is_taken_or_the_one_that_is_named(chat_of):
    chat = chat_of("default: {{ messages[0].content }}", tool_use="tools: {{ messages[0].content }}")
    assert chat(messages("x")) == "default: x"
    assert chat.with_options(name="tool_use", date=None)(messages("x")) == "tools: x"
    with pytest.raises(ConfigError, match=r"--chat-template-name rag: .* Give one of default, tool_use\."):
        chat.with_options(name="rag", date=None)
    with pytest.raises(ConfigError, match="--chat-date 2.1.2025 is no date. Give one such as 2024-07-26"):
        chat.with_options(name=None, date="2.1.2025")


def test_without_a_default_one_has_to_be_named_if_there_are_chats(chat_of):
    chat = chat_of(a="A", b="B")
    assert as_text("no chat", "text", chat) == "no chat"
    with pytest.raises(ConfigError, match=r"several chat templates \(a, b\), none of them named default; choose one"):
        as_text(messages("x"), "messages", chat)
    assert chat.with_options(name="b", date=None)(messages("x")) == "B"


def test_date_and_name_are_in_the_manifest_and_another_date_is_other_data(tmp_path, chat_of):
    folder = chat_of(TODAY, short="{{ strftime_now('%y') }}").path
    source = write_lines(tmp_path / "chats.jsonl", [{"messages": CHATS[0]}])
    flags = ("--input", source, "--tokenizer-model", folder, "--output-prefix", tmp_path / "o")
    identities = []
    for more, date, name in (
        ((), "2024-07-26", "default"),
        (("--chat-date", "2025-01-02"), "2025-01-02", "default"),
        (("--chat-date", "2025-01-02", "--chat-template-name", "short"), "2025-01-02", "short"),
    ):
        assert preprocess(*flags, "--json-keys", "messages", "--no-assistant-mask", *more) == 0
        recorded = json.loads((tmp_path / "o_messages_document.json").read_text())["options"]
        assert (recorded["chat_date"], recorded["chat_template_name"]) == (date, name)
        values = dict(zip(("chat_date", "chat_template_name"), (more[1::2]), strict=False))
        options = preparation.IndexingOptions(input=[], output_prefix="", tokenizer_model=folder, **values)
        tokenizer = preparation.with_chat_flags(load_tokenizer(folder), options)
        identities.append(json.dumps(preparation.identity_of(options, [], tokenizer)))
    assert len(set(identities)) == 3


def test_chat_flags_without_a_template_are_refused(tmp_path, tokenizer_folder, capsys):
    source = tiny_data.write_jsonl(tmp_path / "a.jsonl", ["x"])
    flags = ("--input", source, "--tokenizer-model", tokenizer_folder, "--output-prefix", tmp_path / "o")
    check_refused(capsys, "are for tokenizers with a chat template", *flags, "--chat-date", "2025-01-02")


def test_exports_and_conversions_keep_every_template(chat_of, tmp_path):
    folder = Path(chat_of("D", tool_use="T").path)
    for name in ("tokenizer.model.v3", "tekken.json", "preprocessor_config.json", "model.safetensors"):
        (folder / name).write_text("")
    (tmp_path / "copy").mkdir()
    copy_files(folder, tmp_path / "copy")
    left_out = {"preprocessor_config.json", "model.safetensors"}
    names = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    assert {str(path.relative_to(tmp_path / "copy")) for path in (tmp_path / "copy").rglob("*")} == names - left_out
    copied = load_tokenizer(str(tmp_path / "copy")).chat
    assert copied is not None and copied.templates == {"default": "D", "tool_use": "T"}
