"""The names that users may rely on, and what importing them costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import louver
from louver.errors import MissingExtraError

PUBLIC = """
    MEASURES PATROL AddedNoise Attributes Audit Classification Cost Cut Decoder Defense Finding Hybrid Images
    Likelihood LouverError MeanImage NoDefense NoPeek Origin Panel PrivyNet ReIdentification Roles Row Settings
    Shadow SiftFunnel Split Threat Training Verdict assign_roles contact_sheet cuts drop_overlap fit harden judge
    load_audit load_images load_model load_split measure_latency mse panels parse_rule psnr read_experiment
    run_audit run_experiment save_split save_weights split ssim streets write_report
"""

BLOCKED = """
import importlib.abc, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] in {"torch", "torchvision", "timm", "jaxtyping", "pydantic", "safetensors"}:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)

sys.meta_path.insert(0, Blocked())
"""


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def declared_for_type_checkers() -> dict[str, tuple[str, str]]:
    """Name -> (module, its name there), as the imports under TYPE_CHECKING say."""
    tree = ast.parse(Path(louver.__file__).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.asname or alias.name: (node.module, alias.name) for node in imports for alias in node.names}


def test_the_list_is_pinned_and_sorted():
    assert louver.__all__ == PUBLIC.split()
    capitals = [name for name in louver.__all__ if name.isupper()]
    types = [name for name in louver.__all__ if name[0].isupper() and not name.isupper()]
    functions = [name for name in louver.__all__ if name[0].islower()]
    assert louver.__all__ == [*sorted(capitals), *sorted(types), *sorted(functions)]


def test_type_checkers_see_what_is_loaded():
    declared = declared_for_type_checkers()
    assert sorted(declared) == sorted(louver.__all__)
    for name, (module, attribute) in declared.items():
        assert getattr(louver, name) is getattr(sys.modules[module], attribute), name


def test_every_name_says_what_it_is():
    silent = [name for name in louver.__all__ if name != "MEASURES" and not getattr(louver, name).__doc__]
    assert not silent


def test_a_module_of_the_same_name_is_never_hidden():
    # `louver.audit` stays the module, in whichever order things are loaded.
    python(
        "import louver; run = louver.run_audit; import louver.audit; "
        "assert louver.audit.audit is run and callable(run); from louver.audit import Settings; "
        "assert louver.Settings is Settings"
    )


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'perceptual'"):
        _ = louver.perceptual
    assert not hasattr(louver, "__wrapped__")
    assert set(louver.__all__) <= set(dir(louver))


def test_version_is_that_of_the_distribution():
    from importlib.metadata import version

    assert louver.__version__ == version("louver")


def test_importing_is_cheap():
    code = (
        "import sys, time; before = set(sys.modules); start = time.process_time(); import louver; "
        "print(time.process_time() - start); "
        "print(*sorted({m.partition('.')[0] for m in set(sys.modules) - before}))"
    )
    # Processor time, the least of three: a busy machine is no fault of the package.
    runs = [python(code).splitlines() for _ in range(3)]
    assert min(float(seconds) for seconds, _ in runs) < 0.3
    assert not {"torch", "numpy", "PIL", "pyarrow"} & set(runs[0][1].split())


def test_works_without_the_lab():
    python(
        BLOCKED
        + "import louver\n"
        + "assert louver.Cut and louver.Threat().grants and louver.LouverError and louver.__version__\n"
        + "assert louver.streets(5, seed=0).image_shape == (3, 64, 64)\n"
        + "assert 'torch' not in sys.modules"
    )


@pytest.mark.parametrize("name", ["cuts", "ssim", "load_model", "run_audit", "Decoder", "read_experiment"])
def test_a_name_whose_extra_is_missing_says_which(name):
    said = python(
        BLOCKED
        + "import louver\nfrom louver.errors import MissingExtraError\n"
        + f"try:\n    louver.{name}\nexcept MissingExtraError as error:\n    print(error)"
    )
    assert said.startswith(f"louver.{name} needs ")
    assert "pip install 'louver[lab]'" in said
    assert issubclass(MissingExtraError, ImportError)
