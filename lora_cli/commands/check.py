"""`lora-cli check`: would other programs load this adapter, and what to change if not."""

import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from lora_cli.artifacts.adapter import find_subject
from lora_cli.artifacts.inspection import BaseShapes, Inspected, inspect_adapter
from lora_cli.artifacts.portability import VERSIONS, Finding, find_problems
from lora_cli.artifacts.portability_base import describe_base
from lora_cli.artifacts.portability_table import RULES
from lora_cli.commands.display import Display
from lora_cli.commands.options import Options
from lora_cli.config.composed import Composed
from lora_cli.config.portability import CheckConfig
from lora_cli.errors import UserError
from lora_cli.models.architecture import load_architecture, resolve_config
from lora_cli.models.folders import KEY

# The class that loads a model by PEFT's name of its task, or by the end of its own class's name.
_OF_TASK = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "CAUSAL_LM": "AutoModelForCausalLM",
}
_WORDS = {
    "error": "would not load, or would give other outputs",
    "warning": "nothing that keeps it from loading, but see the warnings",
    "ok": "nothing found",
}
_HEAD = re.compile(r"(^|\.)(classifier|score)(\.out_proj)?\.weight$")


def run(composed: Composed, options: Options, display: Display) -> int:
    """Check, show what was found, and return 1 where one of it is an error."""
    del options
    config: CheckConfig = composed.config
    folder = find_subject(config.from_ or "").adapter
    inspected = inspect_adapter(folder)
    if config.base is not None:
        inspected = replace(inspected, base=_base(config.base, inspected))
    findings = find_problems(inspected, RULES, config.for_)
    _show(findings, config.for_, display)
    errors = [finding for finding in findings if finding.severity == "error"]
    display.result(
        {
            "adapter": str(folder),
            "base": config.base,
            "for": {name: _verdict(name, findings) for name in config.for_},
            "checked_against": {name: VERSIONS[name] for name in config.for_},
            "errors": len(errors),
            "warnings": len(findings) - len(errors),
            "findings": [_as_json(finding) for finding in findings],
        }
    )
    return 1 if errors else 0


def _base(path: str, adapter: Inspected) -> BaseShapes:
    """Lay out the base without numbers, with the head that the adapter's task has.

    Raises:
        UserError: If there is no such model.
    """
    try:
        source = resolve_config(path)
        rows = next((t.shape[0] for n, t in adapter.tensors.items() if _HEAD.search(n)), None)
        options = {} if rows is None else {"num_labels": rows}
        auto_class = _OF_TASK.get(str(adapter.config.get("task_type")), "AutoModel")
        model = load_architecture(source, auto_class=auto_class, options=options).model
    except UserError as error:
        problems = [
            replace(problem, key="base", message=problem.message.replace(KEY, "base"), fix=None)
            if problem.key == KEY
            else problem
            for problem in error.problems
        ]
        raise UserError(problems) from error
    return describe_base(model)


def _verdict(runtime: str, findings: Sequence[Finding]) -> str:
    severities = {finding.severity for finding in findings if runtime in finding.runtimes}
    return "error" if "error" in severities else "warning" if severities else "ok"


def _show(findings: Sequence[Finding], runtimes: Sequence[str], display: Display) -> None:
    rows = [
        [
            finding.severity,
            "\n".join(finding.runtimes),
            f"{finding.text}\nfix: {finding.fix}\nrule: {finding.id}",
        ]
        for finding in findings
    ]
    if rows:
        display.table("portability", ["", "for", "finding"], rows, are_numbers=False)
    for name in runtimes:
        display.note(f"{name} ({VERSIONS[name]}): {_WORDS[_verdict(name, findings)]}")


def _as_json(finding: Finding) -> dict[str, Any]:
    plain = asdict(finding)
    return {
        "id": plain["id"],
        "severity": plain["severity"],
        "for": list(finding.runtimes),
        "finding": plain["text"],
        "fix": plain["fix"],
        "source": plain["source"],
    }
