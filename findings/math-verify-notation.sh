#!/usr/bin/env bash
# math-verify 0.9.0: what stands behind the first character that it does not know is dropped, and the part before is the
# answer.
#
# A gold answer and an answer, each in dollar signs and parsed with the defaults, then verify(gold, answer).
# One would expect: an answer that cannot be read as a whole has no value; raised digits, fractions in one character and
# repeating decimals have theirs; a residue belongs to its modulus, and values to their names.
# Seen:
#   2¹⁰ and 2½ equal 2, 5⁻¹ equals 5, 1±√2 equals 1; 2¹⁰ is not 1024, and 2½ is not 2.5
#   10_000 equals 10
#   0.\overline{12} equals 0.\overline{21}: both are 0
#   \phantom{5} equals 5, though nothing is seen of it
#   x\equiv 5\pmod{7} equals y\equiv 5\pmod{8}, and both equal 5
#   (x,y)=(1,2) equals x=2,y=1
#
# Why it matters: models write Unicode, and as a reward this pays for the wrong number and not for the right one. dphrl's
# grader writes such characters as TeX first; what its grammar cannot read to the end is no answer.
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
    ("2¹⁰", "2", True),
    ("2¹⁰", "1024", False),
    ("2½", "2", True),
    ("2½", "2.5", False),
    ("5⁻¹", "5", True),
    ("1±√2", "1", True),
    ("10_000", "10", True),
    (r"0.\overline{12}", r"0.\overline{21}", True),
    (r"0.\overline{12}", "0", True),
    (r"\phantom{5}", "5", True),
    (r"x\equiv 5\pmod{7}", r"y\equiv 5\pmod{8}", True),
    (r"x\equiv 5\pmod{7}", "5", True),
    ("(x,y)=(1,2)", "x=2,y=1", True),
]
as_described = True
for answer, gold, wanted in PAIRS:
    equal = verify(parse(f"${gold}$"), parse(f"${answer}$"))
    as_described &= equal is wanted
    print(f"{answer:18} {'equals' if equal else 'is not':7} {gold}")
print("as described" if as_described else "the behaviour has changed")
sys.exit(0 if as_described else 1)
PY
"$work/venv/bin/python" "$work/program.py"
# Output seen:
#   2¹⁰                equals  2
#   2¹⁰                is not  1024
#   2½                 equals  2
#   2½                 is not  2.5
#   5⁻¹                equals  5
#   1±√2               equals  1
#   10_000             equals  10
#   0.\overline{12}    equals  0.\overline{21}
#   0.\overline{12}    equals  0
#   \phantom{5}        equals  5
#   x\equiv 5\pmod{7}  equals  y\equiv 5\pmod{8}
#   x\equiv 5\pmod{7}  equals  5
#   (x,y)=(1,2)        equals  x=2,y=1
#   as described
