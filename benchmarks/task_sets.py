"""The rows of the table of `benchmarks/tasks.py`: data, settings and baselines of each run.

Settings were chosen on validation rows.
"""

from dataclasses import dataclass

PAIR = ("task.data.text_column=text_a", "task.data.text_pair_column=text_b")
WHOLE = ("lora=all-linear", "lora.r=16")
UNTRAINED = ("untrained",)
# Sounds and model of `benchmarks/spoken_digits.py`.
SPOKEN = "spoken_digits"


@dataclass(frozen=True)
class Run:
    """One row of the table.

    Attributes:
        data: A folder of DATA; made/NAME, one of `made_rows.MAKERS`; cache://NAME; or SPOKEN.
        family: Task family.
        metric: What is compared.
        settings: What the run sets besides.
        baselines: Names in `baselines.BASELINES`, or untrained; the best one is to be beaten.
        model: minilm, which is a package, a folder of MODELS, or SPOKEN.
        start: Another row whose adapter is merged before.
        beside: Another row whose result is a baseline too.
    """

    data: str
    family: str
    metric: str
    settings: tuple[str, ...]
    baselines: tuple[str, ...] = ()
    model: str = "minilm"
    start: str | None = None
    beside: str | None = None


def rows(train: int | None = None, evaluated: int | None = None) -> tuple[str, ...]:
    """Return the settings that cut the splits."""
    limits = {"max_train_rows": train, "max_eval_rows": evaluated}
    return tuple(f"task.data.{name}={count}" for name, count in limits.items() if count)


def steps(lr: float, epochs: int, batch: int = 16) -> tuple[str, ...]:
    """Return the settings of how long, how fast and in what batches is learned."""
    return (
        f"optimizer.lr={lr:g}",
        f"trainer.epochs={epochs}",
        f"trainer.global_batch_size={batch}",
    )


def short(lr: float, steps: int, batch: int) -> tuple[str, ...]:
    """Return the settings of less than an epoch."""
    return (
        f"optimizer.lr={lr:g}",
        f"trainer.max_steps={steps}",
        f"trainer.global_batch_size={batch}",
    )


_TOPICS = (
    *("task.data.text_column=text", "task.data.label_column=label"),
    *(*rows(1000, 500), "task.max_length=64", *steps(4e-3, 1)),
)

