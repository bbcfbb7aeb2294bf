"""Every Python example of the README runs as it stands, pasted one after the other."""

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_examples():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 4
    names = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert names["y"].shape == (2, 4)
