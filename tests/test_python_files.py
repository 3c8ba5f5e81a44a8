"""Who imports whom: the rooms of the package, read from the source files without importing anything."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "ragcun_hf"
SHIPPED = tuple(sorted(f"model.{path.stem}" for path in (PACKAGE / "model").glob("*_isotropic_gaussian.py")))

# Every room may import itself and what stands before it, inside functions and for type checkers too. The package's
# own `__init__` hands names of all rooms out, so it stands last and no room imports it.
ROOMS = (
    ("errors", "distributed", "files", "commands", "command_line"),  # the ground
    ("data",),
    ("search",),
    ("model",),
    ("features",),
    ("evaluation",),
    ("publishing",),
    ("objective",),
    ("sweep",),
    ("trainer",),
    ("search_page",),
    ("cli",),
    ("ragcun_hf",),
)
FLOORS = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms}

FILES = sorted(PACKAGE.rglob("*.py"))


def _module(path):
    """Name a file as Python does, without the package in front: `data.pairs`; the package itself is `ragcun_hf`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__") or "ragcun_hf"


MODULES = {_module(path): path for path in FILES}


def _room(module):
    return module.split(".")[0]


def _imports(path, *, of_type_checkers=True):
    """Yield the full names that a file imports, relative ones resolved; `from a import b` gives `a.b`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    left_out = set()
    if not of_type_checkers:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
                left_out.update(id(inner) for statement in node.body for inner in ast.walk(statement))
    package = ["ragcun_hf", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(tree):
        if id(node) in left_out:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{start}.{alias.name}" for alias in node.names)


def _imported_modules(path, **options):
    """Return the modules of the package that a file imports."""
    found = set()
    for name in _imports(path, **options):
        if name.split(".")[0] != "ragcun_hf":
            continue
        inner = name.removeprefix("ragcun_hf").removeprefix(".")
        # The longest beginning that is a file: the rest is what is taken from it.
        parts = inner.split(".")
        starts = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
        found.add(next((start for start in starts if start in MODULES), "ragcun_hf"))
    return found


def test_the_walk_sees_imports_inside_functions_and_resolves_relative_ones():
    # Guards against an order that everything passes because nothing is seen.
    assert {"trainer.trainer", "objective.arguments", "sweep.run"} <= {
        found for module in ("cli.training", "cli.sweep") for found in _imported_modules(MODULES[module])
    }
    assert "evaluation.validation" in _imported_modules(MODULES["objective.inputs"])
    assert "model.modeling_isotropic_gaussian" in _imported_modules(MODULES["model.base_models"])
    assert "trainer.trainer" not in _imported_modules(MODULES["trainer.record"], of_type_checkers=False)


def test_every_room_has_its_place_and_few_files_lie_loose():
    assert {_room(module) for module in MODULES} == FLOORS.keys()
    assert len(list(PACKAGE.glob("*.py"))) <= 6


@pytest.mark.parametrize("module", MODULES)
def test_a_file_imports_only_what_stands_before_its_room(module):
    imported = _imported_modules(MODULES[module])
    wrong = {other for other in imported if FLOORS[_room(other)] > FLOORS[_room(module)]}
    assert not wrong, f"ragcun_hf/{module} may not import {wrong}"


@pytest.mark.slow
def test_there_is_no_import_cycle():
    graph = {
        module: _imported_modules(path, of_type_checkers=False) - {module, "ragcun_hf"}
        for module, path in MODULES.items()
        if module != "ragcun_hf"
    }
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the cycle


@pytest.mark.parametrize("module", SHIPPED)
def test_shipped_files_need_only_what_everybody_has_who_loads_a_model(module):
    others = {name.split(".")[0] for name in _imports(MODULES[module])} - {"ragcun_hf"}
    assert others - set(sys.stdlib_module_names) <= {
        "huggingface_hub",
        "numpy",
        "safetensors",
        "torch",
        "tqdm",
        "transformers",
    }


@pytest.mark.parametrize("module", SHIPPED)
def test_shipped_files_import_a_sibling_only_in_the_one_form_that_is_copied_with_it(module):
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    own = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    assert all(node.level == 1 and f"model.{node.module}" in SHIPPED for node in own)
    assert not any(name.startswith("ragcun_hf") for name in _absolute_imports(tree))


def _absolute_imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module


@pytest.mark.parametrize("module", MODULES)
def test_the_package_imports_no_script_and_no_test(module):
    outside = {path.stem for folder in ("training", "tests") for path in (ROOT / folder).rglob("*.py")}
    outside |= {"training", "tests"}
    assert not {name.split(".")[0] for name in _absolute_imports(ast.parse(MODULES[module].read_text()))} & outside


def test_importing_the_package_imports_nothing_heavy():
    script = (
        "import sys, ragcun_hf\n"
        "heavy = ('torch', 'transformers', 'datasets', 'accelerate', 'numpy', 'matplotlib')\n"
        "sys.exit(', '.join(name for name in heavy if name in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=1_800, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_public_name_can_be_imported():
    import ragcun_hf

    assert all(getattr(ragcun_hf, name).__name__ == name for name in ragcun_hf.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Nonesuch'"):
        _ = ragcun_hf.Nonesuch
