"""Build a release: `make version` and `make release` (CONTRIBUTING.md, "Releasing"). Nothing is uploaded.

Every `pyproject.toml` has the version and what it requires of the others as plain data, because a distribution's sdist
has to build without its neighbors and metadata has to be readable without a build. This script writes them all and
refuses to build if they differ.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from datetime import date
from pathlib import Path
from typing import Any

import click
from packaging.requirements import Requirement
from packaging.utils import parse_wheel_filename
from packaging.version import InvalidVersion, Version

ROOT = Path(__file__).resolve().parent.parent
CHANGELOG = ROOT / "CHANGELOG.md"

Projects = dict[Path, dict[str, Any]]


def read_projects() -> Projects:
    """Return the folder of each distribution, the core's first, with the table ``project`` of its metadata."""
    workspace = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["arctic-plugins"]["distributions"]
    parts = sorted(path.parent for folder in workspace for path in ROOT.glob(f"{folder}/pyproject.toml"))
    return {folder: tomllib.loads((folder / "pyproject.toml").read_text())["project"] for folder in [ROOT, *parts]}


def check_version(projects: Projects) -> str:
    """Return the version that all distributions have and require of each other.

    Extras may require others without a version: whatever they install requires the core in its own version.
    """
    versions = {project["name"]: project["version"] for project in projects.values()}
    if len(set(versions.values())) > 1:
        found = ", ".join(f"{name} {version}" for name, version in versions.items())
        raise click.ClickException(f"the versions differ: {found}; run `make version VERSION=...`")
    core, version = next(iter(versions.items()))
    for project in projects.values():
        if core not in {project["name"], *(Requirement(line).name for line in project["dependencies"])}:
            raise click.ClickException(f"{project['name']} does not require {core}; expected {core}=={version}")
        extras = [line for lines in project.get("optional-dependencies", {}).values() for line in lines]
        for line in [*project["dependencies"], *extras]:
            requirement = Requirement(line)
            accepted = {f"=={version}", ""} if line in extras else {f"=={version}"}
            if requirement.name in versions and str(requirement.specifier) not in accepted:
                raise click.ClickException(
                    f"{project['name']} requires {line}; expected {requirement.name}=={version}; "
                    f"run `make version VERSION={version}`"
                )
    return version


def read_changelog() -> dict[str, str]:
    """Return the sections of the changelog, heading -> text, starting with ``""`` for what precedes them."""
    parts = re.split(r"^## (.+)\n", CHANGELOG.read_text(), flags=re.MULTILINE)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def find_section(sections: dict[str, str], version: str) -> str | None:
    """Return the heading of a version, which is followed by its date."""
    return next((heading for heading in sections if heading.split(" - ")[0] == version), None)


def check_changelog(version: str) -> None:
    """Raise unless the changelog has a dated section for ``version`` that is not empty, and nothing unreleased."""
    sections = read_changelog()
    heading = find_section(sections, version)
    if heading is None or not re.fullmatch(r".+ - \d{4}-\d{2}-\d{2}", heading) or not sections[heading].strip():
        expected = f"'## {version} - YYYY-MM-DD' that says what changed"
        raise click.ClickException(
            f"CHANGELOG.md has no section {expected}; `make version VERSION={version}` makes it from Unreleased"
        )
    if sections.get("Unreleased", "").strip():
        raise click.ClickException(f"CHANGELOG.md has unreleased changes; move them into the section {heading!r}")


def check_git(version: str) -> None:
    """Raise unless everything is committed and the tag of ``version`` is free."""
    if changed := output("git", "status", "--porcelain").splitlines():
        files = ", ".join(line[3:] for line in changed[:3]) + (", ..." if changed[3:] else "")
        raise click.ClickException(f"the working tree has uncommitted changes: {files}; commit or stash them")
    if output("git", "tag", "--list", f"v{version}"):
        raise click.ClickException(f"version {version} has been released: the tag v{version} exists; raise the version")


