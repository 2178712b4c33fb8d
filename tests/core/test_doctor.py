"""`arctic doctor` survives every way in which a plugin can be broken, and says what it is."""

import json
import os
import time
from contextlib import closing

import pytest

from arctic_plugins import Finding, diagnosis
from arctic_plugins.diagnosis import diagnose
from arctic_plugins.resolver import host_version
from arctic_plugins.testing import run_python
from arctic_plugins.testing.fixtures import PluginSites

PLUGIN = "from arctic_plugins import Finding, Plugin, hookimpl\n"
IN_CHILD = diagnosis._in_child


def broken(body, head="", name="odd"):
    return f"{PLUGIN}{head}\nclass plugin(Plugin):\n    name = '{name}'\n{body}"


def only(*subjects):
    """The doctor's way into its children, for the checks that have a part in the test: ``recipe``, ``plugin`` and its
    name.
    """
    return lambda subject, *arguments: (
        IN_CHILD(subject, *arguments) if not {subject, arguments[0]}.isdisjoint(subjects) else []
    )


@pytest.fixture
def doctor(install_plugin, monkeypatch):
    """A function that installs sources as plugins named ``odd`` and gives the findings, with no other check in a child
    than is asked for.
    """

    def run(*sources, recipe=None, keep=("plugin odd",)):
        sites = []
        for number, source in enumerate(sources):
            sites.append(str(install_plugin("odd", source, distribution=f"odd-{number}", module=f"odd_{number}")))
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([*sites, os.environ.get("PYTHONPATH", "")]))
        monkeypatch.setattr(diagnosis, "_in_child", only(*keep))
        return diagnose(recipe)

    return run


def about(findings, subject):
    return [found for found in findings if found.subject.startswith(subject)]


WAYS = {
    "raises on import": ("raise RuntimeError('no luck')", "RuntimeError: no luck"),
    "exits on import": ("raise SystemExit(0)", "SystemExit: 0"),
    "ends the process": ("import os; os._exit(3)", "its process ended with exit status 3"),
    "crashes": ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "its process ended with signal 11"),
    "is no plugin": ("plugin = 3", "is not a plugin"),
    "has another name": (broken("", name="even"), "has the name 'even'"),
    "knows a hook that is none": (broken("    @hookimpl\n    def clam(self): ...\n"), "unknown hook"),
    "fails in diagnose": (
        broken("    @classmethod\n    @hookimpl\n    def diagnose(cls): return 1 / 0\n"),
        "ZeroDivisionError",
    ),
    "yields nonsense": (
        broken("    @classmethod\n    @hookimpl\n    def diagnose(cls): return [3]\n"),
        "AttributeError",
    ),
    "wants another host": (
        broken("    hosts = {'transformers': '<2'}\n"),
        "plugin '{name}' does not work with transformers",
    ),
    "needs another contract": (broken("    contracts = {99}\n"), "needs contract 99, but arctic-plugins"),
    "declares a bad range": (broken("    hosts = {'transformers': 'two'}\n"), "declares an invalid range"),
}
NAMES = {way: f"odd-{'-'.join(way.split())}" for way in WAYS}


@pytest.fixture(scope="module")
def among_broken(tmp_path_factory):
    """The findings where every broken plugin is installed beside the others and the sound ones, each under a name of
    its own.
    """
    install = PluginSites(tmp_path_factory.mktemp("broken"))
    with pytest.MonkeyPatch.context() as patch, closing(install):
        for number, (way, (source, _)) in enumerate(WAYS.items()):
            own = source.replace("name = 'odd'", f"name = '{NAMES[way]}'")
            install(NAMES[way], own, distribution=f"broken-{number}", module=f"broken_{number}")
        patch.setenv("PYTHONPATH", os.pathsep.join([*install.added, os.environ.get("PYTHONPATH", "")]))
        patch.setattr(diagnosis, "_in_child", only("plugin"))
        return diagnose()


@pytest.mark.parametrize("way", WAYS)
def test_it_never_dies_of_a_broken_plugin(among_broken, way):
    message = WAYS[way][1].format(name=NAMES[way])
    wrong = [found for found in about(among_broken, f"plugin {NAMES[way]}") if found.status == "error"]
    assert wrong, among_broken
    assert message in wrong[0].text
    assert about(among_broken, "plugin fp8")[0].status == "ok"
    assert about(among_broken, "python")


def test_a_plugin_that_hangs_is_given_up(doctor, monkeypatch):
    monkeypatch.setattr(diagnosis, "_TIMEOUT", 6.0)
    started = time.monotonic()
    findings = doctor("import time; time.sleep(600)")
    assert "did not load within 6 s" in about(findings, "plugin odd")[0].text
    assert time.monotonic() - started < 120


