"""What crosses between a caller and a worker: frames, values and tensors.

Both sides import this package. It imports the standard library and, late, torch, and runs on
Python 3.8 and up.
"""