def output(*command: str | Path, **options: Any) -> str:
    """Return what a command prints; its failure is an error that ends with the command's own output."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, **options)
    if done.returncode:
        name = " ".join(map(str, command[:4]))
        raise click.ClickException(f"`{name} ...` failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def check_wheel(wheel: Path, folder: Path) -> None:
    """Raise unless ``wheel`` holds the package of ``folder``, byte for byte, its metadata and license, and no more."""
    package = parse_wheel_filename(wheel.name)[0].replace("-", "_")
    source = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in (folder / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        found = {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}
        licenses = [archive.read(name) for name in archive.namelist() if name.endswith(".dist-info/licenses/LICENSE")]
    wrong = sorted(name for name in source.keys() | found.keys() if source.get(name) != found.get(name))
    wrong += sorted({f"{package}/py.typed"} - found.keys())
    if licenses != [(ROOT / "LICENSE").read_bytes()]:
        wrong.append("LICENSE")
    if wrong:
        raise click.ClickException(f"{wheel.name} is not whole; it differs from the source in {', '.join(wrong)}")


def check_installation(directory: Path, version: str, projects: Projects) -> None:
    """Raise unless the wheels of ``directory`` install without an index, and every plugin loads from there."""
    with tempfile.TemporaryDirectory() as target:
        names = [f"{project['name']}=={version}" for project in projects.values()]
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
        output(*pip, "--no-index", "--only-binary", ":all:", "--find-links", directory, "--target", target, *names)
        listed = output(Path(target) / "bin" / "arctic", "plugins", "--json", env={**os.environ, "PYTHONPATH": target})
    plugins = {plugin["name"]: plugin for plugin in json.loads(listed)}
    for project in projects.values():
        for name in project.get("entry-points", {}).get("arctic_plugins", {}):
            if name not in plugins or plugins[name]["error"] or plugins[name]["version"] != version:
                raise click.ClickException(f"plugin {name} does not load from its wheel: {plugins.get(name)}")


@click.group(help=(__doc__ or "").partition("\n")[0])
def main() -> None:
    """Run one of the two commands."""


@main.command("version")
@click.argument("version")
def write_version(version: str) -> None:
    """Write VERSION into every pyproject.toml, and date the unreleased changes in the changelog."""
    projects = read_projects()
    try:
        new = str(Version(version))
    except InvalidVersion as error:
        raise click.ClickException(f"{version!r} is not a version (PEP 440); expected, for example, 0.2.0") from error
    if older := [project["version"] for project in projects.values() if Version(project["version"]) > Version(new)]:
        raise click.ClickException(f"{new} comes before the present version, {older[0]}; expected a later one")
    sections = read_changelog()
    unreleased, heading = sections.get("Unreleased", "").strip(), find_section(sections, new)
    if heading and unreleased:
        raise click.ClickException(f"CHANGELOG.md has unreleased changes; move them into the section {heading!r}")
    if not heading and not unreleased:
        raise click.ClickException("nothing to release: CHANGELOG.md has no unreleased changes")
    names = "|".join(re.escape(project["name"]) for project in projects.values())
    for folder in projects:
        path = folder / "pyproject.toml"
        text = re.sub(r'^version = ".*"$', f'version = "{new}"', path.read_text(), count=1, flags=re.MULTILINE)
        path.write_text(re.sub(rf'"((?:{names})(?:\[[\w,-]+\])?)==[^"]+"', rf'"\1=={new}"', text))
    assert check_version(read_projects()) == new
    if not heading:
        text, dated = CHANGELOG.read_text(), f"## Unreleased\n\n## {new} - {date.today().isoformat()}\n"
        CHANGELOG.write_text(text.replace("## Unreleased\n", dated, 1))
    click.echo(f"{len(projects)} distributions have version {new}. Next: review CHANGELOG.md and commit.")


@main.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path, resolve_path=True),
    default=ROOT / "dist",
    help="A new directory. [default: dist]",
)
@click.option("--draft", is_flag=True, help="Do not ask for a clean working tree, a changelog and a free tag.")
def build(out: Path, draft: bool) -> None:
    """Build, check and hash the sdist and the wheel of every distribution."""
    projects = read_projects()
    version = check_version(projects)
    if not draft:
        check_changelog(version)
        check_git(version)
    if out.exists():
        raise click.ClickException(f"{out} exists; remove it, so that nothing else is uploaded with the release")
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".release-") as temporary:
        built = Path(temporary) / "dist"
        for folder, project in projects.items():
            click.echo(f"building {project['name']}")
            # The wheel is made from the sdist, so this checks both. A build environment would install CUDA's torch.
            output(sys.executable, "-m", "build", "--no-isolation", "--outdir", built, folder)
            [wheel] = built.glob(f"{project['name'].replace('-', '_')}-{version}-*.whl")
            check_wheel(wheel, folder)
        click.echo("checking metadata, descriptions and the installation")
        files = sorted(built.iterdir())
        output(sys.executable, "-m", "twine", "check", "--strict", *files)
        check_installation(built, version, projects)
        sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
        (built / "SHA256SUMS").write_text("".join(sums))
        built.rename(out)
    click.echo(f"{out}: {len(files)} files of version {version}, nothing uploaded")
    if not draft:
        click.echo(f"Next: git tag v{version} && git push origin v{version} && twine upload {out}/*.whl {out}/*.tar.gz")


if __name__ == "__main__":
    main()
