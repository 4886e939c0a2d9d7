"""The objects of an installation with default values, as text: a change of the chart shows in a review.

``FARSHORE_UPDATE_GOLDEN=1 pytest tests/helm/test_golden.py`` writes the file again.
"""

import os
import re
from pathlib import Path

GOLDEN = Path(__file__).with_name("default.golden.yaml")
VALUES = {"image": {"repository": "registry.example.com/farshore"}}


def test_the_default_objects_are_the_golden_ones(call_helm):
    texts = call_helm("render", values=VALUES, name="demo", namespace="llm")
    parts = (f"# {name.partition('/')[2]}\n{text.strip()}\n" for name, text in sorted(texts.items()))
    text = "---\n".join(part for part in parts if "\n" in part.strip() and "NOTES.txt" not in part)
    # Each installation makes its own.
    text = re.sub(r"(auth_token: )\S{80,}", r"\1RANDOM", text)
    if os.environ.get("FARSHORE_UPDATE_GOLDEN"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()
