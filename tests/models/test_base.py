import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, BertConfig
from transformers import tokenization_utils_base as tokenization
from transformers.utils import logging as chatter

from lora_cli.errors import UserError
from lora_cli.models.base import (
    agree_on_padding,
    check_vocabulary,
    load_base,
    load_tokenizer,
)
from lora_cli.models.sources import resolve_model

CLASSIFIER = "AutoModelForSequenceClassification"


@pytest.fixture
def folder(tiny_model_dir, tmp_path):
    return shutil.copytree(tiny_model_dir(), tmp_path / "model")


def options_for(*names):
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
    }


def load(folder, *names, auto_class=CLASSIFIER, dtype="auto", seed=0):
    source = resolve_model(str(folder))
    options = options_for(*(names or ("no", "yes")))
    return load_base(source, auto_class=auto_class, options=options, dtype=dtype, seed=seed)


def problem_of(folder, *names, **options):
    with pytest.raises(UserError) as caught:
        load(folder, *names, **options)
    (problem,) = caught.value.problems
    assert problem.fix
    return problem


def with_head(folder, *names):
    """Give the folder a classification head with these labels; returns its weight."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, **options_for(*names))
    model.save_pretrained(folder)
    return model.classifier.weight.detach()


def test_new_parameters_are_reported_and_the_rest_is_the_file(folder):
    base = load(folder, "a", "b", "c")
    stored = load_file(folder / "model.safetensors")
    state = base.model.state_dict()
    new = {name for name in state if name.removeprefix("bert.") not in stored}
    assert set(base.new_keys) == new
    assert {"classifier.weight", "classifier.bias"} <= new
    for name in set(state) - new:
        assert torch.equal(state[name], stored[name.removeprefix("bert.")]), name
    assert state["classifier.weight"].shape[0] == 3
    assert not base.model.training
    assert base.model.config.id2label == {0: "a", 1: "b", 2: "c"}


def test_the_head_depends_on_the_seed_alone(folder):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    heads = [load(folder, seed=seed).model.classifier.weight for seed in (3, 3, 4)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    torch.manual_seed(9)
    assert torch.equal(load(folder, seed=3).model.classifier.weight, heads[0])


def test_number_formats(folder):
    assert load(folder, dtype="bfloat16").model.dtype == torch.bfloat16
    assert load(folder).model.dtype == torch.float32
    save_file(
        {name: t.bfloat16() for name, t in load_file(folder / "model.safetensors").items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    assert load(folder, dtype="float32").model.dtype == torch.float32


def test_a_head_of_another_size_starts_fresh(folder):
    with_head(folder, "x", "y", "z")
    base = load(folder, "a", "b")
    assert {"classifier.weight", "classifier.bias"} <= set(base.new_keys)
    assert base.model.classifier.weight.shape[0] == 2


def test_a_stored_head_is_kept_if_the_labels_agree(folder):
    weight = with_head(folder, "negative", "positive")
    for names in (("negative", "positive"), ("NEGATIVE", "Positive")):
        base = load(folder, *names)
        assert base.new_keys == ()
        assert torch.equal(base.model.classifier.weight, weight)


def test_a_stored_head_with_labels_in_another_order_is_refused(folder):
    with_head(folder, "positive", "negative")
    problem = problem_of(folder, "negative", "positive")
    assert problem.id == "model.other-labels"
    assert problem.key == "task.data.label_names"
    assert "negative, positive has another order than positive, negative" in problem.message
    assert problem.fix == "task.data.label_names=[positive,negative]"


def test_a_stored_head_with_other_labels_is_refused(folder):
    with_head(folder, "spam", "ham")
    problem = problem_of(folder, "negative", "positive")
    assert "other names than spam, ham" in problem.message
    assert problem.fix.startswith("task.data.label_names=[spam,ham]")


def test_numbered_labels_of_a_stored_head_contradict_nothing(folder):
    with_head(folder, "LABEL_0", "LABEL_1")
    assert load(folder, "negative", "positive").new_keys == ()


def test_label_names_without_a_stored_head_contradict_nothing(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"id2label": {"0": "x", "1": "y"}, "label2id": {"x": 0, "y": 1}}
    (folder / "config.json").write_text(json.dumps(config))
    assert "classifier.weight" in load(folder, "negative", "positive").new_keys


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(folder, value):
    tensors = load_file(folder / "model.safetensors")
    name = "encoder.layer.1.attention.self.query.weight"
    tensors[name][0, 0] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    problem = problem_of(folder)
    assert problem.id == "model.not-finite"
    assert name in problem.message


def test_a_lost_layer_is_not_taken_for_a_new_one(folder):
    tensors = load_file(folder / "model.safetensors")
    name = "encoder.layer.1.attention.self.query.weight"
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    problem = problem_of(folder)
    assert problem.id == "model.incomplete-weights"
    assert name in problem.message


def test_weights_of_another_size_are_refused(folder, tiny_model_dir):
    shutil.copy(tiny_model_dir(hidden=16) / "model.safetensors", folder)
    assert problem_of(folder).id == "model.incomplete-weights"


@pytest.mark.parametrize("changes", [{"model_type": "no_such_type"}, {"hidden_size": "many"}])
def test_configs_that_transformers_does_not_know(folder, changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    assert problem_of(folder).id in ("model.bad-config", "model.does-not-load")


def test_an_architecture_without_the_head(folder):
    problem = problem_of(folder, auto_class="AutoModelForSpeechSeq2Seq")
    assert problem.id == "model.wrong-architecture"
    assert "AutoModelForSpeechSeq2Seq" in problem.message


def test_the_library_is_silenced_and_restored(folder, capfd):
    chatter.set_verbosity_info()
    chatter.enable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load(folder)
            load_tokenizer(resolve_model(str(folder)))
        assert capfd.readouterr() == ("", "")
        assert chatter.get_verbosity() == chatter.INFO
        assert chatter.is_progress_bar_enabled()
    finally:
        chatter.set_verbosity_warning()


def test_the_tokenizer(folder):
    source = resolve_model(str(folder))
    tokenizer = load_tokenizer(source)
    batch = tokenizer(["a good film", "bad"], padding=True)
    assert batch["attention_mask"][1][-1] == 0
    check_vocabulary(tokenizer, load(folder).model, source)


def test_a_tokenizer_of_another_model_is_refused(folder):
    source = resolve_model(str(folder))
    tokenizer = load_tokenizer(source)
    tokenizer.add_tokens(["extra one", "extra two"])
    with pytest.raises(UserError) as caught:
        check_vocabulary(tokenizer, load(folder).model, source)
    assert caught.value.problems[0].id == "model.other-tokenizer"


def test_a_damaged_tokenizer_is_refused(folder):
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError) as caught:
        load_tokenizer(resolve_model(str(folder)))
    assert caught.value.problems[0].id == "model.bad-tokenizer"


def test_a_decoder_pads_with_its_end_token(folder):
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    for key in ("pad_token", "added_tokens_decoder"):
        config.pop(key, None)
    path.write_text(json.dumps(config | {"pad_token": None, "eos_token": "[SEP]"}))
    tokenizer = load_tokenizer(resolve_model(str(folder)))
    assert tokenizer.pad_token == "[SEP]"


def test_the_tiny_model_is_a_plain_bert(folder):
    assert isinstance(load(folder).model.config, BertConfig)


def test_a_long_text_is_tokenized_without_a_warning(folder, monkeypatch):
    told = []
    monkeypatch.setattr(tokenization.logger, "warning", told.append)
    tokenizer = load_tokenizer(resolve_model(str(folder)))
    tokenizer.model_max_length = 8
    assert len(tokenizer("good " * 20)["input_ids"]) > 8
    assert told == []


def test_models_with_a_head_are_padded_at_the_right(tiny_language_dir):
    """GPT-2 counts positions from the first token of a row, padding or not."""
    folder = tiny_language_dir("gpt2")
    model, tokenizer = load(folder).model, load_tokenizer(resolve_model(str(folder)))
    texts, said = ["the film was good", "music"], {}
    for side in ("left", "right"):
        tokenizer.padding_side = side
        with torch.no_grad():
            inputs = tokenizer(texts, padding=True, return_tensors="pt")
            alone = tokenizer(texts[1:], return_tensors="pt")
            said[side] = model(**inputs).logits[1], model(**alone).logits[0]
    assert not torch.allclose(*said["left"], atol=1e-3)
    torch.testing.assert_close(*said["right"], atol=1e-5, rtol=1e-5)
    tokenizer.padding_side = "left"
    agree_on_padding(tokenizer, model)
    assert tokenizer.padding_side == "right"
    writer = load(folder, auto_class="AutoModelForCausalLM").model
    tokenizer.padding_side = "left"
    agree_on_padding(tokenizer, writer)
    assert tokenizer.padding_side == "left", "what writes is padded by what makes it write"
