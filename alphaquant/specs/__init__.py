"""What is asked for: every option once, as a typed field of a small frozen dataclass.

A field has its unit and meaning in the text below it, its range in its annotation and its default
in its value. Command lines, `alphaquant.search(...)` and TOML files are made from that
(`alphaquant.specs.flat`, `alphaquant.cli.application`), so that there is one set of names. Nothing
here imports torch or optuna: `--help` reads these classes.
"""
