"""Never finishes importing."""

dependencies = ["torch"]

import time

while True:
    time.sleep(3600)


def model():
    """Never reached."""
