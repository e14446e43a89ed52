"""Errors a person is meant to read: one message that names the thing, the place, and the remedy.

The command line prints the message alone and exits with `exit_code`; a traceback is for bugs, not for these.
"""


class RLHFError(Exception):
    """Base of every error that is somebody's to mend rather than a bug of ours."""

    exit_code = 1


class ConfigError(RLHFError):
    """The configuration is wrong: an unknown key, a value out of range, fields that contradict each other."""

    exit_code = 2


class DataError(RLHFError):
    """Input rows cannot be used: file missing, too many bad rows, nothing left to train on."""

    exit_code = 2


class ModelError(RLHFError):
    """A model folder is missing, is not a model, or does not fit the other models or the tokenizer."""

    exit_code = 2


class ResourceError(RLHFError):
    """The cluster lacks what the configuration asks for, or nobody answers at its address."""


class RewardError(RLHFError):
    """A reward could not be had: a function raised, a server failed, a value was not finite."""


class JudgeError(RLHFError):
    """A judge gives too few preferences to go on with, or none at all."""


class GenerationError(RLHFError):
    """A rollout engine failed while it generated, or cannot serve what it was asked."""


class PublicationError(RLHFError):
    """Weights did not arrive as they were sent: checksum or canary mismatch."""


class DeadlineError(RLHFError):
    """A wait passed its deadline; the message says who waited for whom and for how long."""


class TrainingError(RLHFError):
    """Training met a value it must not go on with, such as a loss that is not finite."""


class StopRequested(RLHFError):
    """Somebody asked the run to stop (Ctrl-C, SIGTERM); state is saved before this reaches the command line."""

    exit_code = 130
