"""Merge with peft and with lora-cli, one after the other, and print a Markdown table.

The base is a random model of Llama's shape in bfloat16, in five files, with random updates of rank
16 in every linear layer; with `--model DIR` it is that model. Each run is a process of its own,
whose wall time and largest resident memory the system tells (wait4). Which of the two goes first
alternates. Afterwards every tensor of the one result is compared with that of the other.

    python benchmarks/merge.py --gigabytes 4.5 --runs 5 --work FOLDER
    python benchmarks/merge.py --model DIR --runs 5 --work FOLDER

PEFT does not wait for the disk, so neither does lora-cli here (`sync=false`), unless `--sync`.
`--limit 1GB` runs lora-cli once more, and lets it have that much memory: all of it, code and
mapped files included (RLIMIT_AS), with its one arena of malloc for each thread switched off.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lora_cli.artifacts.adapter import AdapterRecord, save_adapter
from lora_cli.artifacts.peft_format import PeftAdapter
from lora_cli.artifacts.tensor_files import read_weights
from lora_cli.config.commands import TrainConfig
from lora_cli.config.language import CausalLanguageModelingConfig
from lora_cli.config.schema import to_plain
from lora_cli.config.sections import ModelConfig
from lora_cli.config.size import parse_size
from lora_cli.lora.settings import LoraSettings
from lora_cli.models.sources import resolve_model

PEFT = """
import sys
import transformers, peft
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
merged = peft.PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload()
merged.save_pretrained(sys.argv[3])
transformers.AutoTokenizer.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[3])
"""
NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, FILES = 16, 5


@dataclass(frozen=True)
class Run:
    """What the system says of a process that has ended."""

    seconds: float
    cpu_seconds: float
    megabytes: float


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--gigabytes", type=float, default=0.3, help="size of the random model")
    add("--model", type=Path, help="a language model in safetensors, instead of a random one")
    add("--tokenizer", type=Path, help="folder with a tokenizer for the random model")
    add("--runs", type=int, default=2)
    add("--work", type=Path, required=True, help="folder for models; emptied of them at the end")
    add("--sync", action="store_true", help="lora-cli waits until the disk holds the result")
    add("--verify", default="layers", choices=["layers", "none"])
    add("--limit", help="memory for one more run of lora-cli, such as 1GB")
    return parser.parse_args()


def make_base(folder: Path, gigabytes: float, tokenizer: Path) -> None:
    """Write a random model of Llama's shape, file by file, and a tokenizer."""
    hidden, inner, vocabulary, heads = 2048, 5632, 49152, 32
    block = {
        **{f"self_attn.{name}": (hidden, hidden) for name in ("q_proj", "o_proj")},
        **{f"self_attn.{name}": (hidden // 4, hidden) for name in ("k_proj", "v_proj")},
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    ends = {"model.embed_tokens": (vocabulary, hidden), "lm_head": (vocabulary, hidden)}
    size = sum(a * b for a, b in block.values())
    layers = max(FILES, round((gigabytes * 1e9 / 2 - 2 * vocabulary * hidden) / size))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": ends["model.embed_tokens"]}
    for number in range(layers):
        start = f"model.layers.{number}"
        shapes |= {f"{start}.{name}.weight": shape for name, shape in block.items()}
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{start}.{name}.weight"] = (hidden,)
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": ends["lm_head"]}
    torch.manual_seed(0)
    names, places, total = list(shapes), {}, 0
    folder.mkdir(parents=True)
    for number in range(FILES):
        file = f"model-{number + 1:05d}-of-{FILES:05d}.safetensors"
        own = names[len(names) * number // FILES : len(names) * (number + 1) // FILES]
        tensors = {name: (0.02 * torch.randn(shapes[name])).bfloat16() for name in own}
        save_file(tensors, folder / file, {"format": "pt"})
        places |= dict.fromkeys(own, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 4,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    for path in tokenizer.glob("*"):
        if path.name.startswith(("tokenizer", "special_tokens", "vocab", "merges")):
            shutil.copyfile(path, folder / path.name)


def make_adapter(folder: Path, base: Path) -> None:
    """Write random updates of rank 16 for every linear layer, as `lora-cli train` would."""
    torch.manual_seed(1)
    state = {}
    for name, tensor in read_weights(base).tensors.items():
        path = name.removesuffix(".weight")
        if path.endswith(NAMES):
            out_features, in_features = tensor.shape
            state[f"{path}.lora_A.weight"] = torch.randn(RANK, in_features) / in_features**0.5
            state[f"{path}.lora_B.weight"] = 0.01 * torch.randn(out_features, RANK)
    settings = LoraSettings(r=RANK, alpha=2 * RANK)
    adapter = PeftAdapter(
        settings=settings,
        targets=NAMES,
        saved_modules=(),
        task_type="CAUSAL_LM",
        base_name=str(base),
        revision=None,
        state=state,
    )
    source = resolve_model(str(base))
    model, task = ModelConfig(path=str(base)), CausalLanguageModelingConfig()
    record = AdapterRecord(
        config=to_plain(TrainConfig(model=model, task=task)),
        state={"columns": {"text": "text"}},
        base={"name": str(base), "revision": None, **source.hashes},
        metrics={},
    )
    names = [name.rpartition(".")[0] for name in read_weights(base).tensors]
    save_adapter(folder, adapter, record, card="", module_names=names)


def run(command: Sequence[str], *, limit: int | None = None) -> Run:
    """Run a process to its end, and return what it took; stops where it fails."""

    def limited() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    began = time.monotonic()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if limit is not None:
        environment |= {"MALLOC_ARENA_MAX": "1"}
    process = subprocess.Popen(command, preexec_fn=limited, env=environment)
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.monotonic() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"failed with {process.returncode}: {' '.join(map(str, command))}")
    return Run(seconds, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)


def count_differing(first: Path, second: Path) -> tuple[int, int]:
    """Return how many tensors there are, and how many differ in a bit."""
    one, other = read_weights(first).tensors, read_weights(second).tensors
    if set(one) != set(other):
        raise SystemExit(f"other tensors: {sorted(set(one) ^ set(other))[:5]}")
    differing = 0
    for name, stored in one.items():
        values = []
        for place in (stored, other[name]):
            with safe_open(place.path, framework="pt") as file:
                values.append(file.get_tensor(name))
        differing += not torch.equal(*values) or values[0].dtype != values[1].dtype
    return len(one), differing


def compare(base: Path, adapter: Path, work: Path, arguments: Any) -> dict[str, list[Run]]:
    """Merge with both as often as asked for, and compare the tensors of the last results."""
    peft, ours = work / "by_peft", work / "by_lora_cli"
    commands = {
        "peft": [sys.executable, "-c", PEFT, base, adapter, peft],
        "lora-cli": lora_cli(base, adapter, ours, arguments),
    }
    found: dict[str, list[Run]] = {name: [] for name in commands}
    for number in range(arguments.runs):
        for folder in (peft, ours):
            shutil.rmtree(folder, ignore_errors=True)
        # What is still to be written would be waited for by whoever comes first.
        os.sync()
        for name in sorted(commands, reverse=bool(number % 2)):
            found[name].append(run(list(map(str, commands[name]))))
            print(f"run {number + 1}, {name}: {found[name][-1]}", file=sys.stderr)
            os.sync()
    total, differing = count_differing(peft, ours)
    print(f"\n{total} tensors, of which {differing} differ in a bit.")
    return found


def lora_cli(base: Path, adapter: Path, output: Path, arguments: Any) -> list[Any]:
    """Return the command line that merges."""
    settings = [f"base={base}", f"output={output}", f"verify={arguments.verify}"]
    settings += [] if arguments.sync else ["sync=false"]
    return [sys.executable, "-m", "lora_cli", "merge", adapter, *settings]


def print_table(found: dict[str, list[Run]]) -> None:
    """Print median and range of each, and by how much they differ."""

    def cell(values: list[float], form: str) -> str:
        return f"{median(values):{form}} [{min(values):{form}}-{max(values):{form}}]"

    columns = ("seconds", "cpu_seconds", "megabytes")
    forms = (".1f", ".1f", ",.0f")
    print("\n| | seconds, whole process | of the processor | largest resident memory, MB |")
    print("|---|---|---|---|")
    for name, runs in found.items():
        cells = [
            cell([getattr(r, column) for r in runs], form)
            for column, form in zip(columns, forms, strict=True)
        ]
        print(f"| {name} | {' | '.join(cells)} |")
    pairs = list(zip(found["peft"], found["lora-cli"], strict=True))
    cells = [cell([getattr(a, c) / getattr(b, c) for a, b in pairs], ".2f") for c in columns]
    print(f"| peft / lora-cli | {' | '.join(cells)} |")


def measured(work: Path, make: Callable[[], None], arguments: Any) -> None:
    """Make what is to be merged, and merge it."""
    make()
    base = arguments.model or work / "base"
    make_adapter(work / "adapter", base)
    size = read_weights(base).num_bytes / 1e9
    print(f"{size:.2f} GB, {len(read_weights(base).files)} files, load {os.getloadavg()[0]:.1f}")
    print_table(compare(base, work / "adapter", work, arguments))
    if arguments.limit:
        output = work / "by_lora_cli"
        shutil.rmtree(output)
        command = lora_cli(base, work / "adapter", output, arguments)
        used = run(list(map(str, command)), limit=parse_size(arguments.limit))
        print(
            f"\nWithin RLIMIT_AS of {arguments.limit}: {used.seconds:.1f} s, "
            f"{used.megabytes:,.0f} MB resident at most."
        )


def main() -> None:
    """Measure, and remove what was made."""
    arguments = parse_arguments()
    work = arguments.work
    if work.exists():
        raise SystemExit(f"{work} must not be there yet")
    work.mkdir(parents=True)

    def make() -> None:
        if arguments.model is None:
            make_base(work / "base", arguments.gigabytes, arguments.tokenizer)

    try:
        measured(work, make, arguments)
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
