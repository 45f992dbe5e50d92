"""What a worker may touch. Imports the standard library only; runs on Python 3.8 and up."""
