from pathlib import Path
from typing import Any

from lora_cli.config.groups import group_options
from lora_cli.tasks.table import FAMILIES


def test_every_model_is_listed_with_its_path(run_cli: Any, tmp_path: Path) -> None:
    done = run_cli("models", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    found = {entry["name"]: entry for entry in done.lines[0]["models"]}
    assert set(found) == set(group_options("model"))
    assert found["bert"]["path"] == "google-bert/bert-base-uncased"
    assert found["minilm"]["architecture"] == "bert"
    assert all(entry["path"] and entry["description"] for entry in found.values())


def test_models_are_found_by_the_families_that_they_suit(run_cli: Any, tmp_path: Path) -> None:
    found = {}
    for family in FAMILIES:
        done = run_cli("models", family, "--json", cwd=tmp_path)
        entries = done.lines[0]["models"]
        found[family] = {entry["name"] for entry in entries if family in entry["families"]}
    encoders = {"bert", "roberta", "deberta-v3", "electra", "modernbert", "xlm-roberta", "minilm"}
    decoders = {"gpt2", "llama3.2-1b", "qwen3-0.6b", "smollm2", "phi", "gemma3-1b"}
    both = {"t5-small", "bart-base", "marian-en-de", "m2m100", "pegasus-xsum"}
    for family in ("masked_language_modeling", "multiple_choice"):
        assert encoders <= found[family]
        assert not decoders & found[family]
    for family in ("chat", "causal_language_modeling", "answer_choice"):
        assert decoders <= found[family]
        assert not (encoders | both) & found[family]
    assert both <= found["seq2seq"]
    assert not (encoders | decoders) & found["seq2seq"]
    assert encoders | decoders <= found["text_classification"]
    pairs = {"clip-base", "clip-large", "siglip-base", "siglip2-base"}
    assert found["image_text_contrastive"] == pairs


def test_words_find_models(run_cli: Any, tmp_path: Path) -> None:
    done = run_cli("models", "chinese macbert", cwd=tmp_path)
    first, second = done.out.splitlines()[:2]
    assert first.startswith("for text_classification, multi_label_classification, ")
    assert second.startswith("  chinese-macbert  bert  hfl/chinese-macbert-base  ")
    assert run_cli("models", "klingon", cwd=tmp_path).code == 2
