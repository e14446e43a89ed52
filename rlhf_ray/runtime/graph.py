"""In what order the parts of a graph run, several of them at a time: who may begin, and what a failure leaves undone.

Pure: how a part begins, how one hears of an end, and what fits beside what come as functions. Every part begins once,
after all that it waits for have ended well; once one has failed none begins, and those that run are let end. What must
never happen: an end that nobody waits for, or a part left waiting though nothing runs.
"""

from collections.abc import Callable, Collection, Mapping, Sequence


def walk(
    after: Mapping[str, Collection[str]],
    begin: Callable[[str], None],
    ended: Callable[[], tuple[str, Exception | None]],
    fits: Callable[[Sequence[str]], bool],
) -> dict[str, Exception]:
    """Errors of the parts that failed; none: all have run.

    `after` names what each part waits for, without circles; of several that may begin the first one there does. `ended`
    waits until any part that runs has ended, and says which and with what error. `fits` says whether so many may run at
    the same time; what runs alone is not asked about.
    """
    waiting, running, done = list(after), list[str](), set[str]()
    errors: dict[str, Exception] = {}
    while True:
        for name in [name for name in waiting if not errors and done.issuperset(after[name])]:
            if not running or fits([*running, name]):
                waiting.remove(name)
                running.append(name)
                begin(name)
        if not running:
            return errors
        name, error = ended()
        running.remove(name)
        if error is None:
            done.add(name)
        else:
            errors[name] = error
