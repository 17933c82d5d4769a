from lora_cli.config.extraction import ExtractConfig, check_extract


def test_every_path_is_asked_for() -> None:
    assert [problem.key for problem in check_extract(ExtractConfig(), ())] == [
        "base",
        "tuned",
        "output",
    ]
    given = ExtractConfig(base="a", tuned="b", output="c")
    assert not list(check_extract(given, ()))
