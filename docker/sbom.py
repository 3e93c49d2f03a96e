"""The software bill of materials of a Python environment, as CycloneDX 1.6: `python docker/sbom.py [-o FILE]`.

It lists what is installed beside the Python that runs it, with versions, licences and what needs what. It needs no
package of its own. What the system brings (an image's Debian packages) is not in it: `docker buildx build --sbom=true`
lists that too.
"""

from __future__ import annotations

import argparse
import json
import re
import uuid
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

PROJECT = "dphrl"


def bill(found: Iterable[Distribution], project: str = PROJECT, at: datetime | None = None) -> dict[str, Any]:
    """The document. found: the installed distributions; `project` is the one that it is about. at: now by default."""
    by_name = {normal(each.name): each for each in found}
    refs = {name: purl(each) for name, each in by_name.items()}
    about = by_name.pop(project, None)
    document: dict[str, Any] = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid4()}",
        "version": 1,
        "metadata": {"timestamp": (at or datetime.now(UTC)).strftime("%Y-%m-%dT%H:%M:%SZ")},
        "components": [component(by_name[name], "library") for name in sorted(by_name)],
        "dependencies": [],
    }
    if about is not None:
        document["metadata"]["component"] = component(about, "application")
        by_name[project] = about
    for name in sorted(by_name):
        needed = {refs[other] for other in needs(by_name[name]) if other in refs and other != name}
        document["dependencies"].append({"ref": refs[name], "dependsOn": sorted(needed)})
    return document


def component(each: Distribution, kind: str) -> dict[str, Any]:
    entry = {"type": kind, "bom-ref": purl(each), "name": normal(each.name), "version": each.version}
    entry["purl"] = purl(each)
    fields = each.metadata
    if expression := fields.get("License-Expression"):
        return entry | {"licenses": [{"expression": expression}]}
    # Older packages say it by classifiers, or in a field of free text, in which some have the whole licence.
    named = [c.rpartition(" :: ")[2] for c in fields.get_all("Classifier") or [] if c.startswith("License :: ")]
    text = (fields.get("License") or "").strip()
    if not named and text and "\n" not in text:
        named = [text]
    return entry | ({"licenses": [{"license": {"name": name}} for name in dict.fromkeys(named)]} if named else {})


def needs(each: Distribution) -> Iterator[str]:
    """The packages that its requirements name, those of extras included: what of them is installed may be used."""
    for requirement in each.requires or []:
        yield normal(re.split(r"[^A-Za-z0-9._-]", requirement.strip(), maxsplit=1)[0])


def normal(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def purl(each: Distribution) -> str:
    """The package URL. The + of a local version is written as URLs write it."""
    return f"pkg:pypi/{normal(each.name)}@{each.version.replace('+', '%2B')}"


def main() -> None:
    """Write the document to a file, or to standard output."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, help="default: standard output")
    output = parser.parse_args().output
    text = json.dumps(bill(distributions()), indent=2) + "\n"
    if output is None:
        print(text, end="")
    else:
        output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
