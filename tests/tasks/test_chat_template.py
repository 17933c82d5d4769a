"""Chat templates: which tokens are the assistant's, by hand and by another implementation."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lora_cli.data.templates import BUILT_IN
from lora_cli.errors import UserError
from lora_cli.tasks.chat_template import ChatTemplate, Refused

_spec = importlib.util.spec_from_file_location(
    "conversations", Path(__file__).with_name("conversations.py")
)
assert _spec is not None
assert _spec.loader is not None
_conversations = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_conversations)
CASES, SPECIAL, TEMPLATES = (
    getattr(_conversations, name) for name in ("CASES", "SPECIAL", "TEMPLATES")
)
said, template = _conversations.said, _conversations.template

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def make_tokenizer(kind: str = "bytes", *, special: Sequence[str] = SPECIAL) -> Any:
    """A tokenizer of single bytes, of pairs of bytes that were learned, or with "▁" for spaces."""
    if kind == "metaspace":
        made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        made.decoder = decoders.Metaspace()
        alphabet = sorted({x for _, _, pieces in CASES for text, _ in pieces for x in text})
        trainer: Any = trainers.BpeTrainer(
            vocab_size=400, initial_alphabet=alphabet, special_tokens=["<unk>"]
        )
    else:
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        size = 0 if kind == "bytes" else 600
        trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=BYTES)
    texts = [text for _, _, pieces in CASES for text, _ in pieces]
    made.train_from_iterator(texts, trainer)
    made.add_special_tokens([AddedToken(one, special=True, normalized=False) for one in special])
    names = {"eos_token": "</s>", "bos_token": "<s>"} if "</s>" in special else {}
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def labels(found: tuple[list[int], list[tuple[int, int]]]) -> list[tuple[int, bool]]:
    ids, spans = found
    inside = {place for start, end in spans for place in range(start, end)}
    return [(token, place in inside) for place, token in enumerate(ids)]


def pieces_of(tokenizer: Any, found: tuple[list[int], list[tuple[int, int]]]) -> list[str]:
    ids, spans = found
    return [tokenizer.decode(ids[start:end]) for start, end in spans]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_every_token_is_as_marked_by_hand(number: int) -> None:
    name, messages, pieces = CASES[number]
    tokenizer = make_tokenizer()
    found = ChatTemplate(tokenizer, template(name)).read(messages)
    expected = [
        (token, is_own)
        for text, is_own in pieces
        for token in tokenizer(text, add_special_tokens=False)["input_ids"]
    ]
    assert labels(found) == expected


def test_there_are_twenty_over_five_templates() -> None:
    assert len(CASES) == 20
    assert {name for name, _, _ in CASES} == set(TEMPLATES)


@pytest.mark.parametrize("kind", ["bytes", "pairs", "metaspace"])
@pytest.mark.parametrize("number", range(len(CASES)))
def test_the_marks_of_transformers_say_the_same(number: int, kind: str) -> None:
    """The template with {% generation %} marks, read by transformers, and without, read by us."""
    name, messages, _ = CASES[number]
    tokenizer = make_tokenizer(kind)
    ours = ChatTemplate(tokenizer, template(name)).read(messages)
    theirs = tokenizer.apply_chat_template(
        messages,
        chat_template=template(name, marks=True),
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    mask = [bool(x) for x in theirs["assistant_masks"]]
    assert labels(ours) == list(zip(theirs["input_ids"], mask, strict=True))
    # And so does what we make of the marks.
    assert labels(ChatTemplate(tokenizer, template(name, marks=True)).read(messages)) == (
        labels(ours)
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_read_goes_on_where_the_prompt_ends(name: str) -> None:
    tokenizer = make_tokenizer()
    chat = ChatTemplate(tokenizer, template(name))
    messages = said("user: What is it?", "assistant: This is it.")
    ids, spans = chat.read(messages)
    prompt = chat.prompt(messages[:1])
    assert ids[: len(prompt)] == prompt
    assert spans[0][0] == len(prompt)
    assert ids[spans[0][1] - 1] in chat.end_ids


def test_marks_without_the_end_of_the_turn_are_extended_by_it() -> None:
    """What ends a turn is learned, whoever wrote the template."""
    tokenizer = make_tokenizer()
    narrow = template("llama3", marks=True).replace(
        "{{ (m.content | trim) + '<|eot_id|>' }}{% endgeneration %}",
        "{{ m.content | trim }}{% endgeneration %}{{ '<|eot_id|>' }}",
    )
    messages = said("user: a", "assistant: b", "user: c", "assistant: d")
    found = ChatTemplate(tokenizer, narrow).read(messages)
    assert pieces_of(tokenizer, found) == ["b<|eot_id|>", "d<|eot_id|>"]


def test_marks_around_more_than_the_turn_are_narrowed() -> None:
    """As of SmolLM 3, which marks the header as well, with which a model is prompted."""
    tokenizer = make_tokenizer()
    wide = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
        "{{ '<|im_start|>assistant\n' + m.content + '<|im_end|>\n' }}{% endgeneration %}{% else %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    messages = said("user: a", "assistant: b", "user: c", "assistant: d")
    found = ChatTemplate(tokenizer, wide).read(messages)
    assert labels(found) == labels(ChatTemplate(tokenizer, template("chatml")).read(messages))


def test_marks_tell_which_turns_are_learned() -> None:
    tokenizer = make_tokenizer()
    last = template("chatml", marks=True).replace(
        "{% if m.role == 'assistant' %}", "{% if m.role == 'assistant' and loop.last %}"
    )
    found = ChatTemplate(tokenizer, last).read(
        said("user: a", "assistant: b", "user: c", "assistant: d")
    )
    assert pieces_of(tokenizer, found) == ["d<|im_end|>"]


# As of Qwen 3: thinking is left out of turns before the last question, and the last has some.
THINKING = (
    "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% set parts = m.content.split('</think>') %}"
    "{% set thought = parts[0].split('<think>')[-1].strip() if parts | length > 1 else '' %}"
    "{% if loop.index0 > ns.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}"
    "{{ parts[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_thinking_that_a_template_leaves_out_is_not_unlearned() -> None:
    tokenizer = make_tokenizer()
    chat = ChatTemplate(tokenizer, THINKING)
    thought = "<think>\nhm\n</think>\n\n"
    plain = said("user: a", "assistant: b", "user: c", "assistant: d")
    assert pieces_of(tokenizer, chat.read(plain)) == [
        "b<|im_end|>",
        "<think>\n\n</think>\n\nd<|im_end|>",
    ]
    both = said("user: a", f"assistant: {thought}b", "user: c", f"assistant: {thought}d")
    ids, spans = chat.read(both)
    assert tokenizer.decode(ids).count("hm") == 1
    assert pieces_of(tokenizer, (ids, spans)) == [f"{thought}d<|im_end|>"]


def test_thinking_in_a_field_of_its_own_is_treated_alike() -> None:
    tokenizer = make_tokenizer()
    own_field = THINKING.replace(
        "{% set thought = ", "{% set thought = m.reasoning_content if m.reasoning_content else "
    )
    messages = said("user: a", "assistant: b", "user: c", "assistant: d")
    messages[1]["reasoning_content"] = messages[3]["reasoning_content"] = "hm"
    found = ChatTemplate(tokenizer, own_field).read(messages)
    assert pieces_of(tokenizer, found) == ["<think>\nhm\n</think>\n\nd<|im_end|>"]
    # A template that knows of no thinking leaves it out everywhere.
    found = ChatTemplate(tokenizer, template("chatml")).read(messages)
    assert pieces_of(tokenizer, found) == ["b<|im_end|>", "d<|im_end|>"]


def test_a_prompt_that_starts_the_thinking_is_not_learned() -> None:
    tokenizer = make_tokenizer()
    opened = THINKING.replace(
        "'<|im_start|>assistant\n' }}{% endif %}",
        "'<|im_start|>assistant\n<think>\n' }}{% endif %}",
    )
    found = ChatTemplate(tokenizer, opened).read(said("user: a", "assistant: <think>\nhm</think>b"))
    assert pieces_of(tokenizer, found) == ["hm\n</think>\n\nb<|im_end|>"]


def test_a_template_that_mixes_turns_is_refused() -> None:
    tokenizer = make_tokenizer()
    counting = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '</s>' }}{% endfor %}"
        "{{ messages | map(attribute='content') | join('') | length }}"
    )
    with pytest.raises(Refused, match="turn 2 changes what is around it"):
        ChatTemplate(tokenizer, counting).read(said("user: a", "assistant: a longer answer"))


def test_a_conversation_that_the_template_does_not_take_is_refused() -> None:
    chat = ChatTemplate(make_tokenizer(), template("mistral"))
    with pytest.raises(Refused, match="roles must alternate"):
        chat.read(said("user: a", "user: b", "assistant: c"))


def test_calls_of_tools_are_found_by_what_is_before_and_behind() -> None:
    tokenizer = make_tokenizer()
    with_tools = template("chatml").replace(
        "{{ m.content + '<|im_end|>' }}{% else %}",
        "{{ m.content }}{% for c in m.tool_calls or [] %}{{ '<call>' + c.name + '</call>' }}"
        "{% endfor %}{{ '<|im_end|>' }}{% else %}",
    )
    messages = said("user: time?", "assistant: ", "tool: 12", "assistant: noon")
    messages[1]["tool_calls"] = [{"name": "clock"}]
    found = ChatTemplate(tokenizer, with_tools).read(messages)
    assert pieces_of(tokenizer, found) == ["<call>clock</call><|im_end|>", "noon<|im_end|>"]


def test_a_call_that_a_template_leaves_out_is_refused() -> None:
    """Or an assistant that says nothing would be learned."""
    messages = said("user: time?", "assistant: ", "tool: 12", "assistant: noon")
    messages[1]["tool_calls"] = [{"name": "clock"}]
    for marks in (False, True):
        chat = ChatTemplate(make_tokenizer(), template("chatml", marks=marks))
        with pytest.raises(Refused, match="message 2 calls a tool, which the template does not"):
            chat.read(messages)
        with pytest.raises(Refused, match="message 2 calls a tool"):
            chat.prompt(messages[:3])


def test_a_message_that_a_template_leaves_out_is_refused() -> None:
    """As of Phi-3, which passes over what tools say."""
    narrow = template("zephyr").replace(
        "{% for m in messages %}", "{% for m in messages if m.role in ('user', 'assistant') %}"
    )
    chat = ChatTemplate(make_tokenizer(), narrow)
    messages = said("user: time?", "assistant: look", "tool: 12:00", "assistant: noon")
    with pytest.raises(Refused, match="message 3 is not shown by the template"):
        chat.read(messages)
    with pytest.raises(Refused, match="message 1 is not shown by the template"):
        chat.prompt(said("system: S", "user: a"))


@pytest.mark.parametrize("is_special", [True, False])
def test_chatml_on_a_model_with_and_without_its_tokens(is_special: bool) -> None:
    special = SPECIAL if is_special else ("<s>", "</s>")
    tokenizer = make_tokenizer(special=special)
    chat = ChatTemplate(tokenizer, "chatml")
    messages = said("user: a", "assistant: b", "user: c", "assistant: d")
    found = chat.read(messages)
    last = "d<|im_end|>" if is_special else "d<|im_end|></s>"
    assert pieces_of(tokenizer, found) == ["b<|im_end|>", last]
    assert bool(chat.end_ids) == is_special
    assert chat.end_text == "<|im_end|>"
    assert tokenizer.chat_template == BUILT_IN["chatml"]


def test_alpaca_ends_each_turn_with_the_end_token() -> None:
    tokenizer = make_tokenizer()
    chat = ChatTemplate(tokenizer, "alpaca")
    messages = said("system: S", "user: a", "assistant: b", "user: c", "assistant: d")
    ids, spans = chat.read(messages)
    assert tokenizer.decode(ids) == (
        "S\n\n### Instruction:\na\n\n### Response:\nb</s>\n\n### Instruction:\nc\n\n"
        "### Response:\nd</s>\n\n"
    )
    assert pieces_of(tokenizer, (ids, spans)) == ["b</s>", "d</s>"]


def test_a_turn_that_nothing_ends_gets_the_end_token() -> None:
    """As of GLM, where the header of the next turn is what ends one."""
    tokenizer = make_tokenizer(special=("<|user|>", "<|assistant|>", "<s>", "</s>"))
    bare = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '\n' }}{% endfor %}"
    bare += "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    ids, spans = ChatTemplate(tokenizer, bare).read(said("user: a", "assistant: b"))
    assert tokenizer.decode(ids) == "<|user|>a\n<|assistant|>b</s>"
    assert pieces_of(tokenizer, (ids, spans)) == ["b</s>"]


def test_a_beginning_is_there_once() -> None:
    from tokenizers.processors import TemplateProcessing

    for name in ("llama3", "mistral", "chatml", "alpaca"):
        tokenizer = make_tokenizer()
        tokenizer._tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
        )
        source = template(name) if name not in BUILT_IN else name
        ids, _ = ChatTemplate(tokenizer, source).read(said("user: a", "assistant: b"))
        assert ids.count(tokenizer.bos_token_id) == (0 if name == "llama3" else 1)


DOCUMENTS = [{"title": "Sun", "text": "It is hot."}, {"title": "", "text": "It is far."}]


def test_passages_stand_before_the_last_question() -> None:
    tokenizer = make_tokenizer()
    chat = ChatTemplate(tokenizer, template("chatml"))
    assert not chat.takes_documents
    messages = said("user: a", "assistant: b", "user: c?", "assistant: d")
    found = chat.read(messages, DOCUMENTS)
    assert pieces_of(tokenizer, found) == ["b<|im_end|>", "d<|im_end|>"]
    placed = "user\n[1] Sun\nIt is hot.\n\n[2] It is far.\n\nc?<|im_end|>"
    assert placed in tokenizer.decode(found[0])
    assert placed in tokenizer.decode(chat.prompt(messages[:3], DOCUMENTS))
    assert messages[2]["content"] == "c?"


def test_a_template_places_passages_itself() -> None:
    tokenizer = make_tokenizer()
    own = "{% for d in documents or [] %}{{ '<doc>' + d.text }}{% endfor %}" + template("chatml")
    chat = ChatTemplate(tokenizer, own)
    assert chat.takes_documents
    found = chat.read(said("user: c?", "assistant: d"), DOCUMENTS)
    text = tokenizer.decode(found[0])
    assert text.startswith("<doc>It is hot.<doc>It is far.<|im_start|>user\nc?<|im_end|>")
    assert pieces_of(tokenizer, found) == ["d<|im_end|>"]


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        (None, "chat.no-template"),
        ("{% for m in messages %", "chat.bad-template"),
        ("{{ raise_exception('no') }}", "chat.bad-template"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "chat.bad-template"),
    ],
)
def test_no_template_and_bad_ones_are_refused(source: str | None, problem: str) -> None:
    with pytest.raises(UserError) as caught:
        ChatTemplate(make_tokenizer(), source)
    (found,) = caught.value.problems
    assert found.id == problem
    assert found.fix == "task.chat_template=chatml"
