"""How near generated texts are to those that were wanted: BLEU, chrF, ROUGE and exact match.

BLEU (Papineni et al. 2002) and chrF (Popovic 2015) are sacreBLEU's, from 0 to 100, over all texts
at once. ROUGE (Lin 2004) is that of rouge-score, the mean over texts of the F1 with the best
reference, from 0 to 100 as well. ``exact_match`` is the share, from 0 to 1, of the texts that are
one of their references but for white space at their ends.

BLEU counts words, which Chinese and Japanese do not mark: sacreBLEU's tokenizer "zh" takes each
Chinese character for a word, "char" each character of any script. ROUGE then does the same; words
of other scripts are runs of letters and digits, in lower case.
"""

import importlib.util
import re
from collections.abc import Sequence
from typing import Any

from lora_cli.errors import Problem, UserError

METRICS = ("bleu", "chrf", "rouge1", "rouge2", "rougeL", "exact_match")

_PACKAGES = ("sacrebleu", "rouge_score")
_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af]")
_KANA = re.compile(r"[\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9d]")
_WORD = re.compile(r"[^\W_]+")
_SINGLE = re.compile(
    rf"{_HAN.pattern}|{_KANA.pattern}|(?:(?!{_HAN.pattern}|{_KANA.pattern})[^\W_])+"
)
# Share of the characters of the references, white space aside, that make them Chinese.
_SHARE = 0.3


def check_metric_packages(metric: str) -> None:
    """Refuse to start where the packages that count are missing.

    Args:
        metric: What asks for them, such as "task.metric=bleu".

    Raises:
        UserError: If they are not installed.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            Problem(
                id="task.missing-extra",
                message=f"`{metric}` needs the packages sacrebleu and rouge-score, but "
                f"{' and '.join(missing).replace('_', '-')} cannot be imported.",
                key=metric.partition("=")[0],
                fix='pip install "lora-cli[generation]"',
            )
        )


def text_tokenizer(references: Sequence[Sequence[str]]) -> str:
    """Return the tokenizer of sacreBLEU for the language of some references.

    "char" if a tenth of the characters are kana, as in Japanese; "zh" if three tenths are Chinese
    characters; else "13a", the usual one.
    """
    text = "".join("".join(one.split()) for row in references for one in row)
    if not text:
        return "13a"
    if len(_KANA.findall(text)) >= 0.1 * len(text):
        return "char"
    return "zh" if len(_HAN.findall(text)) >= _SHARE * len(text) else "13a"


def generation_metrics(
    texts: Sequence[str], references: Sequence[Sequence[str]], *, tokenizer: str = "auto"
) -> dict[str, float]:
    """Return every metric of `METRICS`; all are 0 without texts.

    Args:
        texts: What was generated.
        references: Of each text those that were wanted, one at least.
        tokenizer: A tokenizer of sacreBLEU, or "auto"; see `text_tokenizer`.
    """
    if not texts:
        return dict.fromkeys(METRICS, 0.0)
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    name = text_tokenizer(references) if tokenizer == "auto" else tokenizer
    most = max(map(len, references))
    # sacreBLEU passes over None where a text has fewer references than another.
    streams: Any = [[row[n] if n < len(row) else None for row in references] for n in range(most)]
    return {
        "bleu": BLEU(tokenize=name, force=True).corpus_score(list(texts), streams).score,
        "chrf": CHRF().corpus_score(list(texts), streams).score,
        **_rouge(texts, references, single=name in ("zh", "char")),
        "exact_match": exact_match(texts, references),
    }


def exact_match(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return the share of texts that are one of their references, white space at ends aside."""
    pairs = list(zip(texts, references, strict=True))
    hits = sum(text.strip() in [one.strip() for one in wanted] for text, wanted in pairs)
    return hits / len(pairs) if pairs else 0.0


def split_words(text: str, *, single: bool) -> list[str]:
    """Return the words of a text, for ROUGE.

    Args:
        text: Any text.
        single: Take Chinese characters and kana one by one.

    >>> split_words("Zwei Häuser, 2 cars_and 我喜欢", single=True)
    ['zwei', 'häuser', '2', 'cars', 'and', '我', '喜', '欢']
    """
    found: list[str] = (_SINGLE if single else _WORD).findall(text.lower())
    return found


class _Words:
    """`split_words` as rouge-score asks for it."""

    def __init__(self, *, single: bool) -> None:
        self._single = single

    def tokenize(self, text: str) -> list[str]:
        return split_words(text, single=self._single)


def _rouge(
    texts: Sequence[str], references: Sequence[Sequence[str]], *, single: bool
) -> dict[str, float]:
    from rouge_score.rouge_scorer import RougeScorer

    names = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(list(names), tokenizer=_Words(single=single))
    sums = dict.fromkeys(names, 0.0)
    for text, wanted in zip(texts, references, strict=True):
        found = scorer.score_multi(list(wanted), text)
        for name in names:
            sums[name] += 100 * found[name].fmeasure
    return {name: value / len(texts) for name, value in sums.items()}
