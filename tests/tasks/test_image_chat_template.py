"""Templates in the style of several models, and where their processors put images."""

from typing import Any

import pytest
import transformers
from PIL import Image
from tiny_image_chat import TEMPLATE, make_processor

from lora_cli.data.image_messages import IMAGE
from lora_cli.errors import UserError
from lora_cli.tasks.chat_template import Refused
from lora_cli.tasks.image_chat_template import ImageChatTemplate

TALK = [
    {"role": "user", "content": f"{IMAGE}\nwhat colour is it ?"},
    {"role": "assistant", "content": "it is red"},
    {"role": "user", "content": f"and {IMAGE} ?"},
    {"role": "assistant", "content": "it is blue"},
]
# LLaVA 1.5 shows all images first, ends no turn, and marks what is learned.
LLAVA = (
    "{% for m in messages %}{{ m.role + ' ' }}"
    "{% for p in m.content | selectattr('type', 'equalto', 'image') %}{{ '<image> ' }}{% endfor %}"
    "{% for p in m.content | selectattr('type', 'equalto', 'text') %}"
    "{% if m.role == 'assistant' %}{% generation %}{{ p.text + ' ' }}{% endgeneration %}"
    "{% else %}{{ p.text + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)
# Pixtral takes parts where there are images, and texts elsewhere.
TEXTS = (
    "{% for m in messages %}{{ '<|im_start|> ' + m.role + ' ' }}"
    "{% if m.content is string or m.role == 'assistant' %}{{ ' ' + m.content + ' ' }}{% else %}"
    "{% for p in m.content %}{{ '<image>' if p.type == 'image' else ' ' + p.text + ' ' }}"
    "{% endfor %}{% endif %}{{ '<|im_end|> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|> assistant ' }}{% endif %}"
)


def images() -> list[Any]:
    return [Image.new("RGB", size, (200, 20, 20)) for size in ((20, 18), (40, 12))]


def learned(template: ImageChatTemplate, tokenizer: Any) -> list[str]:
    ids, spans = template.showing(images()).read(TALK)
    return [" ".join(tokenizer.convert_ids_to_tokens(ids[a:b])) for a, b in spans]


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl", "idefics3"])
def test_what_the_assistant_writes_is_found_behind_images(kind: str) -> None:
    processor = make_processor(kind)
    template = ImageChatTemplate(processor, None)
    assert learned(template, processor.tokenizer) == [
        "it is red <|im_end|>",
        "it is blue <|im_end|>",
    ]
    ids, _ = template.showing(images()).read(TALK)
    asked = template.showing(images()[:1])
    prompt = asked.prompt(TALK[:1])
    assert prompt == ids[: len(prompt)]
    assert prompt.count(processor.image_token_id) >= 1
    assert all(len(values) == len(prompt) for values in asked.extras.values())
    assert set(asked.extras) == ({"mm_token_type_ids"} if kind == "qwen2_vl" else set())


def test_marks_of_the_template_are_followed_and_the_end_is_learned() -> None:
    processor = make_processor("llava")
    template = ImageChatTemplate(processor, LLAVA)
    assert learned(template, processor.tokenizer) == ["it is red", "it is blue </s>"]
    assert processor.chat_template == processor.tokenizer.chat_template == LLAVA


def test_templates_that_take_texts_where_no_image_is() -> None:
    processor = make_processor("llava")
    template = ImageChatTemplate(processor, TEXTS)
    assert learned(template, processor.tokenizer) == [
        "it is red <|im_end|>",
        "it is blue <|im_end|>",
    ]


def test_a_tokenizer_that_begins_texts_begins_conversations() -> None:
    """As `apply_chat_template` of processors does, where the template writes no such token."""
    from tokenizers import processors

    processor = make_processor("llava")
    number = processor.tokenizer.convert_tokens_to_ids("<s>")
    processor.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", number)]
    )
    template = ImageChatTemplate(processor, None)
    ids, _ = template.showing(images()).read(TALK)
    assert ids[0] == number
    assert number not in ids[1:]
    assert learned(template, processor.tokenizer) == [
        "it is red <|im_end|>",
        "it is blue <|im_end|>",
    ]


def test_other_numbers_of_images_are_refused() -> None:
    template = ImageChatTemplate(make_processor("llava"), None)
    with pytest.raises(Refused, match="2 marks <image> for 1 images"):
        template.showing(images()[:1]).read(TALK)


def test_inputs_of_images_are_those_of_the_processor() -> None:
    processor = make_processor("qwen2_vl")
    template = ImageChatTemplate(processor, None)
    found = template.image_inputs([images(), images()[:1]])
    assert set(found) == {"pixel_values", "image_grid_thw"}
    assert found["image_grid_thw"].shape == (3, 3)
    plain = processor.image_processor([*images(), images()[0]], return_tensors="pt")
    assert found["pixel_values"].equal(plain["pixel_values"])


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ messages[0].role + ' ' + messages[0].content }}", "does not render|show images"),
        (TEMPLATE.format(image=""), "writes 0 marks <image> for one"),
        (TEMPLATE.format(image="<image><image>"), "writes 2 marks <image> for one"),
    ],
)
def test_templates_that_show_no_images(template: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        ImageChatTemplate(make_processor("llava"), template)


def test_a_processor_that_does_not_tell_where_images_are() -> None:
    processor = make_processor("llava")
    processor.patch_size = None
    with pytest.raises(UserError, match="LlavaProcessor does not") as caught:
        ImageChatTemplate(processor, None)
    assert caught.value.problems[0].id == "chat.other-processor"


def test_a_processor_that_changes_the_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns would be looked for at wrong places."""
    processor = make_processor("llava")
    plain = processor.prepare_inputs_layout

    def longer(images: Any = None, text: Any = None, **options: Any) -> Any:
        return plain(images=images, text=[f"{one} what" for one in text], **options)

    monkeypatch.setattr(processor, "prepare_inputs_layout", longer)
    with pytest.raises(UserError, match="it writes more than images into the text"):
        ImageChatTemplate(processor, None)


def test_paligemma_is_refused() -> None:
    processor = make_processor("llava")
    images = transformers.SiglipImageProcessorPil(size={"height": 16, "width": 16})
    images.image_seq_length = 4
    other = transformers.PaliGemmaProcessor(
        images, processor.tokenizer, chat_template=processor.chat_template
    )
    with pytest.raises(UserError, match="PaliGemmaProcessor does not"):
        ImageChatTemplate(other, None)
