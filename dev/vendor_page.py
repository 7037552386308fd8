"""Fetches the libraries of the server's page from the npm registry: `python dev/vendor_page.py`.

They are ES modules as published, less their links to source maps, and import each other by path:
a browser runs them without a build step. `packages.json` beside them says what they are.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

VENDOR = Path(__file__).parent.parent / "vlm_tune" / "serving" / "page" / "vendor"
SOURCE_MAP = re.compile(r"\n//# sourceMappingURL=.*\n?$")
IMPORTED_BY_NAME = re.compile(r'from"preact"')


@dataclass(frozen=True)
class Library:
    """A package of the npm registry.

    Attributes:
        name: Its name there.
        version: The exact version.
        license: Its SPDX identifier.
        modules: File names here, and the paths in the package that they come from.
    """

    name: str
    version: str
    license: str
    modules: dict[str, str]


LIBRARIES = (
    Library(
        "preact",
        "11.2.0",
        "MIT",
        {"preact.js": "dist/preact.mjs", "preact-hooks.js": "hooks/dist/hooks.mjs"},
    ),
    Library("htm", "3.1.1", "Apache-2.0", {"htm.js": "dist/htm.mjs"}),
    Library("idb", "8.0.4", "ISC", {"idb.js": "build/index.js"}),
    Library("eventsource-parser", "3.1.1", "MIT", {"eventsource-parser.js": "dist/index.js"}),
)


def fetched(library: Library, folder: Path) -> tarfile.TarFile:
    """Returns the package's archive, which npm has checked against the registry's digest."""
    command = ["npm", "pack", f"{library.name}@{library.version}", "--silent"]
    packed = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    return tarfile.open(folder / packed.stdout.strip())


def text_of(archive: tarfile.TarFile, path: str) -> str:
    """Returns the text of one of a package's files."""
    member = archive.extractfile(f"package/{path}")
    if member is None:
        raise SystemExit(f"{archive.name} has no file {path}: look where it is now")
    return member.read().decode()


def main() -> None:
    """Writes the modules, the licences and the list of both."""
    VENDOR.mkdir(parents=True, exist_ok=True)
    packages = []
    with tempfile.TemporaryDirectory() as folder:
        for library in LIBRARIES:
            archive = fetched(library, Path(folder))
            (VENDOR / f"LICENSE-{library.name}.txt").write_text(text_of(archive, "LICENSE"))
            sums = {}
            for name, path in library.modules.items():
                module = SOURCE_MAP.sub("\n", text_of(archive, path))
                module = IMPORTED_BY_NAME.sub('from"./preact.js"', module)
                (VENDOR / name).write_text(module)
                sums[name] = hashlib.sha256(module.encode()).hexdigest()
            packages.append(
                {
                    "name": library.name,
                    "version": library.version,
                    "license": library.license,
                    "sha256": sums,
                }
            )
    (VENDOR / "packages.json").write_text(json.dumps(packages, indent=2) + "\n")


if __name__ == "__main__":
    main()
