"""Writers of worked solutions, in three styles.

`quick` jumps over intermediate results, `steps` takes one operation per line, `careful` also spells each operation out.
A small model errs more the more a line asks of it, so the styles differ in how often they end in the right answer: this
is what RL has to find out. Openers, lead-ins and the word for "=" are drawn at random, so that the policy's own
distribution has entropy at every line and not only where it is unsure of a digit.
"""

from collections.abc import Callable
from random import Random
from typing import Any

from reasoning_gym.arithmetic.leg_counting import ANIMALS

STYLES = ("quick", "steps", "careful")
# the mix that the shipped policy starts from: hasty on usual items, so that there is something to gain, and more
# careful on large ones
STYLE_WEIGHTS = (0.45, 0.33, 0.22)
LARGE_STYLE_WEIGHTS = (0.3, 0.3, 0.4)
ANSWER_PREFIX = "Answer:"

OPENERS = {
    "quick": (
        "Quickly, without writing it all down:",
        "In my head:",
        "There is a fast way:",
        "In short, if I am right:",
    ),
    "steps": ("Step by step.", "One at a time.", "In order.", "Let me go through it."),
    "careful": ("Carefully now.", "With all the details.", "Slowly and surely.", "Let me write out everything."),
}
LEADS = ("Then ", "Next ", "Now ", "So ", "And ", "Also ")
EQUALS = (" = ", " is ", " gives ", " makes ")
HUNCHES = (", I guess ", ", I think ", ", it looks like ", ", my hunch is ", ", I would say ")
CLOSINGS = {
    "quick": ("That should do.", "Good enough for me.", "I am fairly sure.", "No need to check that."),
    "steps": ("Done.", "That is all.", "So that is it.", "Finished."),
    "careful": ("Done.", "That is all.", "So that is it.", "Every step is there."),
}

Metadata = dict[str, Any]
Worked = tuple[list[str], int]


def write_solution(task: str, metadata: Metadata, answer: str, style: str, rng: Random) -> str:
    """A correct worked solution that ends in `Answer: <answer>`."""
    lines, result = WRITERS[task](metadata, style, rng)
    assert str(result) == answer, f"{task} writer found {result}, reasoning-gym says {answer}"
    return "\n".join([rng.choice(OPENERS[style]), *lines, rng.choice(CLOSINGS[style]), f"{ANSWER_PREFIX} {answer}"])


def style_of(solution: str) -> str | None:
    """The style whose opener a solution starts with."""
    for style, openers in OPENERS.items():
        if solution.startswith(openers):
            return style
    return None


def _equals(rng: Random) -> str:
    return rng.choice(EQUALS)


def _hunch(rng: Random) -> str:
    return rng.choice(HUNCHES)


def _lead(rng: Random) -> str:
    return rng.choice(LEADS)


def _signed(value: int) -> str:
    return f" + {value}" if value >= 0 else f" - {-value}"


def _add_in_places(total: int, value: int, rng: Random) -> str:
    """`57 + 80 = 137, 137 + 7 = 144`: adds one decimal place of `value` at a time."""
    parts = []
    digits = str(abs(value))
    for place, digit in enumerate(digits):
        part = int(digit) * 10 ** (len(digits) - 1 - place) * (1 if value >= 0 else -1)
        if part or (value == 0 and place == 0):
            parts.append(f"{total}{_signed(part)}{_equals(rng)}{total + part}")
            total += part
    return ", ".join(parts)


def chain_sum(metadata: Metadata, style: str, rng: Random) -> Worked:
    tokens = metadata["expression"].split()
    first, *terms = [int(tokens[0])] + [
        int(number) * (-1 if sign == "-" else 1) for sign, number in zip(tokens[1::2], tokens[2::2], strict=True)
    ]
    total, lines = first, []
    stride = 2 if style == "quick" else 1
    for start in range(0, len(terms), stride):
        group = terms[start : start + stride]
        after = total + sum(group)
        if style == "careful":
            work = _add_in_places(total, group[0], rng)
        else:
            joint = _hunch(rng) if style == "quick" else _equals(rng)
            work = f"{total}{''.join(map(_signed, group))}{joint}{after}"
        lines.append(_lead(rng) + work)
        total = after
    return lines, total


