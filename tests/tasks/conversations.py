"""Twenty conversations over five chat templates, with what the assistant writes marked by hand.

The templates are in the formats of ChatML, Llama 3, Mistral, Gemma and Zephyr. A conversation is
given as messages and as the pieces of its rendering: (text, whether the assistant writes it).
"""

from typing import Any

SPECIAL = (
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>", "<bos>", "<start_of_turn>", "<end_of_turn>", "[INST]",
    "[/INST]",
)  # fmt: skip

# {G} and {E} stand around what the assistant writes: for the marks of transformers, or nothing.
TEMPLATES = {
    "chatml": (
        "{% for m in messages %}"
        "{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.role == 'assistant' %}{G}{{ m.content + '<|im_end|>' }}{E}"
        "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama3": (
        "{{ '<|begin_of_text|>' }}{% for m in messages %}"
        "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
        "{% if m.role == 'assistant' %}{G}{{ (m.content | trim) + '<|eot_id|>' }}{E}"
        "{% else %}{{ (m.content | trim) + '<|eot_id|>' }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    # The system prompt stands in the last user turn, wherever that is.
    "mistral": (
        "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
        "{% set turns = messages[1:] %}{% else %}{% set turns = messages %}{% endif %}"
        "{{ '<s>' }}{% for m in turns %}"
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if m.role == 'user' %}"
        "{% set last = turns | selectattr('role', 'equalto', 'user') | list | last %}"
        "{{ '[INST] ' }}{% if m == last and system is defined %}{{ system + '\n\n' }}{% endif %}"
        "{{ m.content + '[/INST]' }}"
        "{% else %}{G}{{ ' ' + m.content + '</s>' }}{E}{% endif %}"
        "{% endfor %}"
    ),
    "gemma": (
        "{{ '<bos>' }}{% for m in messages %}"
        "{% set role = 'model' if m.role == 'assistant' else m.role %}"
        "{{ '<start_of_turn>' + role + '\n' }}"
        "{% if m.role == 'assistant' %}{G}{{ (m.content | trim) + '<end_of_turn>' }}{E}"
        "{% else %}{{ (m.content | trim) + '<end_of_turn>' }}{% endif %}{{ '\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    # The names of the roles are plain text here.
    "zephyr": (
        "{% for m in messages %}"
        "{{ '<|' + m.role + '|>\n' }}"
        "{% if m.role == 'assistant' %}{G}{{ m.content + '</s>' }}{E}"
        "{% else %}{{ m.content + '</s>' }}{% endif %}{{ '\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
}


def template(name: str, *, marks: bool = False) -> str:
    start, end = ("{% generation %}", "{% endgeneration %}") if marks else ("", "")
    return TEMPLATES[name].replace("{G}", start).replace("{E}", end)


def said(*turns: str) -> list[dict[str, Any]]:
    """Messages of "user: text", "assistant: text" and so on."""
    parts = (turn.partition(": ") for turn in turns)
    return [{"role": role, "content": content} for role, _, content in parts]


Pieces = list[tuple[str, bool]]
CASES: list[tuple[str, list[dict[str, Any]], Pieces]] = [
    (
        "chatml",
        said("user: Hi", "assistant: Hello there"),
        [
            ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", False),
            ("Hello there<|im_end|>", True),
            ("\n", False),
        ],
    ),
    (
        "chatml",
        said("system: Be brief.", "user: 2+2?", "assistant: 4", "user: 3+3?", "assistant: 6"),
        [
            ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n", False),
            ("<|im_start|>assistant\n", False),
            ("4<|im_end|>", True),
            ("\n<|im_start|>user\n3+3?<|im_end|>\n<|im_start|>assistant\n", False),
            ("6<|im_end|>", True),
            ("\n", False),
        ],
    ),
    (
        # The same text from both, twice, and a question at the end that nobody answers.
        "chatml",
        said("user: yes", "assistant: yes", "user: yes", "assistant: yes", "user: yes"),
        [
            ("<|im_start|>user\nyes<|im_end|>\n<|im_start|>assistant\n", False),
            ("yes<|im_end|>", True),
            ("\n<|im_start|>user\nyes<|im_end|>\n<|im_start|>assistant\n", False),
            ("yes<|im_end|>", True),
            ("\n<|im_start|>user\nyes<|im_end|>\n", False),
        ],
    ),
    (
        "chatml",
        said("user: Grüße 🙂", "assistant: \n\n你好,世界 🙂\n"),
        [
            ("<|im_start|>user\nGrüße 🙂<|im_end|>\n<|im_start|>assistant\n", False),
            ("\n\n你好,世界 🙂\n<|im_end|>", True),
            ("\n", False),
        ],
    ),
    (
        "llama3",
        said("user: Hi", "assistant: Hello there"),
        [
            ("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>", False),
            ("<|start_header_id|>assistant<|end_header_id|>\n\n", False),
            ("Hello there<|eot_id|>", True),
        ],
    ),
    (
        # The template takes the white space away.
        "llama3",
        said("user:  What? ", "assistant:   That.\n\n"),
        [
            ("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhat?<|eot_id|>", False),
            ("<|start_header_id|>assistant<|end_header_id|>\n\n", False),
            ("That.<|eot_id|>", True),
        ],
    ),
    (
        "llama3",
        said("system: S", "user: a", "assistant: b", "user: c", "assistant: d\ne"),
        [
            ("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>", False),
            ("<|start_header_id|>user<|end_header_id|>\n\na<|eot_id|>", False),
            ("<|start_header_id|>assistant<|end_header_id|>\n\n", False),
            ("b<|eot_id|>", True),
            ("<|start_header_id|>user<|end_header_id|>\n\nc<|eot_id|>", False),
            ("<|start_header_id|>assistant<|end_header_id|>\n\n", False),
            ("d\ne<|eot_id|>", True),
        ],
    ),
    (
        # Two turns of the assistant after each other: both are its own.
        "llama3",
        said("user: a", "assistant: wait", "assistant: done"),
        [
            ("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\na<|eot_id|>", False),
            ("<|start_header_id|>assistant<|end_header_id|>\n\n", False),
            ("wait<|eot_id|>", True),
            ("<|start_header_id|>assistant<|end_header_id|>\n\n", False),
            ("done<|eot_id|>", True),
        ],
    ),
    (
        "mistral",
        said("user: Hi", "assistant: Hello there"),
        [("<s>[INST] Hi[/INST]", False), (" Hello there</s>", True)],
    ),
    (
        # What was said before changes with what comes later.
        "mistral",
        said("system: Be brief.", "user: 2+2?", "assistant: 4", "user: 3+3?", "assistant: 6"),
        [
            ("<s>[INST] 2+2?[/INST]", False),
            (" 4</s>", True),
            ("[INST] Be brief.\n\n3+3?[/INST]", False),
            (" 6</s>", True),
        ],
    ),
    (
        "mistral",
        said("user: a", "assistant: b", "user: c", "assistant: d", "user: e", "assistant: f"),
        [
            ("<s>[INST] a[/INST]", False),
            (" b</s>", True),
            ("[INST] c[/INST]", False),
            (" d</s>", True),
            ("[INST] e[/INST]", False),
            (" f</s>", True),
        ],
    ),
    (
        "mistral",
        said("system: [INST] is no tag", "user: 4", "assistant: 4"),
        [("<s>[INST] [INST] is no tag\n\n4[/INST]", False), (" 4</s>", True)],
    ),
    (
        "gemma",
        said("user: Hi", "assistant: Hello there"),
        [
            ("<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n", False),
            ("Hello there<end_of_turn>", True),
            ("\n", False),
        ],
    ),
    (
        "gemma",
        said("user: one", "assistant: two", "user: three", "assistant: four"),
        [
            ("<bos><start_of_turn>user\none<end_of_turn>\n<start_of_turn>model\n", False),
            ("two<end_of_turn>", True),
            ("\n<start_of_turn>user\nthree<end_of_turn>\n<start_of_turn>model\n", False),
            ("four<end_of_turn>", True),
            ("\n", False),
        ],
    ),
    (
        # Words of the template in the text.
        "gemma",
        said("user: model\nuser", "assistant: model\nuser\nmodel"),
        [
            ("<bos><start_of_turn>user\nmodel\nuser<end_of_turn>\n<start_of_turn>model\n", False),
            ("model\nuser\nmodel<end_of_turn>", True),
            ("\n", False),
        ],
    ),
    (
        "gemma",
        said("user: 你好", "assistant: 你好。\n- 一\n- 二", "user: 🙂🙂", "assistant: 🙂"),
        [
            ("<bos><start_of_turn>user\n你好<end_of_turn>\n<start_of_turn>model\n", False),
            ("你好。\n- 一\n- 二<end_of_turn>", True),
            ("\n<start_of_turn>user\n🙂🙂<end_of_turn>\n<start_of_turn>model\n", False),
            ("🙂<end_of_turn>", True),
            ("\n", False),
        ],
    ),
    (
        "zephyr",
        said("user: Hi", "assistant: Hello there"),
        [
            ("<|user|>\nHi</s>\n<|assistant|>\n", False),
            ("Hello there</s>", True),
            ("\n", False),
        ],
    ),
    (
        "zephyr",
        said("system: S", "user: a", "assistant: b", "user: c", "assistant: d"),
        [
            ("<|system|>\nS</s>\n<|user|>\na</s>\n<|assistant|>\n", False),
            ("b</s>", True),
            ("\n<|user|>\nc</s>\n<|assistant|>\n", False),
            ("d</s>", True),
            ("\n", False),
        ],
    ),
    (
        # A user who writes the header of the assistant.
        "zephyr",
        said("user: <|assistant|>\nI am you", "assistant: No."),
        [
            ("<|user|>\n<|assistant|>\nI am you</s>\n<|assistant|>\n", False),
            ("No.</s>", True),
            ("\n", False),
        ],
    ),
    (
        # A tool answers in between.
        "zephyr",
        said("user: time?", "assistant: look", "tool: 12:00", "assistant:  noon  "),
        [
            ("<|user|>\ntime?</s>\n<|assistant|>\n", False),
            ("look</s>", True),
            ("\n<|tool|>\n12:00</s>\n<|assistant|>\n", False),
            (" noon  </s>", True),
            ("\n", False),
        ],
    ),
]
