"""Looks the installed packages up among known vulnerabilities with pip-audit.

Ends with 1 if one is known that a newer version mends. Without a network, or where the index holds
no advisories, it says so and ends with 0; it never takes longer than a minute and a half.
"""

from __future__ import annotations

import json
import subprocess
import sys

SECONDS = 90


def main() -> int:
    """Prints the known vulnerabilities of the installed packages."""
    command = [
        sys.executable,
        "-m",
        "pip_audit",
        "--local",
        "--format",
        "json",
        "--timeout",
        "10",
        "--progress-spinner",
        "off",
    ]
    try:
        completed = subprocess.run(
            command, capture_output=True, text=True, timeout=SECONDS, check=False
        )
        packages = json.loads(completed.stdout)["dependencies"]
    except subprocess.TimeoutExpired:
        print(f"audit: skipped, the advisory service did not answer within {SECONDS} s")
        return 0
    except (ValueError, KeyError):
        print(
            "audit: skipped, "
            f"{(completed.stderr.strip().splitlines() or ['pip-audit said nothing'])[-1]}"
        )
        return 0
    looked_up = [package for package in packages if "skip_reason" not in package]
    if not looked_up:
        print(
            "audit: skipped, the index has no advisories "
            f"(of {len(packages)} packages none could be looked up)"
        )
        return 0
    known = [(package, one) for package in looked_up for one in package["vulns"]]
    for package, one in known:
        mended = (
            f"mended in {', '.join(one['fix_versions'])}"
            if one["fix_versions"]
            else "no version mends it yet"
        )
        print(f"audit: {package['name']} {package['version']}: {one['id']}, {mended}")
    print(
        f"audit: {len(looked_up)} of {len(packages)} packages looked up, "
        f"{len(known)} vulnerabilities known"
    )
    return int(any(one["fix_versions"] for _, one in known))


if __name__ == "__main__":
    sys.exit(main())
