"""`aq-eval`: scores of a model or packed checkpoint."""

import json
from typing import Annotated

from cyclopts import Parameter

from alphaquant.cli.application import AsJson, Command, main_of
from alphaquant.cli.console import Bars, quiet_libraries
from alphaquant.cli.screen import say, screen_width
from alphaquant.specs.evaluate import EvaluateSpec


def command(
    *, spec: Annotated[EvaluateSpec, Parameter(name="*")], as_json: AsJson = False
) -> None:
    """Measure a model: divergence, perplexity, routing, tasks of lm-eval, with standard errors.

    Args:
        spec: What to measure.
        as_json: Print JSON with provenance instead of a table.
    """
    from alphaquant.commands.evaluate import evaluate
    from alphaquant.commands.evaluate_text import evaluation_json, evaluation_text

    quiet_libraries()
    with Bars() as bars:
        found = evaluate(spec, progress=bars)
    if as_json:
        print(json.dumps(evaluation_json(found), indent=1))
    else:
        say(evaluation_text(found, screen_width()))


EVALUATE = Command("aq-eval", command)
main = main_of(EVALUATE)
