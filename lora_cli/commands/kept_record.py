"""An adapter of lora-cli written anew with other tensors, and with what its record says besides."""

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from lora_cli.artifacts.adapter import AdapterRecord, save_adapter
from lora_cli.artifacts.card import CardData, model_card
from lora_cli.artifacts.peft_format import PeftAdapter
from lora_cli.artifacts.peft_tensors import WEIGHTS_FILE
from lora_cli.artifacts.run_dir import PACKAGES
from lora_cli.commands.reporting import head_facts
from lora_cli.config.schema import show


def save_with_record(
    output: Path,
    adapter: PeftAdapter,
    record: AdapterRecord,
    *,
    source: Path,
    module_names: Iterable[str],
) -> int:
    """Write an adapter folder that every command reads, and return its size in bytes.

    Metrics are left out, since they were those of other tensors; what it was made from is told.

    Args:
        output: Folder to make or replace.
        adapter: In its new ranks.
        record: Of the adapter that it was made from.
        source: The folder of that one.
        module_names: Paths of all modules of the base, or nothing where they are not known.
    """
    settings = adapter.settings
    lora = {
        "r": settings.r,
        "alpha": settings.alpha,
        "rank_pattern": dict(settings.rank_pattern),
        "alpha_pattern": dict(settings.alpha_pattern),
    }
    name = source.resolve().parent.name if source.name == "adapter" else source.resolve().name
    sha256 = hashlib.sha256((source / WEIGHTS_FILE).read_bytes()).hexdigest()
    record = replace(
        record,
        config={**record.config, "lora": {**record.config["lora"], **lora}},
        metrics={},
        combined={
            "adapters": [{"adapter": name, "weight": 1.0, "sha256": sha256}],
            "method": "convert",
        },
        tensors_sha256=None,
    )
    card = model_card(
        CardData(
            name=output.resolve().name,
            base=adapter.base_name or "",
            base_sha256=str(record.base["sha256"]),
            task_type=adapter.task_type,
            **head_facts(record.config["task"]["family"], record.state),
            split="",
            rows=0,
            before={},
            after={},
            lora={key: show(value) for key, value in lora.items()},
            training={},
            versions={package: version(package) for package in PACKAGES},
            parts=[(name, "1", sha256)],
        )
    )
    return save_adapter(output, adapter, record, card=card, module_names=module_names)
