#!/usr/bin/env bash
# Guess: numba's on-disk cache (cache=True) is only a cache. After an upgrade that moves a class, the source file has another
# time stamp, so what was cached is compiled again.
#
# Seen with numba 0.68.1: a compiled function that takes a NamedTuple cannot be called any more once the module that defined the
# class is gone, although its own source changed too: ModuleNotFoundError. The index file holds time stamp and signatures in one
# pickle, and signatures name the class, so the stamp is never looked at. Whoever ships compiled loops and renames a module breaks
# installations that have run them. The same version works after the cache files are deleted.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q "numba==0.68.1" "numpy==2.4.6" 2>/dev/null
cd "$work"
cat >old_rules.py <<'PY'
from typing import NamedTuple


class Rule(NamedTuple):
    low: float
    high: float
PY
cat >loops.py <<'PY'
from numba import njit

from old_rules import Rule


@njit(cache=True)
def width(rule):
    return rule.high - rule.low
PY
echo 'import loops; print("width", loops.width(loops.Rule(1.0, 3.0)))' >run.py
first=$("$work/venv/bin/python" run.py)
[ "$first" = "width 2.0" ] || { echo "unexpected: $first"; exit 1; }
mv old_rules.py new_rules.py
sed -i 's/old_rules/new_rules/' loops.py
touch -d '+1 minute' loops.py
if "$work/venv/bin/python" run.py >after.txt 2>error.txt; then
    echo "changed: numba compiled again ($(cat after.txt))"
    exit 1
fi
tail -n 1 error.txt
grep -q "ModuleNotFoundError: No module named 'old_rules'" error.txt
rm -f __pycache__/loops*.nb*
[ "$("$work/venv/bin/python" run.py)" = "width 2.0" ]
echo "as stated: the index of the cache is unpickled before its time stamp is compared"
