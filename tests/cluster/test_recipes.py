"""The cluster recipes hold together: manifests fit their published schemas, and name files and commands that exist.

The schemas are those of packages: Kubernetes' of kubernetes-validate, the Dask operator's of dask-kubernetes, that of
Docker Compose of check-jsonschema. Nothing is fetched.
"""

import copy
import importlib
import json
import re
import subprocess
import tomllib
from functools import cache
from importlib import resources
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from command import dadvi

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
KUBERNETES = sorted((CLUSTER / "kubernetes").glob("*.yaml"))
COMPOSE = CLUSTER / "compose" / "compose.yaml"
SCRIPTS = [*CLUSTER.rglob("*.sh"), *CLUSTER.rglob("*.sbatch"), *(ROOT / "scripts").glob("*.sh")]
SHELL = [*CLUSTER.rglob("README.md"), *SCRIPTS]


# Schemas --------------------------------------------------------------------------------------------------------------


def documents(file: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(file.read_text()) if document]


def check_manifest(document: dict[str, Any]) -> None:
    """Check a document of Kubernetes or of the Dask operator against its schema, unknown keys included."""
    if document["apiVersion"].startswith("kubernetes.dask.org/"):
        operator(document["kind"]).validate(document)
    else:
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


@cache
def operator(kind: str) -> jsonschema.Draft202012Validator:
    """Return what checks documents of a kind of the Dask operator's."""
    (file,) = [
        each
        for each in distribution("dask-kubernetes").files or []
        if str(each).endswith(f"dask-kubernetes-operator/crds/{kind.lower()}.yaml")
    ]
    (version,) = yaml.safe_load(file.read_text())["spec"]["versions"]
    return jsonschema.Draft202012Validator(closed(version["schema"]["openAPIV3Schema"]))


