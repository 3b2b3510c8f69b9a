"""How many kernels a layer of routed experts launches in a configuration.

    python benchmarks/launches.py free/best.json four/best.json

One plans, one adds up; each format of down is one. Gate and up share a launch per format where
they agree in every expert of the layer; else each format of gate and each of up is one, and one
gates. Splitting columns, which few tokens cause, has the gating one too. Prints a table.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

from alphaquant.models.loading import load_skeleton
from alphaquant.models.mapping import map_model
from alphaquant.reports.tables import markdown
from alphaquant.spaces.config import load_config, resolve
from alphaquant.spaces.profiles import DOWN, GATE, UP
from alphaquant.spaces.units import Inventory
from alphaquant.studies.inputs import model_location


def launches_of(formats: Mapping[str, str], inventory: Inventory) -> list[int]:
    """Launches of every layer with routed experts, in their order.

    Args:
        formats: of every matrix, by name.
        inventory: of the model.
    """
    layers: dict[int, dict[tuple[str, ...], dict[int, str]]] = {}
    for matrix in inventory.matrices:
        if matrix.expert is not None:
            role = next(names for names in (GATE, UP, DOWN) if matrix.projection in names)
            of_role = layers.setdefault(matrix.layer, {}).setdefault(role, {})
            of_role[matrix.expert] = formats[matrix.name]
    found = []
    for roles in layers.values():
        gate, up, down = (roles[role] for role in (GATE, UP, DOWN))
        n_down = len(set(down.values()))
        n_gate_up = len(set(gate.values()))
        if gate != up:
            n_gate_up += len(set(up.values())) + 1
        found.append(n_gate_up + n_down + 2)
    return found


def main() -> None:
    """Print the launches of each configuration."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("configs", nargs="+", type=Path)
    args = parser.parse_args()
    inventory = map_model(load_skeleton(model_location(args.model))).inventory
    rows = []
    for path in args.configs:
        resolved = resolve(load_config(path), inventory, strict=True)
        launches = launches_of(resolved.assignment.formats, inventory)
        rows.append([str(path), ", ".join(map(str, launches)), str(max(launches))])
    print(markdown(["configuration", "launches by layer", "most"], rows))


if __name__ == "__main__":
    main()
