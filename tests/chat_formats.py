"""Five well-known chat formats as small templates, and where in a rendered chat the assistant's words are.

Written from what the formats look like; nobody's template is copied. Each has a form with {% generation %} markers and
one without. `expected_spans` reads the rendered text by the format's own rules, and knows nothing of templates.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from tiny_data import WORDS, write_tokenizer

_CALLS = "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}"


@dataclass(frozen=True)
class Format:
    """source: with OPEN and CLOSE where the markers may stand. answers: matches a turn; its group 1 is the
    assistant's."""

    source: str
    special_tokens: tuple[str, ...]
    answers: str

    def template(self, *, markers: bool) -> str:
        opened, closed = ("{% generation %}", "{% endgeneration %}") if markers else ("", "")
        return self.source.replace("OPEN", opened).replace("CLOSE", closed)

    def expected_spans(self, text: str) -> list[tuple[int, int]]:
        return [match.span(1) for match in re.finditer(self.answers, text, re.DOTALL)]


FORMATS = {
    "chatml": Format(
        "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        f"{{% if m.role == 'assistant' %}}OPEN{{{{ m.content }}}}{_CALLS}<|im_end|>CLOSE{{% else %}}"
        "{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        ("<|im_start|>", "<|im_end|>"),
        r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)",
    ),
    "llama3": Format(
        "<|begin_of_text|>{% for m in messages %}"
        "{{ '<|start_header_id|>' + ('ipython' if m.role == 'tool' else m.role) + '<|end_header_id|>\n\n' }}"
        f"{{% if m.role == 'assistant' %}}OPEN{{{{ m.content | trim }}}}{_CALLS}<|eot_id|>CLOSE{{% else %}}"
        "{{ m.content | trim }}<|eot_id|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        r"<\|start_header_id\|>assistant<\|end_header_id\|>\n\n(.*?<\|eot_id\|>)",
    ),
    "mistral": Format(  # no header, no generation prompt
        "<s>{% set ns = namespace(system='') %}{% for m in messages %}"
        "{% if m.role == 'system' %}{% set ns.system = m.content + '\n\n' %}"
        "{% elif m.role == 'user' %}[INST] {{ ns.system + m.content }} [/INST]{% set ns.system = '' %}"
        "{% elif m.role == 'tool' %}[TOOL_RESULTS] {{ m.content }} [/TOOL_RESULTS]"
        f"{{% else %}}OPEN {{{{ m.content | trim }}}}{_CALLS}</s>CLOSE{{% endif %}}{{% endfor %}}",
        ("[INST]", "[/INST]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        r"(?:\[/INST\]|\[/TOOL_RESULTS\])(.*?</s>)",
    ),
    "zephyr": Format(  # its headers are plain text
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' }}"
        f"{{% if m.role == 'assistant' %}}OPEN{{{{ m.content }}}}{_CALLS}</s>CLOSE{{% else %}}"
        "{{ m.content }}</s>{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        (),
        r"<\|assistant\|>\n(.*?</s>)",
    ),
    "gemma": Format(
        "<s>{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}"
        "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
        "{% for m in rest %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else 'user') + '\n' }}"
        "{% if loop.first %}{{ first }}{% endif %}"
        f"{{% if m.role == 'assistant' %}}OPEN{{{{ m.content | trim }}}}{_CALLS}<end_of_turn>CLOSE{{% else %}}"
        "{{ m.content | trim }}<end_of_turn>{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        ("<start_of_turn>", "<end_of_turn>"),
        r"<start_of_turn>model\n(.*?<end_of_turn>)",
    ),
}

_CALL = [{"type": "function", "function": {"name": "word5", "arguments": {"word6": 7}}}]
CHATS = {
    "one question": [
        {"role": "user", "content": "word1 word2"},
        {"role": "assistant", "content": "word1 word2 na\u00efve \U0001f600."},
    ],
    "system prompt, several turns": [
        {"role": "system", "content": "word7 assistant"},
        {"role": "user", "content": "word1"},
        {"role": "assistant", "content": "word2\nword3"},
        {"role": "user", "content": "word2\nword3"},
        {"role": "assistant", "content": "word2\nword3\n"},
        {"role": "user", "content": "word4"},
    ],
    "tools": [
        {"role": "user", "content": "word1"},
        {"role": "assistant", "content": "", "tool_calls": _CALL},
        {"role": "tool", "content": '{"word6": 7}'},
        {"role": "assistant", "content": "word8"},
        {"role": "user", "content": "word9"},
        {"role": "assistant", "content": "word9"},
    ],
    "nobody answers": [{"role": "user", "content": "word1"}],
}


def write_chat_tokenizer(folder: Path, template: str, special_tokens: tuple[str, ...] = ()) -> str:
    """`write_tokenizer` with this chat template and these tokens besides."""
    from transformers import PreTrainedTokenizerFast

    write_tokenizer(folder, words=[*WORDS, "system", "user", "assistant", "model"])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_tokens(list(special_tokens), special_tokens=True)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return str(folder)
