"""Chat through every command, and what comes after it."""

import json
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers

from lora_cli.commands.merging import take_probe

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

COLOURS = {"grass": "green", "snow": "white", "coal": "black", "sky": "blue", "blood": "red"}
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def ask(draw: random.Random, thing: str) -> str:
    return " ".join(["what colour is", thing, *draw.choices(("now", "please", "so"), k=2)])


def conversation(draw: random.Random) -> list[dict[str, str]]:
    turns = []
    for thing in draw.choices(list(COLOURS), k=draw.randint(1, 3)):
        turns.append({"role": "user", "content": ask(draw, thing)})
        turns.append({"role": "assistant", "content": f"it is {COLOURS[thing]}"})
    return turns


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def run(run_cli: Any, chat_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    cwd, draw = tmp_path_factory.mktemp("chat"), random.Random(3)
    data = cwd / "rows"
    data.mkdir()
    for split, count in (("train", 96), ("validation", 16), ("test", 16)):
        write_rows(
            data / f"{split}.jsonl", [{"messages": conversation(draw)} for _ in range(count)]
        )
    settings = (
        f"model.path={chat_base}",
        "task=chat",
        f"task.data.path={data}",
        "task.max_length=64",
        "task.generate_in_eval=true",
        "task.generation.max_new_tokens=8",
        "lora=all-linear",
        "optimizer.lr=0.02",
        "trainer.epochs=12",
        "trainer.global_batch_size=16",
        "trainer.eval_steps=72",
    )
    finished = run_cli("train", *settings, "run.name=a", cwd=cwd)
    assert finished.code == 0, finished.err
    path = cwd / "runs" / "a"
    result = json.loads((path / "result.json").read_text())
    return SimpleNamespace(
        path=path, data=data, base=chat_base, settings=settings, result=result, said=finished
    )


def test_answers_are_learned(run: Any) -> None:
    base, adapter = run.result["base"], run.result["adapter"]
    names = {"perplexity", "token_accuracy", "loss", "exact_match", "bleu", "chrf", "rougeL"}
    assert names <= set(adapter)
    assert adapter["loss"] < 0.5 * base["loss"]
    assert adapter["perplexity"] == pytest.approx(math.exp(adapter["loss"]))
    assert adapter["exact_match"] == 1
    assert base["exact_match"] == 0
    assert adapter["chrf"] > base["chrf"]
    assert run.result["merged"]["loss"] == pytest.approx(adapter["loss"], abs=1e-4)


def test_the_loss_is_that_of_plain_torch(run: Any, run_cli: Any, tmp_path: Path) -> None:
    """Cross-entropy over the words of the assistant and <|im_end|>, with PEFT's model."""
    done = run_cli("eval", run.path, "split=test", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    base = transformers.AutoModelForCausalLM.from_pretrained(run.base)
    model = peft.PeftModel.from_pretrained(base, run.path / "adapter").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.base)
    marked = TEMPLATE.replace(
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}",
        "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}"
        "{% endif %}{{ '\n' }}",
    )
    total, count, hits = 0.0, 0, 0
    for line in (run.data / "test.jsonl").read_text().splitlines():
        found = tokenizer.apply_chat_template(
            json.loads(line)["messages"], chat_template=marked, return_dict=True,
            return_assistant_tokens_mask=True,
        )  # fmt: skip
        ids = torch.tensor([found["input_ids"]])
        own = torch.tensor(found["assistant_masks"], dtype=torch.bool)
        labels = ids.masked_fill(~own, -100)
        with torch.no_grad():
            output = model(input_ids=ids, labels=labels)
        total += float(output.loss) * int(own.sum())
        hits += int((output.logits[0, :-1].argmax(-1) == ids[0, 1:])[own[1:]].sum())
        count += int(own.sum())
    adapter = done.lines[0]["adapter"]
    assert adapter["loss"] == pytest.approx(total / count, rel=1e-4)
    assert adapter["token_accuracy"] == pytest.approx(hits / count)


