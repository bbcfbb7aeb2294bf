"""`eight_devices.py`, in a process that has eight devices."""

import eight
import pytest


@pytest.mark.slow
def test_on_eight_devices():
    eight.run("eight_devices.py")
