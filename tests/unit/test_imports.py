"""`after_import` patches a module in whatever form the script looks it up, and nobody else can tell."""

import importlib
import importlib.machinery
import importlib.metadata
import importlib.resources
import importlib.util
import inspect
import pkgutil
import runpy
import sys
import textwrap
import threading
import traceback
import warnings
from importlib import _bootstrap, _bootstrap_external

import pytest

from ddpcall.imports import after_import

BOOTSTRAP = vars(_bootstrap)
LOADER = vars(_bootstrap_external)["_LoaderBasics"]


@pytest.fixture
def library(tmp_path, monkeypatch):
    """Writes modules that can be imported, and forgets them afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def write(**modules):
        for name, source in modules.items():
            path = tmp_path / (name.replace("__in__", "/") + ".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(source))
        importlib.invalidate_caches()
        return tmp_path

    yield write
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.fixture
def fake(library):
    """A package made as torch is: it imports its submodules, and one of those looks at it unfinished."""
    return library(
        faketorch__in____init__="""
            from faketorch import nn
            from faketorch.nn import Linear
            done = True
            """,
        faketorch__in__nn="import sys\nwas_done = hasattr(sys.modules['faketorch'], 'done')\nclass Linear: ...\n",
        faketorch__in__utils="",
    )


@pytest.fixture
def patched():
    """Watches `faketorch`; lists what was seen of it when it was patched."""
    seen: list[bool] = []

    def patch(module):
        seen.append(hasattr(module, "done"))
        module.patched = True
        return lambda: vars(module).pop("patched", None)

    undo = after_import("faketorch", patch)
    yield seen
    undo()


# ---- looked up before it is imported ----------------------------------------------------------------------------

LOOKED_UP = {
    "find_spec": "import importlib.util as util\nutil.find_spec('faketorch')\n",
    "find_spec twice": "from importlib.util import find_spec\nfind_spec('faketorch') and find_spec('faketorch')\n",
    "iter_modules": "import pkgutil\nlist(pkgutil.iter_modules())\n",
    "path finder": "import importlib.machinery as m\nm.PathFinder.find_spec('faketorch')\n",
    "every finder": "import sys\nfor f in sys.meta_path:\n    f.find_spec('faketorch', None)\n",
    "metadata": """
        from importlib import metadata
        try:
            metadata.version('faketorch')
        except metadata.PackageNotFoundError:
            pass
        """,
    "module made and thrown away": "import importlib.util as u\nu.module_from_spec(u.find_spec('faketorch'))\n",
    "code read": "import importlib.util as u\nu.find_spec('faketorch').loader.get_code('faketorch')\n",
    "absent optional": "try:\n    import faketorch_extension\nexcept ImportError:\n    pass\n",
}


@pytest.mark.parametrize("source", LOOKED_UP.values(), ids=LOOKED_UP)
def test_a_module_that_was_only_looked_up_is_patched_when_it_is_imported(fake, library, patched, source):
    library(lookup=source)
    importlib.import_module("lookup")
    assert patched == []
    module = importlib.import_module("faketorch")
    assert patched == [True]
    assert module.patched


def test_to_look_a_submodule_up_imports_its_package_and_patches_it(fake, patched):
    assert importlib.util.find_spec("faketorch.utils") is not None
    assert patched == [True]


IMPORTED = {
    "import": "import faketorch",
    "from": "from faketorch.nn import Linear",
    "submodule": "import faketorch.utils",
    "import_module": "import importlib\nimportlib.import_module('faketorch')",
    "__import__": "__import__('faketorch')",
    "try": "try:\n    import faketorch\nexcept ImportError:\n    pass",
    "in a function": "def load():\n    import faketorch\nload()",
    "exec": "exec('import faketorch')",
    "star": "from faketorch import *",
    "importlib's own __import__": "import importlib\nimportlib.__import__('faketorch')",
    "lazy attribute": """
        import importlib, sys, types
        class Lazy(types.ModuleType):
            def __getattr__(self, name):
                return getattr(importlib.import_module('faketorch'), name)
        lazy = sys.modules['lazy'] = Lazy('lazy')
        from lazy import nn
        """,
    "lazy loader": """
        import importlib.util, sys
        spec = importlib.util.find_spec('faketorch')
        spec.loader = loader = importlib.util.LazyLoader(spec.loader)
        module = sys.modules['faketorch'] = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
        import json.tool
        assert type(module).__name__ == '_LazyModule'
        module.nn
        """,
    "by hand": """
        import importlib.util, sys
        spec = importlib.util.find_spec('faketorch')
        sys.modules['faketorch'] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        """,
    "a second copy first": """
        import importlib.util
        from importlib.machinery import SourceFileLoader
        file = importlib.util.find_spec('faketorch').origin
        spec = importlib.util.spec_from_file_location('other_name', file)
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
        """,
    "a thread": """
        import threading
        thread = threading.Thread(target=__import__, args=('faketorch',))
        thread.start()
        thread.join()
        """,
    "a finder that finds it itself": """
        import importlib.machinery, sys
        class Finder:
            @classmethod
            def find_spec(cls, name, path=None, target=None):
                return importlib.machinery.PathFinder.find_spec(name, path, target)
        sys.meta_path.insert(0, Finder)
        try:
            import faketorch
        finally:
            sys.meta_path.remove(Finder)
        """,
    "a loader that only executes": """
        import importlib.machinery, importlib.util, sys
        class Loader:
            def __init__(self, loader):
                self.inner = loader
            def create_module(self, spec):
                return None
            def exec_module(self, module):
                exec(self.inner.get_code(module.__name__), vars(module))
        class Finder:
            @classmethod
            def find_spec(cls, name, path=None, target=None):
                spec = importlib.machinery.PathFinder.find_spec(name, path, target)
                if spec is not None:
                    spec.loader = Loader(spec.loader)
                return spec
        sys.meta_path.insert(0, Finder)
        try:
            import faketorch
        finally:
            sys.meta_path.remove(Finder)
        """,
    "a loader without exec_module": """
        import importlib.machinery, importlib.util, sys, types, warnings
        class Loader:
            def __init__(self, inner):
                self.inner = inner
            def load_module(self, name):
                module = sys.modules[name] = types.ModuleType(name)
                module.__path__ = [self.inner.path.rpartition('/')[0]]
                module.__loader__ = self
                exec(self.inner.get_code(name), vars(module))
                return module
        class Finder:
            @classmethod
            def find_spec(cls, name, path=None, target=None):
                spec = importlib.machinery.PathFinder.find_spec(name, path, target)
                if spec is not None and name == 'faketorch':
                    spec.loader = Loader(spec.loader)
                return spec
        sys.meta_path.insert(0, Finder)
        warnings.simplefilter('ignore')
        try:
            import faketorch
        finally:
            sys.meta_path.remove(Finder)
        """,
    "a loader that stands around Python's": """
        import importlib.machinery, sys
        class Loader(importlib.machinery.SourceFileLoader):
            def exec_module(self, module):
                super().exec_module(module)
                module.hooked = True
        finder = importlib.machinery.FileFinder.path_hook((Loader, ['.py']))
        sys.path_hooks.insert(0, finder)
        sys.path_importer_cache.clear()
        try:
            import faketorch
        finally:
            sys.path_hooks.remove(finder)
            sys.path_importer_cache.clear()
        assert faketorch.hooked
        """,
}


@pytest.mark.parametrize("source", IMPORTED.values(), ids=IMPORTED)
def test_a_module_is_patched_once_when_its_code_has_run(fake, library, patched, source):
    library(user=source)
    importlib.import_module("user")
    importlib.import_module("faketorch.utils")
    assert patched == [True]


def test_runpy_imports_as_import_does(fake, library, patched):
    directory = library(script="import faketorch\nassert faketorch.patched\n")
    runpy.run_path(str(directory / "script.py"), run_name="__main__")
    runpy.run_module("script")
    assert patched == [True]


# ---- when ------------------------------------------------------------------------------------------------------


def test_a_module_that_is_there_is_patched_at_once(fake):
    importlib.import_module("faketorch")
    seen = []
    after_import("faketorch", lambda module: seen.append(module.done) or (lambda: None))()
    assert seen == [True]


OUTER = {
    "import": "import outer",
    "by hand": """
        import importlib.util, sys
        spec = importlib.util.find_spec('outer')
        sys.modules['outer'] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        """,
}


@pytest.mark.parametrize("source", OUTER.values(), ids=OUTER)
def test_a_module_that_is_being_executed_is_patched_when_it_is_done(fake, library, source):
    """As `accelerate.accelerator`, which imports torch at its head: the watch attaches there."""
    library(outer="import faketorch\nimport json.tool\nclass Accelerator: ...\n", user=source)
    seen, undos = [], []

    def patch_outer(module):
        seen.append(hasattr(module, "Accelerator"))
        return lambda: None

    def patch(_):
        undos.append(after_import("outer", patch_outer))
        assert seen == []
        return undos[0]

    undo = after_import("faketorch", patch)
    try:
        importlib.import_module("user")
    finally:
        undo()
    assert seen == [True]


def test_a_module_that_fails_is_patched_when_it_is_imported_again(library, patched):
    library(faketorch="raise ImportError('half-way')")
    for _ in range(2):
        with pytest.raises(ImportError, match="half-way"):
            importlib.import_module("faketorch")
    assert patched == []
    library(faketorch="done = 'at the second attempt'")
    assert importlib.import_module("faketorch").patched
    assert patched == [True]


def test_a_module_is_patched_again_when_it_is_reloaded_or_imported_anew(fake, patched):
    module = importlib.import_module("faketorch")
    delattr(module, "patched")
    assert importlib.reload(module).patched
    del sys.modules["faketorch"]
    assert importlib.import_module("faketorch").patched
    assert patched == [True, True, True]


def test_another_thread_that_imports_meanwhile_waits_for_the_patch(fake):
    """Else it might wrap its model before the watch is there."""
    starting, seen = threading.Event(), []

    def import_second():
        starting.set()
        seen.append(hasattr(importlib.import_module("faketorch"), "patched"))

    second = threading.Thread(target=import_second)

    def patch(module):
        second.start()
        starting.wait(10)
        second.join(0.05)  # if it did not wait, it would be done by now
        module.patched = True
        return lambda: None

    undo = after_import("faketorch", patch)
    importlib.import_module("faketorch")
    second.join(10)
    undo()
    assert seen == [True]


def test_only_the_named_module_is_patched(fake):
    seen = []
    undo = after_import("faketorch.nn", lambda module: seen.append(module.__name__) or (lambda: None))
    importlib.import_module("faketorch")
    undo()
    assert seen == ["faketorch.nn"]


# ---- unseen -----------------------------------------------------------------------------------------------------


def looks_of(module):
    spec = module.__spec__
    return {
        "spec": (type(spec), spec.name, spec.origin, sorted(vars(spec))),
        "loader": (type(spec.loader), sorted(vars(spec.loader)), module.__loader__ is spec.loader),
        "source": inspect.getsource(module),
        "get_source": spec.loader.get_source(module.__name__),
        "is_package": spec.loader.is_package(module.__name__),
        "data": pkgutil.get_data(module.__name__, "data.txt"),
        "resource": importlib.resources.files(module).joinpath("data.txt").read_text(),
        "reader": spec.loader.get_resource_reader(module.__name__) is not None,
        "attributes": sorted(set(vars(module)) - {"patched"}),
    }


def test_specs_and_loaders_look_as_without_us(fake):
    (fake / "faketorch" / "data.txt").write_text("some data")
    bare = looks_of(importlib.import_module("faketorch"))
    for name in [name for name in sys.modules if name.startswith("faketorch")]:
        del sys.modules[name]
    finders = list(sys.meta_path)
    undo = after_import("faketorch", lambda module: setattr(module, "patched", True) or (lambda: None))
    try:
        asked = importlib.util.find_spec("faketorch")
        assert asked is not None
        assert type(asked.loader) is importlib.machinery.SourceFileLoader
        module = importlib.import_module("faketorch")
        assert module.patched
        assert looks_of(module) == bare
        assert sys.meta_path == finders
    finally:
        undo()


def tracebacks_and_warnings():
    said = []
    for name in ("broken", "needs_absent"):
        try:
            exec(f"import {name}")
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            said.append([(frame.filename, frame.lineno, frame.name) for frame in frames[1:]])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exec(compile("\n\nimport deprecated", "user.py", "exec"), {})
    return said, [(warning.filename, warning.lineno) for warning in caught]


def test_tracebacks_and_warnings_of_imports_are_as_without_us(library):
    library(
        broken="import json\n1 / 0\n",
        needs_absent="import json\nimport absent_altogether\n",
        deprecated="import warnings\nwarnings.warn('use another', DeprecationWarning, stacklevel=2)\n",
    )
    bare = tracebacks_and_warnings()
    del sys.modules["deprecated"]
    undo = after_import("faketorch", lambda module: lambda: None)
    try:
        assert tracebacks_and_warnings() == bare
    finally:
        undo()
    assert bare[1] == [("user.py", 3)]


def test_the_undo_takes_everything_off(fake):
    before = BOOTSTRAP["_find_and_load"], LOADER.exec_module
    undo = after_import("faketorch", lambda module: setattr(module, "on", 1) or (lambda: delattr(module, "on")))
    waits = after_import("never_imported", lambda module: lambda: None)
    module = importlib.import_module("faketorch")
    assert module.on
    undo()
    undo()
    waits()
    assert not hasattr(module, "on")
    assert (BOOTSTRAP["_find_and_load"], LOADER.exec_module) == before
    del sys.modules["faketorch"]
    assert not hasattr(importlib.import_module("faketorch"), "on")
