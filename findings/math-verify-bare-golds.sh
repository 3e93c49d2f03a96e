#!/usr/bin/env bash
# math-verify 0.9.0: a gold answer without dollar signs, as MATH and most data sets hold it, becomes another number or
# nothing, without an error.
#
# parse(gold) of the answer field as it is, then verify against a completion with exactly this answer in a box.
# One would expect: the answer is right, or parse says that it cannot read the gold.
# Seen:
#   3\sqrt{13} is read as 3: the answer 3\sqrt{13} is wrong, and the answer 3 is right
#   6 - 5i is read as 5, 288 \pi as 288, 2k+2 as 2, a column vector as its last entry
#   x^3+3x-6, (6,31,-1), \sqrt{51} and \text{Evelyn} are read as nothing, so that every answer is wrong
#   \frac{1}{2} and 70 are read as they should be, which is why the mistake shows late; with $..$ around them all are
#
# Why it matters: prompts with such golds train towards wrong answers, or never get a reward, and nobody is told. dphrl
# grades every gold against itself before a run starts (docs/data-and-rewards.md, "Golds and duplicates").
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

# The gold of a problem, and a wrong answer to it; None where the gold is read as it should be.
GOLDS = [
    (r"3\sqrt{13}", "3"),
    ("6 - 5i", "5"),
    (r"288 \pi", "288"),
    ("2k+2", "2"),
    (r"\begin{pmatrix} -2 \\ -14 \\ -7 \end{pmatrix}", "-7"),
    ("x^3+3x-6", ""),
    ("(6,31,-1)", ""),
    (r"\sqrt{51}", ""),
    (r"\text{Evelyn}", ""),
    (r"\frac{1}{2}", None),
    ("70", None),
]


def is_right(answer, gold):
    return verify(parse(gold), parse(rf"The answer is $\boxed{{{answer}}}$."))


as_described = True
print(f"{'gold':47} itself  wrong answer  itself, with $..$")
for gold, wrong in GOLDS:
    itself, other, with_dollars = is_right(gold, gold), bool(wrong) and is_right(wrong, gold), is_right(gold, f"${gold}$")
    as_described &= (itself, other, with_dollars) == (wrong is None, bool(wrong), True)
    said = ["right" if right else "wrong" for right in (itself, other, with_dollars)]
    shown = f"{wrong}: {said[1]}" if wrong else "-"
    print(f"{gold:47} {said[0]:7} {shown:13} {said[2]}")
print("as described" if as_described else "the behaviour has changed")
sys.exit(0 if as_described else 1)
PY
"$work/venv/bin/python" "$work/program.py"
# Output seen:
#   gold                                            itself  wrong answer  itself, with $..$
#   3\sqrt{13}                                      wrong   3: right      right
#   6 - 5i                                          wrong   5: right      right
#   288 \pi                                         wrong   288: right    right
#   2k+2                                            wrong   2: right      right
#   \begin{pmatrix} -2 \\ -14 \\ -7 \end{pmatrix}   wrong   -7: right     right
#   x^3+3x-6                                        wrong   -             right
#   (6,31,-1)                                       wrong   -             right
#   \sqrt{51}                                       wrong   -             right
#   \text{Evelyn}                                   wrong   -             right
#   \frac{1}{2}                                     right   -             right
#   70                                              right   -             right
#   as described
