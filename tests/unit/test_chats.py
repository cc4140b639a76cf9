"""Chats are rendered with the tokenizer's template; documents are joined as the flags say."""

import json

import pytest

import tiny_data
from preprocess_tool import check_refused, preprocess
from tiny_data import read_documents

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<s>{{ message.role }}: {{ message.content }}</s>{% endfor %}"
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
