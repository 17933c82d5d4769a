"""The same small training run by lora-cli, by transformers' Trainer, and by a loop of accelerate.

Each saves every second of 24 steps, keeps two checkpoints, and goes on from the newest one when it
is started again in the same folder, in the way that its own documentation describes. They run in
processes that `faults.py` forks; what they load from their checkpoints is their own affair.
"""

import contextlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

STEPS, SAVE, BATCH, LENGTH, SEED = 24, 2, 8, 16, 1
DROPOUT = 0.1
WORDS = ("good", "fine", "warm", "bad", "dull", "cold", "the", "a", "film", "plot", "scene", "was")


@dataclass(frozen=True)
class Kill:
    """When the process is to end: in the saving of a step, after so many seconds of it.

    Attributes:
        step: Whose checkpoint is being saved.
        seconds: Since saving began; None for right after it.
    """

    step: int
    seconds: float | None


def write_inputs(folder: Path) -> None:
    """Write a random BERT with two layers and 64 labelled rows."""
    from transformers import BertConfig, BertModel, BertTokenizer

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    names = {word: index for index, word in enumerate(vocabulary)}
    BertTokenizer(vocab=names, model_max_length=LENGTH).save_pretrained(folder / "base")
    torch.manual_seed(SEED)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {"intermediate_size": 64, "max_position_embeddings": LENGTH, "initializer_range": 0.2}
    more |= {"hidden_dropout_prob": DROPOUT, "attention_probs_dropout_prob": DROPOUT}
    config = BertConfig(vocab_size=len(vocabulary), **sizes, **more)
    BertModel(config, add_pooling_layer=False).save_pretrained(folder / "base")
    (folder / "data").mkdir()
    draw = random.Random(SEED)
    rows = []
    for number in range(64):
        text = " ".join([*draw.choices(WORDS[6:], k=5), WORDS[number % 6], str(number)])
        rows.append({"text": text, "label": "no" if number % 6 > 2 else "yes"})
    for split, part in (("train", rows), ("validation", rows[:8])):
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (folder / "data" / f"{split}.jsonl").write_text(lines, encoding="utf-8")


def note(**values: Any) -> None:
    """Add a line to the log of the run that is in the current folder."""
    with Path("log.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")


def watched(
    save: Callable[..., Any], step_of: Callable[..., int], kill: Kill | None
) -> Callable[..., Any]:
    """Wrap what saves a checkpoint: the process is killed in it, or it is noted as committed."""

    def call(*args: Any, **kwargs: Any) -> Any:
        step = step_of(*args)
        if kill is not None and kill.step == step and kill.seconds is not None:
            # Nobody handles this signal, so that the system ends the process without a word.
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, max(kill.seconds, 1e-6))
        began = time.monotonic()
        result = save(*args, **kwargs)
        note(saved=step, seconds=time.monotonic() - began)
        if kill is not None and kill.step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return call


def prepared_model() -> tuple[Any, list[dict[str, Any]]]:
    """Return the model with PEFT's LoRA, and the tokenized rows."""
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("../inputs/base")
    text = Path("../inputs/data/train.jsonl").read_text(encoding="utf-8")
    rows = []
    for row in map(json.loads, text.splitlines()):
        encoded = tokenizer(row["text"], padding="max_length", truncation=True, max_length=LENGTH)
        rows.append({**encoded, "labels": int(row["label"] == "yes")})
    model = AutoModelForSequenceClassification.from_pretrained("../inputs/base", num_labels=2)
    lora = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=4,
        lora_alpha=8,
        lora_dropout=DROPOUT,
        target_modules=["query", "value"],
    )
    return get_peft_model(model, lora), rows


