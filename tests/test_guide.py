"""The Python blocks of ``docs/guide.md`` run, those of one heading in one namespace."""

import re
from pathlib import Path

import jax
import pytest

GUIDE = Path(__file__).parent.parent / "docs" / "guide.md"
FENCE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def sections():
    """``{heading: code}`` of the headings that have Python blocks."""
    parts = re.split(r"^#{1,3} (.*)\n", GUIDE.read_text(), flags=re.MULTILINE)
    found = {
        heading: "\n".join(FENCE.findall(text))
        for heading, text in zip(parts[1::2], parts[2::2], strict=True)
    }
    return {heading: code for heading, code in found.items() if code}


pytestmark = pytest.mark.slow

SETUP, *HEADINGS = sections()


@pytest.fixture(scope="module")
def setup():
    namespace = {"__name__": "guide"}
    exec(compile(sections()[SETUP], str(GUIDE), "exec"), namespace)
    return namespace


@pytest.mark.parametrize("heading", HEADINGS)
def test_the_snippets_run(heading, setup):
    with jax.numpy_dtype_promotion("standard"):
        exec(compile(sections()[heading], f"{GUIDE}: {heading}", "exec"), dict(setup))
