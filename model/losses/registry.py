"""The divergences that `kl_div` can name, and their parameters. Imports no torch, so that a config can read it.

A new divergence is a row here and a formula in model/losses/divergences.py: CONTRIBUTING.md shows how.
"""

from typing import NamedTuple


class Parameter(NamedTuple):
    """A number that some divergences have. lowest, highest: its range; `is_open` excludes both ends."""

    default: float
    lowest: float
    highest: float
    is_open: bool
    description: str


class Entry(NamedTuple):
    """One divergence D(p, q) of teacher p and student q. parameters: keys of PARAMETERS."""

    description: str
    parameters: tuple[str, ...] = ()


PARAMETERS = {
    "beta": Parameter(0.5, 0, 1, True, "weight of the teacher in the mixture; the loss tends to 0 at both ends"),
    "lambda_": Parameter(0.1, 0, 1, True, "weight of the first argument"),
    "mu": Parameter(0.5, 0, 1, False, "share of forward KL; the rest is reverse KL"),
}
DIVERGENCES = {
    "forward": Entry("KL(p‖q)"),
    "reverse": Entry("KL(q‖p)"),
    "JS": Entry("Jensen-Shannon, the mean of KL(p‖m) and KL(q‖m), m = (p + q) / 2"),
    "generalized_js": Entry("beta KL(p‖m) + (1 - beta) KL(q‖m), m = beta p + (1 - beta) q", ("beta",)),
    "skew_forward": Entry("KL(p‖lambda p + (1 - lambda) q)", ("lambda_",)),
    "skew_reverse": Entry("KL(q‖lambda q + (1 - lambda) p)", ("lambda_",)),
    "total_variation": Entry("half the sum of absolute differences of p and q"),
    "symmetric": Entry("mu KL(p‖q) + (1 - mu) KL(q‖p)", ("mu",)),
    "adaptive": Entry("forward and reverse KL, weighted at each token by where p and q differ"),
}


def parameters_of(name: str, given: dict[str, float]) -> dict[str, float]:
    """The parameters of the divergence `name`: those given, defaults for the rest.

    Raises:
        ValueError: an unknown divergence, a parameter that it does not have, or one out of range.
    """
    if name not in DIVERGENCES:
        raise ValueError(f"kl_div is {name!r}: expected one of {', '.join(DIVERGENCES)}")
    names = DIVERGENCES[name].parameters
    for key, value in given.items():
        if key not in names:
            raise ValueError(f"{key} is no parameter of kl_div {name!r}: expected {' or '.join(names) or 'none'}")
        _, lowest, highest, is_open, _ = PARAMETERS[key]
        if not (lowest < value < highest if is_open else lowest <= value <= highest):
            raise ValueError(f"{key} is {value}: expected a number {'between' if is_open else 'from'} {lowest} "
                             f"{'and' if is_open else 'to'} {highest}")
    return {key: given.get(key, PARAMETERS[key].default) for key in names}
