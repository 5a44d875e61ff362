"""METHOD.md names every constant of the numeric wings with its value, and every equation that the code cites."""

import ast
import importlib
import re
from pathlib import Path

import stillframe

PACKAGE = Path(stillframe.__file__).parent
METHOD = (PACKAGE / "registration" / "METHOD.md").read_text()
MODULES = sorted([*PACKAGE.glob("images/*.py"), *PACKAGE.glob("registration/*.py")])
EQUATIONS = re.findall(r"^\((\d+)\) [† ]", METHOD, re.MULTILINE)


def numbers(value):
    """Whether a module's constant is a number or a tuple of numbers."""
    values = value if isinstance(value, tuple) and value else (value,)
    return all(isinstance(one, (int, float)) and not isinstance(one, bool) for one in values)


def constants():
    """Every constant number of the numeric wings, by module and name."""
    found = {}
    for path in MODULES:
        module = importlib.import_module(f"stillframe.{path.parent.name}.{path.stem}")
        statements = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Assign)]
        names = [name.id for node in statements for name in ast.walk(node.targets[0]) if isinstance(name, ast.Name)]
        found |= {(path.stem, name): getattr(module, name) for name in names if numbers(getattr(module, name))}
    return found


def test_every_constant_is_in_the_table_with_its_value():
    rows = re.findall(r"^\| `(\w+)\.(\w+)` \| ([^|]+) \|", METHOD, re.MULTILINE)
    assert len(rows) == len({row[:2] for row in rows})
    assert {(module, name): ast.literal_eval(value.strip()) for module, name, value in rows} == constants()


def test_the_table_would_miss_a_constant():
    assert len(constants()) > 60
    assert constants()["refine", "_OUTLIER"] == 3.5


def test_equations_are_numbered_without_a_gap():
    """In the order in which they came, so that what cites them stays right."""
    assert sorted(int(number) for number in EQUATIONS) == list(range(1, len(EQUATIONS) + 1))


def test_code_cites_equations_that_are_there():
    cited = {path.name: set(re.findall(r" \((\d{1,2})\)[\s,.:;]", path.read_text())) for path in MODULES}
    assert not {name for name, numbered in cited.items() if not numbered <= set(EQUATIONS)}
