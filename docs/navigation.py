"""Puts the page of every finding under their index, as the catalogue lists them. Called by mkdocs."""

from typing import Any

from ddpcall.findings import CATALOGUE


def on_config(config: Any) -> None:
    """Complete the navigation."""
    watch = next(entry["Watch"] for entry in config["nav"] if "Watch" in entry)
    findings = next(entry["Findings"] for entry in watch if isinstance(entry, dict))
    findings += [f"findings/{code}.md" for code in CATALOGUE]