RUNS: dict[str, Run] = {
    "movie_reviews": Run(
        *("cache://movie-reviews", "text_classification", "accuracy"),
        (*rows(1500, 500), "task.max_length=64", *steps(4e-3, 2)),
        ("majority", "words"),
    ),
    "film_genres": Run(
        *("made/genres", "multi_label_classification", "micro_f1"),
        ("task.threshold=0.3", "task.max_length=32", *WHOLE, *steps(5e-4, 8)),
        ("frequent_labels", "words_by_label"),
    ),
    "ml-100k": Run(
        *("made/ratings", "ranking", "auc"),
        (*rows(6000, 1000), "task.max_length=64", *WHOLE, *steps(2e-3, 1)),
        ("popularity", "share_of_likes"),
    ),
    "banking77": Run(
        *("banking77", "text_classification", "accuracy"),
        (*rows(2000, 700), "task.max_length=64", *WHOLE, *steps(4e-3, 5)),
        ("majority", "words"),
    ),
    "tweeteval_emotion": Run(
        *("tweeteval_emotion", "text_classification", "macro_f1"),
        (*rows(2000, 500), "task.max_length=64", *steps(4e-3, 2)),
        ("majority", "words"),
    ),
    "sick_inference": Run(
        *("sick", "text_classification", "accuracy"),
        (*PAIR, "task.data.label_column=label", *rows(2000, 500), *steps(4e-3, 3)),
        ("majority", "words"),
    ),
    "sick_likeness": Run(
        *("sick", "text_regression", "pearson"),
        (*PAIR, "task.data.label_column=score", *rows(1500, 500), *steps(4e-3, 2)),
        ("cosine",),
    ),
    "fewclue_bustm": Run(
        *("fewclue_bustm", "text_classification", "accuracy"),
        (*PAIR, *rows(None, 500), "task.max_length=64", *steps(2e-3, 10)),
        ("majority", "characters", "likeness"),
        model="me5-small",
    ),
    "chnsenticorp_hotel": Run(
        *("chnsenticorp_hotel", "text_classification", "accuracy"),
        (*rows(800, 300), "task.max_length=96", *steps(2e-3, 3)),
        ("majority", "characters"),
        model="me5-small",
    ),
    "wikiann_types": Run(
        *("made/entity_types", "multi_label_classification", "micro_f1"),
        (*rows(2000, 500), "task.max_length=64", *steps(4e-3, 2)),
        ("frequent_labels", "words_by_label"),
    ),
    "wikiann_en": Run(
        *("wikiann_en", "token_classification", "f1"),
        (*rows(2000, 500), "task.max_length=64", *WHOLE, *steps(4e-3, 2)),
        ("usual_tag",),
    ),
    "wnut17": Run(
        *("made/wnut17", "token_classification", "f1"),
        (*rows(2000, 500), "task.max_length=64", *WHOLE, *steps(2e-3, 2)),
        ("usual_tag",),
        start="wikiann_en",
    ),
    "xquad_en": Run(
        *("xquad_en", "question_answering", "f1"),
        (
            *("task.data.validation_split=0.1", "task.data.test_split=validation"),
            *("task.max_length=256", "task.stride=64", "trainer.eval_steps=1000"),
            *(*rows(None, 150), *WHOLE, *steps(2e-3, 2, batch=8)),
        ),
        ("sentence",),
    ),
    "ag_news_cloze": Run(
        *("made/cloze", "multiple_choice", "accuracy"),
        (*rows(1200, 250), "task.max_length=96", *WHOLE, *steps(1e-3, 2)),
        ("overlap",),
    ),
    "ag_news": Run(
        *("ag_news", "text_classification", "accuracy"),
        _TOPICS,
        ("majority", "words"),
    ),
    "ag_news_words": Run(
        *("ag_news", "masked_language_modeling", "perplexity"),
        (
            *("task.data.text_column=text", *rows(2000, 200), "task.max_length=64"),
            *(*WHOLE, *steps(4e-3, 1)),
        ),
        ("unigram",),
    ),
    "fsdd": Run(
        *("fsdd", "audio_classification", "accuracy"),
        ("task.max_seconds=1", "lora=all-linear", *rows(60, None), *steps(5e-4, 15, batch=8)),
        ("majority", "linear_probe"),
        model="whisper-base",
    ),
    "ag_news_after_words": Run(
        *("ag_news", "text_classification", "accuracy"),
        _TOPICS,
        ("majority", "words"),
        start="ag_news_words",
        beside="ag_news",
    ),
    "tech_support": Run(
        *("made/support", "chat", "chrf"),
        (
            *("task.max_length=96", *rows(None, 40), *WHOLE, *short(2e-3, 40, batch=8)),
            *("task.generate_in_eval=true", "task.generation.max_new_tokens=48"),
        ),
        UNTRAINED,
        model="smollm2",
    ),
    "alpaca_en_demo": Run(
        *("alpaca_en_demo", "chat", "perplexity"),
        ("task.max_length=256", *rows(None, 60), *WHOLE, *short(1e-3, 20, batch=8)),
        UNTRAINED,
        model="smollm2",
    ),
    "package_texts": Run(
        *("debian_synopsis", "causal_language_modeling", "perplexity"),
        (
            *("task.data.text_column=source", "task.max_length=256", *rows(1000, 60)),
            *(*WHOLE, *short(1e-3, 30, batch=4)),
        ),
        UNTRAINED,
        model="smollm2",
    ),
    "sst2_answers": Run(
        *("sst2", "answer_choice", "accuracy"),
        (
            *("task.data.text_column=text", "task.data.label_column=label", "task.max_length=96"),
            "task.prompt=Review: {text} Sentiment:",
            *(*rows(800, 300), *steps(1e-3, 1)),
        ),
        (*UNTRAINED, "majority", "words"),
        model="smollm2",
    ),
    "trec_answers": Run(
        *("trec", "answer_choice_seq2seq", "accuracy"),
        (
            *("task.data.text_column=text", "task.data.label_column=label", "task.max_length=64"),
            "task.prompt=Question: {text} What kind of answer is asked for?",
            *(*rows(1500, 300), *steps(2e-3, 2)),
        ),
        (*UNTRAINED, "majority", "words"),
        model="flan-t5-small",
    ),
    "e2e_nlg": Run(
        *("made/descriptions", "seq2seq", "bleu"),
        (
            *("task.prefix=describe: ", "task.max_length=96", "task.max_target_length=96"),
            *(*rows(1200, 40), *WHOLE, *steps(1e-3, 1), "task.generation.max_new_tokens=80"),
        ),
        UNTRAINED,
        model="flan-t5-small",
    ),
    "multi30k_en_de": Run(
        *("multi30k_en_de", "seq2seq", "bleu"),
        (
            *("task.prefix=translate English to German: ", "task.max_length=64"),
            *("task.max_target_length=64", *rows(2000, 100), *WHOLE, *steps(1e-3, 1)),
            "task.generation.max_new_tokens=48",
        ),
        UNTRAINED,
        model="flan-t5-small",
    ),
    "debian_synopsis": Run(
        *("debian_synopsis", "seq2seq", "rougeL"),
        (
            *("task.prefix=summarize: ", "task.max_length=128", "task.max_target_length=32"),
            *(*rows(1000, 100), *WHOLE, *steps(1e-3, 1), "task.generation.max_new_tokens=24"),
        ),
        UNTRAINED,
        model="flan-t5-small",
    ),
    "fashion_mnist": Run(
        *("fashion_mnist", "image_classification", "accuracy"),
        (
            *("lora=all-linear", "lora.layers=6-11", "task.augmentation.crop_scale=0.9"),
            *("task.augmentation.color_jitter=0", *steps(5e-4, 6)),
        ),
        ("majority", "linear_probe"),
        model="dinov2-small",
    ),
    "spoken_digits": Run(
        *(SPOKEN, "speech_recognition_ctc", "wer"),
        ("lora=all-linear", "lora.r=32", *steps(1e-2, 15)),
        UNTRAINED,
        model=SPOKEN,
    ),
}
