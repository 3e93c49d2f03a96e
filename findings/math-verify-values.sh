#!/usr/bin/env bash
# math-verify 0.9.0: words and bases that change a value are dropped, small differences vanish, and a box inside the
# thoughts is the answer.
#
# A gold answer and a completion, each parsed with the defaults, then verify(gold, answer).
# One would expect: 5 dozen is not 5; a numeral in base 2 is not the same digits in base 3; 1/2^99 is not 1/2^98; the
# answer that follows "</think>" is read, not the one that the thoughts gave up.
# Seen:
#   5\text{ dozen} equals 5, 5\text{ hundredths} equals 5
#   1010_2 equals 1010_3: the base is not read
#   1/2^{99} equals 1/2^{98}: numbers are compared after rounding to six decimals
#   0.3333333 equals 1/3, but 0.333 does not
#   "<think>\boxed{4}</think> The answer is 5." has the answer 4
#   "\boxed{4} ... \boxed{5}" has the answer {4, 5}, so that it is wrong for 4 and for 5
#
# Why it matters: as a reward it pays for wrong answers and for thoughts. dphrl's grader compares exactly, knows which
# words are units, cuts thoughts first and reads the last box.
#
# Needs Python 3.11 and a package index; a minute.
# Exit status 0: the behaviour is still as described.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    math-verify==0.9.0 latex2sympy2_extended==1.11.0 sympy==1.14.0
cat >"$work/program.py" <<'PY'
import sys

from math_verify import parse, verify

PAIRS = [
    (r"5\text{ dozen}", "5", True),
    (r"5\text{ hundredths}", "5", True),
    ("1010_2", "1010_3", True),
    ("1/2^{99}", "1/2^{98}", True),
    ("0.3333333", r"\frac{1}{3}", True),
    ("0.333", r"\frac{1}{3}", False),
]
TEXTS = [
    (r"<think>\boxed{4}</think> The answer is 5.", [("4", True), ("5", False)]),
    (r"So \boxed{4}. No, wait: \boxed{5}", [("4", False), ("5", False)]),
]
as_described = True


def show(answer, gold, wanted):
    global as_described
    equal = verify(parse(rf"$\boxed{{{gold}}}$"), parse(answer))
    as_described &= equal is wanted
    print(f"{answer:52} {'equals' if equal else 'is not':7} {gold}")


for answer, gold, wanted in PAIRS:
    show(rf"$\boxed{{{answer}}}$", gold, wanted)
for text, golds in TEXTS:
    for gold, wanted in golds:
        show(text, gold, wanted)
print("as described" if as_described else "the behaviour has changed")
sys.exit(0 if as_described else 1)
PY
"$work/venv/bin/python" "$work/program.py"
# Output seen:
#   $\boxed{5\text{ dozen}}$                             equals  5
#   $\boxed{5\text{ hundredths}}$                        equals  5
#   $\boxed{1010_2}$                                     equals  1010_3
#   $\boxed{1/2^{99}}$                                   equals  1/2^{98}
#   $\boxed{0.3333333}$                                  equals  \frac{1}{3}
#   $\boxed{0.333}$                                      is not  \frac{1}{3}
#   <think>\boxed{4}</think> The answer is 5.            equals  4
#   <think>\boxed{4}</think> The answer is 5.            is not  5
#   So \boxed{4}. No, wait: \boxed{5}                    is not  4
#   So \boxed{4}. No, wait: \boxed{5}                    is not  5
#   as described