def test_what_a_plugin_prints_is_not_taken_for_its_findings(doctor):
    body = (
        "    @classmethod\n    @hookimpl\n    def diagnose(cls): yield Finding('warning', 'compiler', 'none', "
        "'install one')\n"
    )
    findings = about(doctor(broken(body, head="print('[]'); print('{\"status\": 1}')")), "plugin odd")
    assert [(found.status, found.subject, found.fix) for found in findings] == [
        ("ok", "plugin odd", ""),
        ("warning", "plugin odd: compiler", "install one"),
    ]


def test_two_providers_of_one_name(doctor):
    findings = about(doctor(broken(""), broken("")), "plugin odd")
    assert [found.status for found in findings] == ["error"]
    assert "provided by odd-0 1.0 and odd-1 1.0" in findings[0].text


def test_stale_and_broken_metadata(install_plugin, monkeypatch):
    site = install_plugin("gone", "", module="gone_module")
    (site / "gone_module.py").unlink()
    (site / "half-1.0.dist-info").mkdir()
    again = site / "arctic_plugins_fp8-0.0.9.dist-info"
    again.mkdir()
    (again / "METADATA").write_text("Metadata-Version: 2.1\nName: arctic-plugins-fp8\nVersion: 0.0.9\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setattr(diagnosis, "_in_child", only("plugin gone"))
    findings = diagnose()
    assert "No module named 'gone_module'" in about(findings, "plugin gone")[0].text
    texts = [found.text for found in about(findings, "metadata")]
    assert any("half-1.0.dist-info has no name or version" in text for text in texts)
    assert any("arctic-plugins-fp8 is installed 2 times" in text for text in texts)
    assert about(findings, "versions")[0].status == "error"


def test_a_recipe_says_what_is_enabled(doctor, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("plugins: {fp8: {}}")
    findings = doctor(recipe=recipe, keep=("recipe", "plugin fp8", "plugin lora"))
    assert about(findings, "plugin fp8")[0].text.endswith("(enabled)")
    assert about(findings, "plugin lora")[0].text.endswith("(not enabled)")
    assert about(findings, "recipe")[0].text == "the stack resolves, in this order: fp8"
    for text, message in (
        ("plugins: {nf3: {}}", "enabled, but not installed"),
        ("plugins: {fp8: {bits: 3}}", "plugins.fp8.bits is 3"),
        ("plugins: [", "is not valid YAML"),
        ("plugins: 3", "plugins"),
    ):
        recipe.write_text(text)
        wrong = [found for found in doctor(recipe=recipe, keep=("recipe",)) if found.status == "error"]
        assert any(message in found.text for found in wrong), (text, wrong)


def test_a_host_out_of_range_or_absent(monkeypatch):
    monkeypatch.setattr(diagnosis, "_in_child", lambda *args: [])
    monkeypatch.setattr(diagnosis, "host_version", lambda host: None)
    assert [found.status for found in about(diagnose(), "transformers")] == ["warning"]
    monkeypatch.undo()
    monkeypatch.setattr(diagnosis, "_in_child", lambda *args: [])
    monkeypatch.setattr("arctic_plugins.resolver.host_version", lambda host: (host, "4.57.0"))
    wrong = about(diagnose(), "transformers")[0]
    assert wrong.status == "error"
    assert (
        "arctic-plugins-huggingface does not work with transformers 4.57.0; expected transformers<5.20,>=5.16.1"
        in wrong.text
    )


def arctic_doctor(*arguments, status=0, **environment):
    command = ["-m", "arctic_plugins.cli", "doctor", *arguments]
    return run_python(*command, status=status, timeout=500, environment=environment)


@pytest.mark.vllm
@pytest.mark.skipif(host_version("vllm") is None, reason="vLLM is not installed")
def test_the_whole_of_it_as_json_with_the_real_vllm(install_plugin, monkeypatch):
    site = install_plugin("crash", "import os; os._exit(3)")
    done = arctic_doctor("--json", status=1, PYTHONPATH=str(site))
    findings = [Finding(**found) for found in json.loads(done.stdout)]
    wrong = [found.subject for found in findings if found.status == "error"]
    assert wrong == ["plugin crash", "transformers registration", "vllm worker"], done.stdout
    assert "exit status 3" in about(findings, "vllm worker")[0].text, (
        "such a plugin ends vLLM's workers too, and that is said"
    )
    sound = arctic_doctor()
    assert "the method 'arctic' is registered" in " ".join(sound.stdout.split())
    assert "rotary_embedding.get_ropeisreplacedbyarctic_plugins_vllm.rope" in "".join(sound.stdout.split())
    monkeypatch.setenv("VLLM_PLUGINS", "")
    assert "is not registered" in IN_CHILD("vllm worker", "host", "vllm")[0].text
