"""Arrows between the wings point downward, there are no circles, and light commands load no heavy library."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import stillframe

PACKAGE = Path(stillframe.__file__).parent
GROUND = 0
"""Files directly in the package that are not the face."""
WINGS = {
    "images": 1,
    "registration": 2,
    "storage": 3,
    "simulation": 4,
    "cluster": 4,
    "report": 4,
    "workflow": 5,
}
"""A module imports its own wing and those of lower numbers."""
FACE = {"lazy", "console", "demo", "cli", "__main__"}
FACE_LEVEL = 6
STORAGE_FOR_CLUSTER = {"durable", "checksums"}
THIRD_PARTY = {
    "images": {"numpy", "scipy", "numba"},
    "registration": {"numpy", "scipy", "numba"},
    "storage": {"numpy", "pydantic", "xarray", "zarr", "tifffile", "PIL"},
    "simulation": {"numpy", "scipy", "numba", "pydantic", "xarray", "zarr"},
    "cluster": {"dask", "dask_jobqueue", "distributed", "pydantic", "tornado"},
    "report": {"matplotlib", "numpy", "xarray"},
    "workflow": {"numpy", "psutil", "pydantic", "xarray"},
}
GROUND_THIRD_PARTY = {"numpy", "pydantic", "rich", "tomli_w"}
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if path.name != "__init__.py"
)


def tree_of(module):
    return ast.parse((PACKAGE / (module.replace(".", "/") + ".py")).read_text())


def imports_of(module):
    """Yield all modules that a module imports: within functions and under TYPE_CHECKING, too."""
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            submodules = [name for name in inner if name.removeprefix("stillframe.") in MODULES]
            yield from submodules or [node.module]


def own_imports(module):
    return {name.removeprefix("stillframe.") for name in imports_of(module) if name.startswith("stillframe.")}


def wing_of(module):
    return module.split(".")[0] if "." in module else ""


def level_of(module):
    return WINGS.get(wing_of(module), FACE_LEVEL if module in FACE else GROUND)


def test_every_folder_is_a_wing_with_a_place():
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == WINGS.keys()
    assert len(folders) <= 8
    assert len(list(PACKAGE.glob("*.py"))) <= 16


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_downward_only(module):
    for other in own_imports(module):
        same = wing_of(other) == wing_of(module)
        assert level_of(other) < level_of(module) or same, f"{module} imports {other}"
    if module == "lazy":
        assert not [other for other in own_imports(module) if wing_of(other) == "workflow"]
    if wing_of(module) == "cluster":
        deeper = {other for other in own_imports(module) if wing_of(other) not in ("", "cluster")}
        assert deeper <= {f"storage.{name}" for name in STORAGE_FOR_CLUSTER}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_uses_only_the_libraries_of_its_wing(module):
    if module in FACE:
        return
    allowed = THIRD_PARTY.get(wing_of(module), GROUND_THIRD_PARTY)
    used = {name.split(".")[0] for name in imports_of(module)} - {*sys.stdlib_module_names, "stillframe"}
    assert used <= allowed


def test_there_are_no_circles():
    below = {module: own_imports(module) for module in MODULES}
    while ends := {module for module, others in below.items() if not others & below.keys()}:
        below = {module: others for module, others in below.items() if module not in ends}
    assert below == {}


def loaded_by(statement):
    code = f"{statement}\nimport sys; print(*sorted(set(m.split('.')[0] for m in sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def importing(*levels):
    return "import " + ", ".join(f"stillframe.{module}" for module in MODULES if level_of(module) in levels)


@pytest.mark.parametrize(
    ("statement", "heavy"),
    [
        ("import stillframe", {"numpy", "scipy", "numba", "dask", "xarray", "zarr", "pydantic"}),
        ("from stillframe import Settings", {"scipy", "numba", "dask", "xarray", "zarr"}),
        (importing(1, 2), {"dask", "distributed", "xarray", "zarr"}),
        (importing(3), {"dask", "distributed"}),
        ("import stillframe.workflow.status", {"scipy", "numba", "dask", "xarray", "zarr"}),
    ],
)
def test_what_is_imported_loads_nothing_heavy(statement, heavy):
    assert not loaded_by(statement) & heavy


COMMAND = "import sys; from stillframe.cli import app\nsys.argv[1:] = {words}\ntry: app()\nexcept SystemExit: pass"


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["status", "nowhere"]])
def test_light_commands_load_nothing_heavy(words):
    assert not loaded_by(COMMAND.format(words=words)) & {"scipy", "numba", "dask", "xarray", "zarr"}


def test_every_public_name_is_there():
    for name in stillframe.__all__:
        assert getattr(stillframe, name) is not None
    assert "average" not in stillframe.__all__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        stillframe.nothing  # noqa: B018