def trained_tensors(model: Any) -> dict[str, torch.Tensor]:
    """Return what was trained."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def write_final(tensors: dict[str, torch.Tensor]) -> None:
    """Write what the run came to, as the harness compares it."""
    import safetensors.torch

    safetensors.torch.save_file(tensors, "final.safetensors")


def run_trainer(kill: Kill | None) -> int:
    """Train with transformers' Trainer."""
    import transformers
    from transformers.trainer_utils import get_last_checkpoint

    transformers.enable_full_determinism(SEED)
    model, rows = prepared_model()
    arguments = transformers.TrainingArguments(
        output_dir="run",
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=0.01,
        save_strategy="steps",
        save_steps=SAVE,
        save_total_limit=2,
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=SEED,
        data_seed=SEED,
        full_determinism=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
    trainer._save_checkpoint = watched(
        trainer._save_checkpoint, lambda *_: trainer.state.global_step, kill
    )

    class Noted(transformers.TrainerCallback):
        def on_train_begin(self, *found: Any, **_: Any) -> None:
            note(resumed=found[1].global_step)

    trainer.add_callback(Noted())
    last = get_last_checkpoint("run") if Path("run").is_dir() else None
    trainer.train(resume_from_checkpoint=True if last else None)
    write_final(trained_tensors(model))
    return 0


def run_accelerate(kill: Kill | None) -> int:
    """Train with a loop of accelerate's, as its guide to checkpoints writes it."""
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration, set_seed

    set_seed(SEED, deterministic=True)
    model, rows = prepared_model()
    project = ProjectConfiguration(
        project_dir="run", automatic_checkpoint_naming=True, total_limit=2
    )
    loaders = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=SEED)
    accelerator = Accelerator(cpu=True, project_config=project, dataloader_config=loaders)
    columns = [{name: torch.tensor(value) for name, value in row.items()} for row in rows]
    loader = torch.utils.data.DataLoader(columns, batch_size=BATCH, shuffle=True)  # type: ignore[arg-type]  # a list is a data set
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    done = 0
    folders = sorted(Path("run/checkpoints").glob("checkpoint_*"), key=lambda p: int(p.name[11:]))
    if folders:
        accelerator.load_state()
        number = int(folders[-1].name[11:])
        project.iteration = number + 1
        done = SAVE * (number + 1)
    note(resumed=done)
    save = watched(accelerator.save_state, lambda *_: SAVE * (project.iteration + 1), kill)
    model.train()
    length = len(loader)
    for epoch in range(done // length, -(-STEPS // length)):
        loader.set_epoch(epoch)
        skipped = done - epoch * length
        batches = accelerator.skip_first_batches(loader, skipped) if skipped else loader
        for batch in batches:
            loss = model(**batch).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            done += 1
            if done % SAVE == 0:
                save()
    write_final(trained_tensors(accelerator.unwrap_model(model)))
    return 0


def run_lora_cli(kill: Kill | None) -> int:
    """Train with lora-cli."""
    import safetensors.torch

    from lora_cli.artifacts.checkpoint import Checkpointer
    from lora_cli.cli.main import main
    from lora_cli.training.events import CheckpointDue

    real = Checkpointer.__call__
    save = watched(real, lambda _, event: event.state.progress.step, kill)

    def call(self: Checkpointer, event: Any) -> None:
        (save if isinstance(event, CheckpointDue) else real)(self, event)

    Checkpointer.__call__ = call  # type: ignore[method-assign]  # to be killed in it
    settings = {
        "model.path": "../inputs/base",
        "task": "text_classification",
        "task.data.path": "../inputs/data",
        "task.max_length": LENGTH,
        "lora.targets": "[query,value]",
        "lora.r": 4,
        "lora.alpha": 8,
        "lora.dropout": DROPOUT,
        "optimizer.lr": 0.01,
        "trainer.max_steps": STEPS,
        "trainer.global_batch_size": BATCH,
        "trainer.eval_steps": STEPS,
        "trainer.save_steps": SAVE,
        "trainer.keep_checkpoints": 2,
        "trainer.resume": "auto",
        "seed": SEED,
        "run.dir": "run",
    }
    code = main(["train", *(f"{name}={value}" for name, value in settings.items())])
    if code == 0:
        last = Path("run/checkpoints") / f"step-{STEPS:08d}" / "adapter.safetensors"
        write_final(safetensors.torch.load(last.read_bytes()))
    return code


@dataclass(frozen=True)
class Contestant:
    """One way to train.

    Attributes:
        run: Trains in the current folder; returns an exit code.
        checkpoints: Pattern of the folders of checkpoints.
    """

    run: Callable[[Kill | None], int]
    checkpoints: str


CONTESTANTS = {
    "lora-cli": Contestant(run_lora_cli, "run/checkpoints/step-*"),
    "transformers Trainer": Contestant(run_trainer, "run/checkpoint-*"),
    "accelerate save_state": Contestant(run_accelerate, "run/checkpoints/checkpoint_*"),
}


def run_child(work: Callable[[], int], folder: Path) -> tuple[int, str]:
    """Call `work` in a forked process in a folder; return exit code and what it printed."""
    output = folder / "output.txt"
    output.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.chdir(folder)
            descriptor = os.open(output, os.O_WRONLY | os.O_CREAT)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            sys.stdout = os.fdopen(1, "w", closefd=False)
            sys.stderr = os.fdopen(2, "w", closefd=False)
            code = work()
        except BaseException:  # noqa: BLE001  # whatever it is, it is counted
            import traceback

            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    return os.waitstatus_to_exitcode(status), output.read_text(errors="replace")
