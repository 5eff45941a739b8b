"""The charts, for every branch of their values: scripts/chart test.

cases.yaml says what is rendered and what is expected. Every object is looked at by the schema of the oldest and
the newest Kubernetes, unknown fields refused, and every whippet.yaml by `whippet validate`.
"""

import concurrent.futures
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import kubernetes_validate
import yaml

ROOT = pathlib.Path(__file__).parents[2]
KUBERNETES = {"oldest": "1.25", "newest": kubernetes_validate.latest_version()}
# Kinds of others, whose schemas are not at hand: the fields that the charts use.
FOREIGN = {
    "PodMonitor": {"selector", "podMetricsEndpoints"},
    "ServiceMonitor": {"selector", "endpoints"},
    "PrometheusRule": {"groups"},
}
problems = []


def helm(*arguments):
    return subprocess.run(["helm", *arguments], capture_output=True, text=True, cwd=ROOT)


def render(case, version, folder):
    values = pathlib.Path(folder, re.sub(r"\W", "_", f"{case['name']}{version}.yaml"))
    values.write_text(yaml.safe_dump(case["values"]))
    apis = [f"--api-versions={api}" for api in case.get("api", [])]
    return helm("template", "release", f"helm/{case['chart']}", f"--kube-version={version}", f"--values={values}", *apis)


def at(value, path):
    """What is at a path: names have dots in them, so the longest name that fits goes first."""
    if not path:
        return value
    if isinstance(value, str):
        value = yaml.safe_load(value)
    steps = path.split(".")
    for end in range(len(steps), 0, -1):
        head, rest = ".".join(steps[:end]), ".".join(steps[end:])
        if isinstance(value, dict) and head in value:
            return at(value[head], rest)
        if isinstance(value, list):
            named = [item for item in value if isinstance(item, dict) and item.get("name") == head]
            if named:
                return at(named[0], rest)
            if head.isdigit() and int(head) < len(value):
                return at(value[int(head)], rest)
    return None


def look_at_configuration(text, name):
    """`whippet validate`, with secrets where the configuration says they are."""
    with tempfile.TemporaryDirectory() as folder:
        for path in set(re.findall(r"/run/secrets/[\w/.-]+", text)):
            file = pathlib.Path(folder + path)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("secret")
        config = pathlib.Path(folder, "whippet.yaml")
        config.write_text(text.replace("/run/secrets", f"{folder}/run/secrets"))
        done = subprocess.run([os.environ["WHIPPET"], "validate", "--config", config], capture_output=True, text=True)
        if done.returncode:
            problems.append(f"{name}: whippet validate: {done.stderr}")


def look_at_schema(document, version, name):
    kind = document.get("kind")
    if kind in FOREIGN:
        if set(document["spec"]) - FOREIGN[kind]:
            problems.append(f"{name}: {kind} has {set(document['spec']) - FOREIGN[kind]}")
        return
    try:
        kubernetes_validate.validate(document, version, strict=True)
    except (kubernetes_validate.ValidationError, kubernetes_validate.InvalidSchemaError) as error:
        problems.append(f"{name}: {kind} at Kubernetes {version}: {error}")


def documents(text):
    return [document for document in yaml.safe_load_all(text) if document]


def look_at(case, folder):
    for which in [case["kube"]] if "kube" in case else KUBERNETES:
        version = KUBERNETES[which]
        name = f"{case['name']} ({which})"
        done = render(case, version, folder)
        if "fails" in case:
            if done.returncode == 0 or case["fails"] not in done.stderr:
                problems.append(f"{name}: expected a failure with {case['fails']!r}, found {done.stderr or done.stdout}")
            continue
        if done.returncode:
            problems.append(f"{name}: {done.stderr}")
            continue
        made = documents(done.stdout)
        kinds = {}
        for document in made:
            look_at_schema(document, version, name)
            kinds.setdefault(document["kind"], document)
            if "whippet.yaml" in document.get("data", {}):
                look_at_configuration(document["data"]["whippet.yaml"], name)
        for path, expected in case["expect"].items():
            kind, _, rest = path.partition(".")
            document = kinds.get(kind)
            if kind == "ConfigMap":
                document = document and {**document, **document["data"]}
            found = at(document, rest) if document else None
            if found != expected:
                problems.append(f"{name}: {path}: expected {expected!r}, found {found!r}")


