from lora_cli.config.conversion import ConvertConfig, check_convert


def test_every_path_is_asked_for() -> None:
    assert [p.key for p in check_convert(ConvertConfig(), ())] == ["adapter", "output"]
    assert not list(check_convert(ConvertConfig(adapter="a", output="b"), ()))
