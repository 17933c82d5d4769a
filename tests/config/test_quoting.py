from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from lora_cli.config.compose import parse_override
from lora_cli.config.quoting import escape_references, quote_text

TEXTS = st.text(alphabet=st.sampled_from(list("a '\"\\${}[](),:=.\n~+-#%&|é")), max_size=12)


@given(TEXTS)
def test_hydra_and_omegaconf_give_the_text_back(text: str) -> None:
    parsed = parse_override(f"x={quote_text(text)}", literal=True, extra=None)
    assert not parsed.is_sweep
    assert parsed.typed == f"x={text}"
    assert OmegaConf.create({"x": parsed.values[0]}).x == text


@given(TEXTS)
def test_escaped_references_are_not_looked_up(text: str) -> None:
    assert OmegaConf.create({"x": escape_references(text)}).x == text
