"""In a namespace package: there is no __init__.py."""

NAME = "inner part"
