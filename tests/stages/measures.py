"""Measures of answers that are functions, importable by an actor."""


def length(prompts: list[str], responses: list[str]) -> list[float]:
    """In characters."""
    return [float(len(response)) for response in responses]


def broken(prompts: list[str], responses: list[str]) -> list[float]:
    """Works when it is looked at, and never when it is needed."""
    raise ZeroDivisionError("no measure")
