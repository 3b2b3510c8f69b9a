"""Names of the ways to choose scales.

Beside the options and not among them, because arithmetic has these names too, and runs where the
package that reads options is not installed (the plug-in for vLLM).
"""

from typing import Literal

ScaleSearch = Literal["minmax", "mse", "hessian"]
"""What `alphaquant.quant.codecs` does to find the scales of a group."""
