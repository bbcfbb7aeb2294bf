"""Scripts that read from top to bottom: `python -m train.sft --config=configs/quickstart.py`."""

import os

# Before any library is loaded: some of them greet on stderr.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
