"""What runs leave out, and what they are trained on: `--test-envs` and `--sources`."""

from collections.abc import Sequence

from qtdog.data.listing import composed
from qtdog.errors import UserError

Task = tuple[tuple[int, ...], tuple[int, ...]]  # indices of the targets, and of the sources if these are chosen


def parse_tasks(test_envs: Sequence[str], sources: Sequence[str], dataset: str, domains: Sequence[str]) -> list[Task]:
    """The targets, and perhaps sources, of each run; a domain goes by its name or, where no name is meant, its index.

    `all` is every domain in runs of its own, or with chosen sources all others at once; `photo+sketch` is both at once.

    Raises:
        UserError: for domains that there are not, sources that are targets, and targets that leave nothing to train on.
    """
    chosen = tuple(dict.fromkeys(env for name in sources for env in parse("sources", name, dataset, domains)))
    targets: list[tuple[int, ...]] = []
    for name in test_envs:
        if name == "all" and "all" not in domains:
            others = [env for env in range(len(domains)) if env not in chosen]
            targets += [tuple(others)] if chosen else [(env,) for env in others]
        else:
            targets.append(tuple(sorted(set(parse("test-envs", name, dataset, domains)))))
    for envs in targets:
        named = "+".join(domains[env] for env in envs)
        if both := [domains[env] for env in envs if env in chosen]:
            raise UserError(f"{', '.join(both)} cannot be trained on and left out: change --sources or --test-envs")
        if not envs or (not chosen and len(envs) == len(domains)):
            raise UserError(f"--test-envs {named or 'all'} leaves no domain to {'train on' if envs else 'test on'}")
    return [(envs, chosen) for envs in dict.fromkeys(targets)]


def parse(flag: str, name: str, dataset: str, domains: Sequence[str]) -> list[int]:
    """The indices of `a`, or of `a+b+c`; names may have a plus in them."""
    found = resolve(composed(name), domains)
    if found is None:
        listed = ", ".join(f"{index} {domain}" for index, domain in enumerate(domains))
        raise UserError(f"--{flag} {name}: {dataset} has the domains {listed}, or `all`; several at once as 0+1")
    return found


def resolve(name: str, domains: Sequence[str]) -> list[int] | None:
    """The indices of a domain or several joined by plus signs; None if there is none of that name."""
    if name in domains:
        return [domains.index(name)]
    if name.isdecimal() and int(name) < len(domains):
        return [int(name)]
    for place, letter in enumerate(name):
        if letter == "+":
            first, rest = resolve(name[:place], domains), resolve(name[place + 1 :], domains)
            if first is not None and rest is not None:
                return first + rest
    return None
