"""The examples of docs/sdk.md run."""

import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "sdk.md"
ADDRESS = "127.0.0.1:50051"


def test_the_examples_of_the_page(farshore, served):
    examples = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(examples) == 6 and all(ADDRESS in example for example in examples)
    farshore.engine.auto = served.tokenizer.encode(" there was a lighthouse")
    script = "\n".join(examples).replace(ADDRESS, farshore.address)
    done = subprocess.run(
        [sys.executable, "-P", "-W", "error", "-c", script], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    # Whole texts, two of them of one call; the one that was left in its middle is not printed.
    assert done.stdout.count(" there was a lighthouse") == 8, done.stdout
