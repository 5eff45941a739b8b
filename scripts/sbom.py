"""Prints what the program is made from, as CycloneDX JSON: every crate that the released features link, of the
lock file. Crates that have C in them say in their versions which (rdkafka-sys 4.10.0+2.12.1)."""

import json
import pathlib
import subprocess

ROOT = pathlib.Path(__file__).parents[1]


def metadata():
    arguments = ["metadata", "--quiet", "--locked", "--format-version", "1", "--features", "vendored", "--filter-platform", "x86_64-unknown-linux-gnu"]
    return json.loads(subprocess.run(["cargo", *arguments], cwd=ROOT, check=True, capture_output=True).stdout)


def linked(graph):
    """The packages that come from the root by dependencies that are not for its tests."""
    nodes = {node["id"]: node for node in graph["resolve"]["nodes"]}
    found, left = set(), [graph["resolve"]["root"]]
    while left:
        package = left.pop()
        if package in found:
            continue
        found.add(package)
        for dependency in nodes[package]["deps"]:
            if any(kind["kind"] != "dev" for kind in dependency["dep_kinds"]):
                left.append(dependency["pkg"])
    return found


def component(package):
    licence = package["license"] and package["license"].replace("/", " OR ")
    return {
        "type": "library",
        "name": package["name"],
        "version": package["version"],
        "purl": f"pkg:cargo/{package['name']}@{package['version']}",
        **({"licenses": [{"expression": licence}]} if licence else {}),
    }


graph = metadata()
packages = {package["id"]: package for package in graph["packages"]}
root = packages[graph["resolve"]["root"]]
others = sorted((packages[name] for name in linked(graph) if name != root["id"]), key=lambda package: (package["name"], package["version"]))
print(json.dumps({
    "bomFormat": "CycloneDX",
    "specVersion": "1.5",
    "version": 1,
    "metadata": {"component": {"type": "application", "name": root["name"], "version": root["version"]}},
    "components": [component(package) for package in others],
}, indent=1))