def test_predict_answers(run: Any, run_cli: Any, tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "what colour is snow now now"}], "who": 1},
        {"prompt": "what colour is coal so please"},
        {
            "conversations": [
                {"from": "human", "value": "what colour is sky now so"},
                {"from": "gpt", "value": "it is blue"},
                {"from": "human", "value": "what colour is grass please so"},
                {"from": "gpt", "value": "it is red"},
            ]
        },
    ]
    expected = ["it is white", "it is black", "it is green"]
    for row, answer in zip(rows, expected, strict=True):
        done = run_cli("predict", run.path, cwd=tmp_path, stdin=json.dumps(row).encode())
        assert done.code == 0, done.err
        assert done.lines[0]["answer"] == answer
        assert done.lines[0].get("who") == row.get("who")
    done = run_cli("predict", run.path, "text=what colour is blood so so", cwd=tmp_path)
    assert done.lines[0]["answer"] == "it is red"


def test_a_prompt_that_is_too_long_ends_the_predictions(
    run: Any, run_cli: Any, tmp_path: Path
) -> None:
    long = {"prompt": "what " * 80}
    rows = [{"prompt": "what colour is coal so please"}, long]
    write_rows(tmp_path / "rows.jsonl", rows)
    done = run_cli("predict", run.path, "input=rows.jsonl", cwd=tmp_path)
    assert done.code == 1
    assert [line["answer"] for line in done.lines] == ["it is black"]
    assert "error[task.overlong]" in done.err
    assert "rows.jsonl row 2" in done.err
    assert "error[predict.incomplete]" in done.err
    write_rows(tmp_path / "rows.jsonl", rows[::-1])
    done = run_cli("predict", run.path, "input=rows.jsonl", cwd=tmp_path)
    assert (done.code, done.out) == (2, "")


def test_merged_and_exported_say_the_same(run: Any, run_cli: Any, tmp_path: Path) -> None:
    merged = tmp_path / "m"
    done = run_cli("merge", run.path, f"output={merged}", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    assert done.lines[0]["agreement"] == 1
    done = run_cli("eval", run.path, f"merged={merged}", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    assert done.lines[0]["merged"] == pytest.approx(done.lines[0]["adapter"], abs=1e-3)
    lines = (run.path / "predictions" / "test.jsonl").read_text().splitlines()
    assert all(json.loads(line)["answer"] == json.loads(line)["reference"] for line in lines)
    model = transformers.AutoModelForCausalLM.from_pretrained(merged)
    tokenizer = transformers.AutoTokenizer.from_pretrained(merged)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "what colour is snow so so"}],
        add_generation_prompt=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    written = model.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)
    start = inputs["input_ids"].shape[1]
    assert tokenizer.decode(written[0, start:]) == "it is white <|im_end|>"


def test_nothing_is_generated_to_compare_two_models() -> None:
    seen: list[Any] = []

    class Task:
        def collate(self, features: Any) -> Any:
            return {"ids": [row["id"] for row in features]}

        def forward(self, model: Any, batch: Any) -> Any:
            seen.append(batch["generate"])
            return SimpleNamespace(outputs={})

    task: Any = Task()
    take_probe(task, torch.nn.Linear(1, 1), [{"id": "1"}], split="")
    assert seen == [False]


@pytest.mark.parametrize("mode", ["continue", "merge"])
def test_the_adapter_is_trained_on(run: Any, run_cli: Any, tmp_path: Path, mode: str) -> None:
    more = ("trainer.max_steps=1", "trainer.global_batch_size=8", "run.dir=b", "--quiet")
    done = run_cli(
        "train", f"adapter={run.path}", f"adapter_mode={mode}", "task=chat",
        f"task.data.path={run.data}", "task.max_length=64", *more, cwd=tmp_path,
    )  # fmt: skip
    assert done.code == 0, done.err
    result = json.loads((tmp_path / "b" / "result.json").read_text())
    start = result["start" if mode == "continue" else "base"]
    assert start["loss"] == pytest.approx(run.result["adapter"]["loss"], abs=1e-3)


def test_packed_rows_teach_the_same(run: Any, run_cli: Any, tmp_path: Path) -> None:
    """One step over all rows, in rows of their own and packed, has the same loss."""
    settings = [s for s in run.settings if not s.startswith(("trainer.", "task.gen"))]
    losses = []
    for packing in ("false", "true"):
        more = ("trainer.max_steps=1", "trainer.log_steps=1", "trainer.global_batch_size=96")
        name = f"run.dir={packing}"
        done = run_cli("train", *settings, f"task.packing={packing}", *more, name, cwd=tmp_path)
        assert done.code == 0, done.err
        lines = (tmp_path / packing / "metrics.jsonl").read_text().splitlines()
        losses += [x["loss"] for x in map(json.loads, lines) if x["event"] == "train"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