def look_at_plain():
    """deploy/: rendered from the charts, and the Kustomize component on a deployment that knows nothing of it."""
    for name in ("relay.yaml", "monitoring.yaml", "sidecar.yaml"):
        path = ROOT / "deploy/kubernetes" / name
        # A sidecar that Kubernetes knows as one is for newer ones.
        versions = [KUBERNETES["newest"]] if name == "sidecar.yaml" else KUBERNETES.values()
        for document in documents(path.read_text()):
            for version in versions:
                look_at_schema(document, version, path.name)
            if "whippet.yaml" in document.get("data", {}):
                look_at_configuration(document["data"]["whippet.yaml"], path.name)
    done = subprocess.run(["kustomize", "build", "deploy/kustomize/example"], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        problems.append(f"kustomize: {done.stderr}")
        return
    made = documents(done.stdout)
    kinds = {document["kind"]: document for document in made}
    for document in made:
        look_at_schema(document, KUBERNETES["newest"], "kustomize")
    spec = kinds["Deployment"]["spec"]["template"]["spec"]
    sidecar = at(spec, "initContainers.whippet")
    configuration = kinds["ConfigMap"]["metadata"]["name"]
    look_at_configuration(kinds["ConfigMap"]["data"]["whippet.yaml"], "kustomize")
    if not sidecar or at(spec, "volumes.whippet-config.configMap.name") != configuration or len(spec["containers"]) != 1:
        problems.append(f"kustomize: the sidecar is not in the pod as it should be: {spec}")
    # The same container as the chart's.
    rendered = documents(render({"name": "sidecar", "chart": "examples/shop", "values": {}}, KUBERNETES["newest"], tempfile.gettempdir()).stdout)
    chart = next(d for d in rendered if d["kind"] == "Deployment")["spec"]["template"]["spec"]["initContainers"][0]
    if sidecar != chart:
        problems.append(f"kustomize: its container is not the chart's:\n{sidecar}\n{chart}")


def look_at_values():
    """What both charts have is the same in both."""
    def both(name, read):
        return [read(ROOT.joinpath("helm", chart, name).read_text()) for chart in ("whippet-sidecar", "whippet")]

    def compare(what, sidecar, own, only):
        for key in set(sidecar) - only:
            if key not in own or sidecar[key] != own[key]:
                problems.append(f"{what}: {key} of whippet-sidecar is not that of whippet")

    only = {"native", "applicationGraceSeconds"}
    compare("values.yaml", *both("values.yaml", yaml.safe_load), only)
    sidecar, own = both("values.schema.json", yaml.safe_load)
    compare("values.schema.json", sidecar["properties"], own["properties"], only)
    for chart, schema in zip(both("values.yaml", yaml.safe_load), (sidecar, own)):
        unknown = set(chart) ^ (set(schema["properties"]) - {"global", "whippet"})
        if unknown:
            problems.append(f"values.yaml and its schema differ in {unknown}")


def main():
    cases = yaml.safe_load(ROOT.joinpath("tests/chart/cases.yaml").read_text())
    for chart in ("whippet", "examples/shop"):
        case = next(case for case in cases if case["chart"] == chart and "fails" not in case)
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as values:
            yaml.safe_dump(case["values"], values)
            done = helm("lint", "--strict", f"--kube-version={KUBERNETES['newest']}", f"helm/{chart}", f"--values={values.name}")
            if done.returncode:
                problems.append(f"helm lint {chart}: {done.stdout}{done.stderr}")
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda case: look_at(case, folder), cases))
    look_at_plain()
    look_at_values()
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{len(cases)} cases, Kubernetes {KUBERNETES['oldest']} and {KUBERNETES['newest']}: {'FAILED' if problems else 'ok'}")
    return bool(problems)


sys.exit(main())
