"""Hosts are data that integrations bring; the core knows none by name."""

import ast
import os
import re
from pathlib import Path

import pytest

import arctic_plugins
from arctic_plugins import Claim, Finding, LinearSpec, diagnosis
from arctic_plugins.claims import arbitrate
from arctic_plugins.errors import CheckpointError, ClaimError, HostVersionError, PluginError, PluginNotFoundError
from arctic_plugins.files import check_keys
from arctic_plugins.host import GROUP, Host, host_failures, hosts, service
from arctic_plugins.provenance import read_provenance, write_provenance
from arctic_plugins.registry import load
from arctic_plugins.resolver import check_hosts, host_range, host_version
from arctic_plugins.testing import run_python

ROOT = Path(__file__).parents[2]
CORE = [*Path(arctic_plugins.__file__).parent.glob("*.py"), *Path(arctic_plugins.__file__).parent.glob("cli/*.py")]

THIRD = """
from arctic_plugins.host import Host
plugin = Host(
    name="third",
    distributions=("third-cpu", "pytest"),
    integration="third-dist",
    register="third_plugin:register",
    recorded=("pytest",),
    fused_siblings={"Third": (("in_proj", "out_proj"),)},
    refused_keys=frozenset({"other_model"}),
    hub_code_keys=frozenset({"kernel"}),
    services={"answer": "third_plugin:answer", "gone": "third_plugin:nothing"},
)
def register():
    import string
    from arctic_plugins.patches import patch
    patch(string, "capwords", why="to see", read_in="string 3")(lambda original, text: original(text))
def answer(): return 42
"""


@pytest.fixture
def third(install_plugin):
    return install_plugin("third", THIRD, group=GROUP)


def strings(path):
    """Strings of a module that are no docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    said = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in said:
            yield node.value
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.name)
def test_the_core_names_no_host(path):
    hooks = "vllm_engine_args|vllm_check"
    assert [text for text in strings(path) if re.search("(?i)transformers|vllm|hugging", re.sub(hooks, "", text))] == []


@pytest.mark.parametrize(
    ("one", "other"), [("huggingface", "arctic_plugins_vllm"), ("vllm", "arctic_plugins_huggingface")]
)
def test_integrations_do_not_import_each_other(one, other):
    sources = [*(ROOT / "integrations" / one).glob(f"arctic_plugins_{one}/**/*.py")]
    assert len(sources) > 5
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not any(name.split(".")[0] == other for name in names), path


def test_both_integrations_describe_theirs():
    assert [(name, type(host)) for name, host in hosts().items()] == [("transformers", Host), ("vllm", Host)]
    assert host_failures() == {}
    for name, host in hosts().items():
        assert host_range(name)[0] == host.integration


def test_descriptions_load_nothing_heavy():
    heavy = ("torch", "transformers", "vllm", "peft")
    code = (
        f"import sys; from arctic_plugins.host import hosts; hosts(); print([m for m in {heavy} if m in sys.modules])"
    )
    assert run_python("-c", code).stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["transformers", "vllm"])
def test_what_a_description_names_is_there(name):
    if host_version(name) is None:
        pytest.skip(f"{name} is not installed")
    host = hosts()[name]
    assert all(
        callable(load(target)) for target in [host.register, *filter(None, [host.probe]), *host.services.values()]
    )


def test_what_integrations_say_of_what_others_do_with_a_checkpoint_agrees():
    """Each can be installed alone; what is said twice is the same."""
    one, two = hosts()["transformers"], hosts()["vllm"]
    assert one.fused_siblings["vLLM"] == two.fused_siblings["vLLM"]
    assert (one.refused_keys, one.hub_code_keys) == (two.refused_keys, two.hub_code_keys)


@pytest.mark.usefixtures("third")
def test_a_third_host_is_known_everywhere(tmp_path, monkeypatch):
    modules = {"a.in_proj": LinearSpec(8, 4), "a.out_proj": LinearSpec(4, 8)}
    with pytest.raises(ClaimError, match=r"a\.in_proj and a\.out_proj have different codecs, but Third fuses them"):
        arbitrate([("fp8", Claim("weight_codec", "**.in_proj", 1))], modules)
    for config in ({"other_model": "x"}, {"text_config": {"_kernel": "someone/kernels"}}):
        with pytest.raises(CheckpointError, match="expected a model in this directory alone"):
            check_keys(config, "config.json")
    check_keys({"kernel": "eager"}, "config.json")
    write_provenance(tmp_path, {})
    assert read_provenance(tmp_path).versions["pytest"] == pytest.__version__
    assert host_version("third") == ("pytest", pytest.__version__)
    assert service("answer")() == 42
    monkeypatch.setattr(diagnosis, "_in_child", lambda *args: [])
    assert [found.text for found in diagnosis.diagnose() if found.subject == "third"] == [
        f"pytest {pytest.__version__}, in "
    ]


def test_the_doctor_lists_what_is_patched_when_a_host_is_registered(third, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(third), os.environ.get("PYTHONPATH", "")]))
    found = diagnosis._in_child("third registration", "host", "third")
    text = "string.capwords is replaced by third_plugin: to see (read in string 3)"
    assert found == [Finding("ok", "patch", text)]


def test_a_host_that_is_not_installed_says_how_to_get_it(install_plugin):
    install_plugin("third", THIRD.replace('"pytest")', '"third-gpu")'), group=GROUP)
    with pytest.raises(HostVersionError, match="third is not installed; pip install third-cpu or third-gpu"):
        check_hosts((), "third")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import a_module_that_is_not_there", "cannot be imported: ModuleNotFoundError"),
        ("plugin = 3", "is 3, not an arctic_plugins.host.Host"),
        (THIRD.replace('name="third"', 'name="fourth"'), "has the name 'fourth'"),
    ],
)
def test_a_broken_description_is_told_where_it_is_needed(install_plugin, monkeypatch, source, message):
    install_plugin("third", source, group=GROUP)
    check_hosts((), "transformers")
    with pytest.raises(PluginError, match=f"host 'third' of third-dist {message}"):
        check_hosts((), "third")
    with pytest.raises(PluginNotFoundError, match=f"offers the service 'answer'; host 'third' of third-dist {message}"):
        service("answer")
    monkeypatch.setattr(diagnosis, "_in_child", lambda *args: [])
    assert [found.status for found in diagnosis.diagnose() if found.subject == "third"] == ["error"]


def test_two_descriptions_of_one_host(install_plugin):
    for number in (1, 2):
        install_plugin("third", THIRD, distribution=f"third-{number}", module=f"third_{number}", group=GROUP)
    with pytest.raises(PluginError, match="host 'third' is described by third-1 and third-2; expected only one"):
        check_hosts((), "third")


def test_services_that_cannot_be_had(install_plugin, third):
    with pytest.raises(PluginNotFoundError, match="'gone' of third-dist cannot be imported"):
        service("gone")
    other = THIRD.replace("third-dist", "fourth-dist").replace('name="third"', 'name="fourth"')
    install_plugin("fourth", other, group=GROUP)
    with pytest.raises(PluginError, match="'answer' is offered by fourth-dist and third-dist"):
        service("answer")


def test_without_any_description_nothing_is_taken_for_safe(monkeypatch):
    monkeypatch.setattr("arctic_plugins.files.hosts", dict)
    with pytest.raises(PluginError, match="no installed distribution describes a host"):
        check_keys({}, "config.json")
