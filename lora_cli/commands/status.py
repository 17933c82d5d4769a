"""`lora-cli status`: how far runs are, how they do, why they ended and how to resume them."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_cli.artifacts.run_dir import has_begun
from lora_cli.artifacts.run_state import NOT_FINITE, RunState, read_state, resume_command
from lora_cli.commands.display import Display
from lora_cli.commands.options import Options
from lora_cli.config.commands import StatusConfig
from lora_cli.config.composed import Composed
from lora_cli.errors import Problem, UserError

_TO_RESUME = ("stopped", "failed", "crashed")


def run(composed: Composed, options: Options, display: Display) -> int:
    """Show one run or all runs of a folder, once or until they have ended."""
    config: StatusConfig = composed.config
    path = Path(config.from_ or "")
    is_one = has_begun(path)
    shown: list[str] = []
    while True:
        states = [read_state(path)] if is_one else _states(path)
        is_last = not config.watch or all(state.state != "running" for state in states)
        if not options.json and not options.quiet:
            lines = _lines(states[0]) if is_one else [_line(state) for state in states]
            if lines != shown:
                _show(states, display, is_one=is_one)
            shown = lines
        if is_last:
            break
        time.sleep(config.every)
    plain = [_as_json(state) for state in states]
    display.result(plain[0] if is_one else {"runs": plain})
    return 0


def _states(folder: Path) -> list[RunState]:
    """Look at every run of a folder, in order of name.

    Raises:
        UserError: If there is none.
    """
    paths = sorted(x for x in folder.glob("*") if has_begun(x)) if folder.is_dir() else []
    if not paths:
        raise UserError(
            Problem(
                id="status.no-run",
                message=f"`from` must be a run directory or a folder of them, but {folder} is"
                " neither.",
                key="from",
                fix="lora-cli status runs/",
            )
        )
    return [read_state(path) for path in paths]


def _show(states: list[RunState], display: Display, *, is_one: bool) -> None:
    if is_one:
        for line in _lines(states[0]):
            display.output(line)
        return
    columns = ["run", "state", "step", "time left", "best", "reason"]
    display.table(f"{len(states)} runs", columns, [_cells(state) for state in states])


def _line(state: RunState) -> str:
    return "  ".join(_cells(state))


def _cells(state: RunState) -> list[str]:
    reason = "" if state.state in ("running", "finished") else state.reason or ""
    left = duration(state.seconds_left)
    return [state.path.name, state.state, _progress(state), left, _best(state), reason]


def _lines(state: RunState) -> list[str]:
    """Describe one run, a fact to the line; what is not known is left out."""
    now = state.standing
    doing = ""
    if state.state == "running" and now is not None:
        rows = f" ({now.eval_rows:,} rows so far)" if now.phase == "evaluating" else ""
        doing = f", {now.phase}{rows}"
    if state.state == "running":
        doing += f", {state.holder}"
    rate = now.samples_per_second if now else None
    facts = {
        "run": str(state.path),
        "state": state.state + doing,
        "step": _progress(state),
        "time left": duration(state.seconds_left),
        "speed": "" if rate is None else f"{rate:.0f} samples/s while training",
        "best": _best(state),
        "result": "" if state.result is None else f"{state.result:.4f}",
        "checkpoint": "" if state.checkpoint is None else f"step {state.checkpoint}",
        "reason": state.reason or "",
        "last sign": _last_sign(state),
        "resume": _resume(state) or "",
        "fix": _instead(state),
    }
    return [f"{name + ':':<12}{text}" for name, text in facts.items() if text]


def _resume(state: RunState) -> str | None:
    """Return how to go on; None where that is of no use."""
    is_useful = state.state in _TO_RESUME and NOT_FINITE not in state.errors
    return resume_command(state.path) if is_useful else None


def _instead(state: RunState) -> str:
    """Say what to do where resuming with the same settings would only fail again."""
    if NOT_FINITE not in state.errors:
        return ""
    start = ""
    if (state.path / "adapter").is_dir():
        start = f", from the best adapter so far: adapter={state.path}"
    return f"resumed, it would diverge again: start a new run with other settings{start}"


def _last_sign(state: RunState) -> str:
    if state.state not in ("crashed", "unknown") or state.standing is None:
        return ""
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(state.standing.updated))}"


def _progress(state: RunState) -> str:
    now = state.standing
    if now is None or not now.total_steps:
        return ""
    share = 100 * now.step // now.total_steps
    return f"{now.step:,} of {now.total_steps:,} ({share} %), epoch {now.epoch:.2f}"


def _best(state: RunState) -> str:
    now = state.standing
    if now is None or now.best_value is None:
        return ""
    return f"{now.metric} {now.best_value:.4f} at step {now.best_step:,}"


def duration(seconds: float | None) -> str:
    """Write a length of time with its two largest units; nothing for None.

    >>> duration(3.2), duration(125), duration(100_000)
    ('3 s', '2 min 5 s', '1 d 3 h')
    """
    if seconds is None:
        return ""
    left = round(seconds)
    parts: list[tuple[int, str]] = []
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        number, left = divmod(left, size)
        if parts or number or unit == "s":
            parts.append((number, unit))
    return " ".join(f"{number} {unit}" for number, unit in parts[:2] if number or len(parts) == 1)


def _as_json(state: RunState) -> dict[str, Any]:
    plain = asdict(state)
    standing = plain.pop("standing") or {}
    resume = _resume(state)
    left = state.seconds_left
    return {**standing, **plain, "path": str(state.path), "seconds_left": left, "resume": resume}