def closed(schema: Any) -> Any:
    """Return a schema in which an object has no other keys than are told, where any are."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: closed(value) for key, value in schema.items()}
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        inner.setdefault("additionalProperties", False)
        if "spec" in schema["properties"]:  # the root, whose envelope is Kubernetes' own
            inner["properties"] = {"apiVersion": {}, "kind": {}, "metadata": {}, **inner["properties"]}
    return inner


@pytest.mark.parametrize("file", KUBERNETES, ids=lambda file: file.name)
def test_manifests_fit_their_schemas(file):
    kinds = [document["kind"] for document in documents(file)]
    assert {"plain.yaml": "Job", "operator.yaml": "DaskJob"}[file.name] in kinds
    for document in documents(file):
        check_manifest(document)


@pytest.mark.parametrize("file", KUBERNETES, ids=lambda file: file.name)
def test_a_manifest_with_a_mistake_does_not(file):
    """In whatever container it is."""
    for document in documents(file):
        for path in paths_of(document, "image"):
            for spoil in (misspelt, mistyped):
                changed = copy.deepcopy(document)
                spoil(at(changed, path))
                with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
                    check_manifest(changed)


def misspelt(container: dict[str, Any]) -> None:
    container["imagge"] = container.pop("image")


def mistyped(container: dict[str, Any]) -> None:
    container["args"] = "dask worker"


def paths_of(node: Any, key: str) -> list[tuple[Any, ...]]:
    """Return where in a document the objects with a key are."""
    if isinstance(node, dict):
        inner = [(name, *path) for name, value in node.items() for path in paths_of(value, key)]
        return [(), *inner] if key in node else inner
    if isinstance(node, list):
        return [(position, *path) for position, value in enumerate(node) for path in paths_of(value, key)]
    return []


def at(document: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        document = document[key]
    return document


def compose_schema() -> dict[str, Any]:
    return json.loads((resources.files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json").read_text())


def test_the_compose_file_fits_its_schema():
    (document,) = documents(COMPOSE)
    jsonschema.validate(document, compose_schema())
    document["services"]["worker"]["comand"] = []
    with pytest.raises(jsonschema.ValidationError, match="comand"):
        jsonschema.validate(document, compose_schema())


# What they refer to ---------------------------------------------------------------------------------------------------


def test_services_depend_on_services_and_volumes_that_are_there():
    (document,) = documents(COMPOSE)
    services = document["services"]
    for service in services.values():
        assert set(service.get("depends_on", {})) <= services.keys()
        for volume in service.get("volumes", []):
            assert volume.startswith(("$", ".")) or volume.partition(":")[0] in document["volumes"]
    build = document["x-dadvi"]["build"]
    assert (COMPOSE.parent / build["context"]).resolve() == ROOT
    assert (ROOT / build["dockerfile"]).is_file()


def test_the_image_copies_what_is_there_and_not_ignored():
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert ignored[0] == "*"
    copied = [
        source
        for line in (CLUSTER / "Dockerfile").read_text().splitlines()
        if line.startswith("COPY ")
        for source in line.split()[1:-1]
    ]
    assert "dadvi" in copied
    for source in copied:
        assert (ROOT / source).exists()
        assert f"!{source}" in ignored
    for wanted in re.findall(r'"\.\[([\w,]+)\]"', (CLUSTER / "Dockerfile").read_text()):
        assert wanted in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def test_manifests_connect_what_they_name():
    """Selectors find labels, mounts find volumes, ports by name are there, and addresses are those of services."""
    manifests = documents(CLUSTER / "kubernetes" / "plain.yaml")
    services = {each["metadata"]["name"]: each["spec"] for each in manifests if each["kind"] == "Service"}
    claims = {each["metadata"]["name"] for each in manifests if each["kind"] == "PersistentVolumeClaim"}
    pods = [each["spec"]["template"] for each in manifests if "template" in each.get("spec", {})]
    for service in services.values():
        (pod,) = [pod for pod in pods if pod.get("metadata", {}).get("labels") == service["selector"]]
        ports = {port["name"] for each in pod["spec"]["containers"] for port in each["ports"]}
        assert {port["targetPort"] for port in service["ports"]} <= ports
    for pod in pods:
        volumes = {each["name"]: each for each in pod["spec"].get("volumes", [])}
        for container in pod["spec"]["containers"]:
            assert {mount["name"] for mount in container.get("volumeMounts", [])} <= volumes.keys()
        assert {
            each["persistentVolumeClaim"]["claimName"] for each in volumes.values() if "persistentVolumeClaim" in each
        } <= claims
    for host, port in re.findall(r"tcp://([\w-]+):(\d+)", (CLUSTER / "kubernetes" / "plain.yaml").read_text()):
        assert int(port) in {each["port"] for each in services[host]["ports"]}


# The commands ---------------------------------------------------------------------------------------------------------


def commands() -> list[tuple[str, str, str, set[str]]]:
    """Return (file, program, command, options) of every command of dadvi and Dask that a recipe runs."""
    lines = []
    for file in SHELL:
        text = file.read_text()
        if file.suffix == ".md":
            text = "\n".join(re.findall(r"^```bash\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE))
        code = [line for line in text.replace("\\\n", " ").splitlines() if not re.match(r"\s*#|.*\becho\b", line)]
        lines += [(file.name, line.partition(" # ")[0]) for line in code]
    for file in (*KUBERNETES, COMPOSE):
        found = [
            at(document, path)[key]
            for key in ("args", "command")
            for document in documents(file)
            for path in paths_of(document, key)
        ]
        lines += [(file.name, " ".join(given)) for given in found]
    pattern = r"(?:^|[\s(])(dadvi|dask) ([a-z]+)\b([^&|;)]*)"
    return [
        (file, program, command, set(re.findall(r"(?<!\S)--[a-z][a-z-]*", rest)))
        for file, line in lines
        for program, command, rest in re.findall(pattern, line)
    ]


def options_of(program: str, command: str) -> set[str]:
    if program == "dadvi":
        told = dadvi(command, "--help").out
    else:
        parsed = importlib.import_module(f"distributed.cli.dask_{command}").main
        told = " ".join(option for each in parsed.params for option in (*each.opts, *each.secondary_opts))
    return set(re.findall(r"--[a-z][a-z-]*", told))


def test_every_command_of_the_recipes_is_accepted():
    known: dict[tuple[str, str], set[str]] = {}
    seen = commands()
    assert {each[0] for each in seen} >= {"with_cluster.sh", "fit.sbatch", "README.md", "compose.yaml", "plain.yaml"}
    for file, program, command, named in seen:
        options = known.setdefault((program, command), options_of(program, command))
        assert options, f"{file}: there is no `{program} {command}`"
        assert named <= options, f"{file}: `{program} {command}` has no {', '.join(sorted(named - options))}"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_are_shell_and_stop_at_errors(script):
    subprocess.run(["bash", "-n", script], check=True, timeout=20)
    if script.name != "setup.sh":  # which others source
        assert "set -euo pipefail" in script.read_text()


def test_pods_and_jobs_in_place_of_others_go_on_with_their_run():
    for file in ("plain.yaml", "operator.yaml", "chain.sbatch"):
        assert [named for where, _, command, named in commands() if (where, command) == (file, "fit")] == [
            {"--resume", "--out"}
        ]


def test_every_recipe_has_a_readme_that_the_index_names():
    index = (CLUSTER / "README.md").read_text()
    recipes = {path.name for path in CLUSTER.iterdir() if path.is_dir()}
    assert recipes == set(re.findall(r"\]\((\w+)/README\.md\) \|", index))
    for recipe in recipes:
        text = (CLUSTER / recipe / "README.md").read_text()
        assert len(text.splitlines()) <= 30
        for name in re.findall(r"(?:cluster|scripts)/[\w/.]+\.(?:sh|sbatch|py|yaml)", text):
            assert (ROOT / name).is_file(), name