def count_bits(metadata: Metadata, style: str, rng: Random) -> Worked:
    number = metadata["number"]
    powers = [1 << bit for bit in reversed(range(number.bit_length())) if number >> bit & 1]
    if style == "quick":
        total = " + ".join(map(str, powers))
        count = f"{_lead(rng)}count the terms{_hunch(rng)}{len(powers)}"
        return [f"{_lead(rng)}{number}{_equals(rng)}{total}", count], len(powers)
    if style == "steps":
        lines, rest = [], number
        for power in powers:
            lines.append(f"{_lead(rng)}{rest} - {power}{_equals(rng)}{rest - power}")
            rest -= power
        return [*lines, f"{_lead(rng)}count the lines: {len(powers)}"], len(powers)
    lines, ones, rest = [], 0, number
    while rest:
        ones += rest & 1
        parity = "odd" if rest & 1 else "even"
        lines.append(f"{_lead(rng)}{rest} {parity} {ones}, half{_equals(rng)}{rest // 2}")
        rest //= 2
    return lines, ones


def gcd(metadata: Metadata, style: str, rng: Random) -> Worked:
    first, *others = metadata["numbers"]
    lines = []
    for other in others:
        larger, smaller = max(first, other), min(first, other)
        remainders = [larger, smaller]
        while remainders[-1]:
            dividend, divisor = remainders[-2:]
            remainder = dividend % divisor
            if style == "steps":
                lines.append(f"{_lead(rng)}{dividend} mod {divisor}{_equals(rng)}{remainder}")
            elif style == "careful":
                times = dividend // divisor
                product = f"{divisor} x {times}{_equals(rng)}{divisor * times}"
                lines.append(f"{_lead(rng)}{product}, {dividend} - {divisor * times}{_equals(rng)}{remainder}")
            remainders.append(remainder)
        first = remainders[-2]
        if style == "quick":
            lines.append(f"{_lead(rng)}{', '.join(map(str, remainders))}{_hunch(rng)}{first}")
        else:
            lines.append(f"{_lead(rng)}keep {first}")
    return lines, first


def letter_counting(metadata: Metadata, style: str, rng: Random) -> Worked:
    letter, span = metadata["target_letter"], metadata["span"]
    counts = [word.lower().count(letter) for word in span]
    total, lines = 0, []
    stride = 3 if style == "quick" else 1
    for start in range(0, len(span), stride):
        words, found = span[start : start + stride], sum(counts[start : start + stride])
        total += found
        if style == "quick":
            lines.append(f"{_lead(rng)}{' '.join(words)}{_hunch(rng)}{total}")
        else:
            shown = " ".join(words[0].lower()) if style == "careful" else words[0]
            lines.append(f"{_lead(rng)}{shown}: {found}, total{_equals(rng)}{total}")
    return lines, total


def leg_counting(metadata: Metadata, style: str, rng: Random) -> Worked:
    herd = [(name, count, count * ANIMALS[name]) for name, count in metadata["animals"].items()]
    total, lines = 0, []
    stride = 2 if style == "quick" else 1
    for start in range(0, len(herd), stride):
        group = herd[start : start + stride]
        names = ", ".join(f"{count} {name}" for name, count, _ in group)
        legs = sum(legs for *_, legs in group)
        if style == "careful":
            name, count, _ = group[0]
            work = f"{count} {name}: {count} x {ANIMALS[name]}{_equals(rng)}{legs}, {total} + {legs}{_equals(rng)}"
            lines.append(f"{_lead(rng)}{work}{total + legs}")
        else:
            joint = _hunch(rng) if style == "quick" else f": {legs}, total{_equals(rng)}"
            lines.append(f"{_lead(rng)}{names}{joint}{total + legs}")
        total += legs
    return lines, total


WRITERS: dict[str, Callable[[Metadata, str, Random], Worked]] = {
    "chain_sum": chain_sum,
    "count_bits": count_bits,
    "gcd": gcd,
    "letter_counting": letter_counting,
    "leg_counting": leg_counting,
}


def draw_style(large: bool, rng: Random) -> str:
    return rng.choices(STYLES, weights=LARGE_STYLE_WEIGHTS if large else STYLE_WEIGHTS)[0]
